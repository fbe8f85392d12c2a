"""Records of each layout, good and bad."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tunefleet.data.formats import (
    ALPACA_COLUMNS,
    OPENAI_TAGS,
    SHAREGPT_TAGS,
    BadRecord,
    Columns,
    Layout,
    Message,
    check_columns,
    conversation,
    detect,
    document,
)
from tunefleet.errors import Refused

ALPACA = Layout("alpaca", Columns("instruction", "input", "output", "history", system="system"), SHAREGPT_TAGS)
SHAREGPT = Layout("sharegpt", Columns(messages="conversations", system="system", tools="tools"), SHAREGPT_TAGS)
OPENAI = Layout("openai", Columns(messages="messages"), OPENAI_TAGS)


def said(*pairs: tuple[str, Any], role: str = "from", content: str = "value") -> list[dict[str, Any]]:
    return [{role: who, content: what} for who, what in pairs]


def test_alpaca_joins_the_input_and_learns_the_history() -> None:
    record = {"instruction": "add", "input": "2 2", "output": "4", "history": [["hi", "hello"]], "system": "s"}
    read = conversation(record, ALPACA)
    assert read.system == "s"
    assert read.messages == (
        Message("user", "hi"),
        Message("assistant", "hello"),
        Message("user", "add\n2 2"),
        Message("assistant", "4"),
    )


def test_sharegpt_with_a_leading_system_and_tools() -> None:
    turns = said(("system", "new"), ("human", "h"), ("function_call", '{"name": "f", "arguments": {"a": 1}}'))
    turns += said(("observation", "o"), ("gpt", "g"))
    read = conversation({"conversations": turns, "system": "old", "tools": '[{"name": "f"}]'}, SHAREGPT)
    assert read.system == "new"
    assert read.tools == ({"name": "f"},)
    assert [message.role for message in read.messages] == ["user", "assistant", "tool", "assistant"]
    assert read.messages[1].calls == ({"name": "f", "arguments": {"a": 1}},)


def test_openai_calls_results_and_parts() -> None:
    messages: list[dict[str, Any]] = said(("developer", "s"), role="role", content="content")
    messages.append({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]})
    calls = [{"type": "function", "function": {"name": name, "arguments": json.dumps({"x": 1})}} for name in "fg"]
    messages.append({"role": "assistant", "content": None, "tool_calls": calls})
    messages += said(("tool", "1"), ("tool", "2"), ("assistant", "done"), role="role", content="content")
    read = conversation({"messages": messages}, OPENAI)
    assert read.system == "s"
    assert read.messages[0].content == "ab"
    assert [call["name"] for call in read.messages[1].calls] == ["f", "g"]
    assert [message.content for message in read.messages[2:]] == ["1", "2", "done"]


@pytest.mark.parametrize(
    ("record", "layout", "reason"),
    [
        ({"instruction": "a", "output": " "}, ALPACA, "an answer is empty"),
        ({"instruction": "a"}, ALPACA, "`output` is missing"),
        ({"instruction": "a", "output": 4}, ALPACA, "`output` is int, not text"),
        ({"instruction": ["a"], "output": "b"}, ALPACA, "`instruction` is list, not text"),
        ({"instruction": "a", "output": "b", "history": [["x"]]}, ALPACA, "pairs|\\[question, answer\\]"),
        ({"conversations": said(("gpt", "a"), ("human", "b"))}, SHAREGPT, "do not alternate at message 1"),
        ({"conversations": said(("human", "a"), ("human", "b"), ("gpt", "c"))}, SHAREGPT, "alternate at message 2"),
        ({"conversations": said(("human", "a"))}, SHAREGPT, "the last message is not an answer"),
        ({"conversations": said(("human", "a"), ("gpt", ""))}, SHAREGPT, "an answer is empty"),
        ({"conversations": said(("human", "a"), ("bot", "b"))}, SHAREGPT, "unknown role `bot`"),
        ({"conversations": said(("human", 3), ("gpt", "b"))}, SHAREGPT, "is int, not text"),
        ({"conversations": said(("human", "a"), ("function_call", "{"))}, SHAREGPT, "not valid JSON"),
        ({"conversations": []}, SHAREGPT, "not a list of messages"),
        ({"conversations": said(("system", "a"))}, SHAREGPT, "no messages"),
        ({"conversations": ["hi"]}, SHAREGPT, "not an object"),
    ],
)
def test_bad_records_say_why(record: dict[str, Any], layout: Layout, reason: str) -> None:
    with pytest.raises(BadRecord, match=reason):
        conversation(record, layout)


def test_documents() -> None:
    assert document({"text": "abc"}, Layout("alpaca", Columns(prompt="text"), SHAREGPT_TAGS)) == "abc"
    assert document({"instruction": "a", "input": "b"}, Layout("alpaca", ALPACA_COLUMNS, SHAREGPT_TAGS)) == "a\nb"
    with pytest.raises(BadRecord, match="empty"):
        document({"instruction": " "}, Layout("alpaca", ALPACA_COLUMNS, SHAREGPT_TAGS))


def test_layouts_are_found_by_their_keys() -> None:
    alpaca = detect([{"instruction": "a", "input": "", "output": "b", "system": "s"}], "sft", "x")
    assert alpaca == Layout("alpaca", Columns("instruction", "input", "output", system="system"), SHAREGPT_TAGS)
    sharegpt = detect([{"conversations": said(("human", "a"), ("gpt", "b"))}], "sft", "x")
    assert (sharegpt.formatting, sharegpt.tags) == ("sharegpt", SHAREGPT_TAGS)
    openai = detect([{"messages": said(("user", "a"), role="role", content="content")}], "sft", "x")
    assert (openai.formatting, openai.tags) == ("openai", OPENAI_TAGS)
    assert detect([{"text": "a"}], "pt", "x").columns.prompt == "text"


def test_what_fits_no_layout_is_refused() -> None:
    with pytest.raises(Refused, match="stage: pt"):
        detect([{"text": "a"}], "sft", "x")
    with pytest.raises(Refused, match="it has answer, question"):
        detect([{"question": "a", "answer": "b"}], "sft", "x")
    with pytest.raises(Refused, match="has no column `output`"):
        check_columns([{"instruction": "a"}], ALPACA, "sft", "x")
    with pytest.raises(Refused, match="name no `response`"):
        check_columns([{"q": "a"}], Layout("alpaca", Columns(prompt="q"), SHAREGPT_TAGS), "sft", "x")
    with pytest.raises(Refused, match="holds conversations"):
        check_columns([{"conversations": []}], SHAREGPT, "pt", "x")
