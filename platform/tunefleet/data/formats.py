"""One record of any layout -> one `Conversation` (or one document), or a `BadRecord` that says why not."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tunefleet.errors import Refused

Record = Mapping[str, Any]
Formatting = Literal["alpaca", "sharegpt", "openai"]


@dataclass(frozen=True)
class Columns:
    """Where a record keeps what. None: the data set has no such column."""

    prompt: str | None = None
    query: str | None = None
    response: str | None = None
    history: str | None = None
    messages: str | None = None
    system: str | None = None
    tools: str | None = None


@dataclass(frozen=True)
class Tags:
    """The keys of one message and the names of its roles."""

    role_tag: str | None = None
    content_tag: str | None = None
    user_tag: str | None = None
    assistant_tag: str | None = None
    observation_tag: str | None = None
    function_tag: str | None = None
    system_tag: str | None = None


@dataclass(frozen=True)
class Layout:
    """How the records of one data set are to be read."""

    formatting: Formatting
    columns: Columns
    tags: Tags


SHAREGPT_TAGS = Tags("from", "value", "human", "gpt", "observation", "function_call", "system")
OPENAI_TAGS = Tags("role", "content", "user", "assistant", "tool", "function", "system")
ALPACA_COLUMNS = Columns(prompt="instruction", query="input", response="output")


def default_columns(formatting: Formatting) -> Columns:
    """The columns of a layout for which nothing else is written."""
    if formatting == "alpaca":
        return ALPACA_COLUMNS
    return Columns(messages="messages" if formatting == "openai" else "conversations")


def default_tags(formatting: Formatting) -> Tags:
    """The message keys and role names of a layout for which nothing else is written."""
    return OPENAI_TAGS if formatting == "openai" else SHAREGPT_TAGS


@dataclass(frozen=True)
class Message:
    """One message. `calls` holds the function calls of an assistant, each `{"name": ..., "arguments": ...}`."""

    role: Literal["user", "assistant", "tool"]
    content: str
    calls: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Conversation:
    """User-side messages and answers in turn, the last one an answer. `tools` are JSON schemas."""

    messages: tuple[Message, ...]
    system: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()


class BadRecord(ValueError):
    """This record cannot be used. The text is the reason shown to the user."""


def conversation(record: Record, layout: Layout) -> Conversation:
    """Read one record. Raises `BadRecord` for a wrong order of roles, an empty answer or a field that is not text."""
    columns = layout.columns
    system = _text(record, columns.system, required=False)
    tools = _tools(record.get(columns.tools)) if columns.tools else ()
    if layout.formatting == "alpaca":
        messages = _alpaca_messages(record, columns)
    else:
        messages, leading = _tagged_messages(record, layout)
        system = leading or system
    _check_order(messages, several_results=layout.formatting == "openai")
    return Conversation(messages=messages, system=system, tools=tools)


def document(record: Record, layout: Layout) -> str:
    """The text of one record for pre-training: the prompt column and, if filled, the query column below it."""
    text = _joined_prompt(record, layout.columns)
    if not text.strip():
        raise BadRecord("the text is empty")
    return text


def detect(records: Sequence[Record], stage: str, source: str) -> Layout:
    """The layout of a data set that nobody described, from the keys of its first records.

    Raises `Refused` if the keys fit no layout of this stage.
    """
    keys = {key for record in records for key in record}
    if stage == "pt":
        if "text" in keys:
            return Layout("alpaca", Columns(prompt="text"), SHAREGPT_TAGS)
        if "instruction" in keys:
            return Layout("alpaca", ALPACA_COLUMNS, SHAREGPT_TAGS)
        raise Refused(_undescribed(source, keys, "a `text` column"))
    if "messages" in keys:
        return Layout("openai", Columns(messages="messages", **_extra_columns(keys)), _tags_of(records, "messages"))
    if "conversations" in keys:
        columns = Columns(messages="conversations", **_extra_columns(keys))
        return Layout("sharegpt", columns, _tags_of(records, "conversations"))
    if {"instruction", "output"} <= keys:
        history = "history" if "history" in keys else None
        query = "input" if "input" in keys else None
        columns = Columns("instruction", query, "output", history, **_extra_columns(keys))
        return Layout("alpaca", columns, SHAREGPT_TAGS)
    if keys == {"text"}:
        raise Refused(f"{source} is plain text without answers: write `stage: pt` for it.")
    raise Refused(_undescribed(source, keys, "`instruction` and `output`, `conversations` or `messages`"))


def check_columns(records: Sequence[Record], layout: Layout, stage: str, source: str) -> None:
    """Refuse a layout whose needed columns no record has, or that names none at all."""
    columns = layout.columns
    if layout.formatting == "alpaca":
        needed = {"prompt": columns.prompt} | ({} if stage == "pt" else {"response": columns.response})
    elif stage == "pt":
        raise Refused(f"{source} holds conversations: `stage: pt` needs a text column (`columns: {{prompt: text}}`).")
    else:
        needed = {"messages": columns.messages}
    keys = {key for record in records for key in record}
    for part, column in needed.items():
        if column is None:
            raise Refused(f"The `columns` of {source} name no `{part}`: add it to its entry in dataset_info.json.")
        if column not in keys:
            raise Refused(
                f"{source} has no column `{column}` (it has {', '.join(sorted(keys))}): "
                f"set `columns: {{{part}: ...}}` in its entry in dataset_info.json."
            )


def _undescribed(source: str, keys: set[str], wanted: str) -> str:
    has = ", ".join(sorted(keys)) or "nothing"
    return f"{source} has no {wanted} (it has {has}): describe it in dataset_info.json with `formatting` and `columns`."


def _extra_columns(keys: set[str]) -> dict[str, str]:
    return {name: name for name in ("system", "tools") if name in keys}


def _tags_of(records: Sequence[Record], column: str) -> Tags:
    for record in records:
        messages = record.get(column)
        if isinstance(messages, list) and messages and isinstance(messages[0], dict):
            return OPENAI_TAGS if "role" in messages[0] else SHAREGPT_TAGS
    return default_tags("openai" if column == "messages" else "sharegpt")


def _text(record: Record, column: str | None, *, required: bool) -> str:
    value = record.get(column) if column else None
    if value is None:
        if required:
            raise BadRecord(f"`{column}` is missing")
        return ""
    if not isinstance(value, str):
        raise BadRecord(f"`{column}` is {type(value).__name__}, not text")
    return value


def _joined_prompt(record: Record, columns: Columns) -> str:
    parts = (_text(record, columns.prompt, required=True), _text(record, columns.query, required=False))
    return "\n".join(part for part in parts if part)


def _alpaca_messages(record: Record, columns: Columns) -> tuple[Message, ...]:
    messages: list[Message] = []
    history = record.get(columns.history) if columns.history else None
    if history is not None and not isinstance(history, list):
        raise BadRecord(f"`{columns.history}` is {type(history).__name__}, not a list of pairs")
    for pair in history or []:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise BadRecord(f"`{columns.history}` is not a list of [question, answer] texts")
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    messages.append(Message("user", _joined_prompt(record, columns)))
    messages.append(Message("assistant", _text(record, columns.response, required=True)))
    return tuple(messages)


def _tagged_messages(record: Record, layout: Layout) -> tuple[tuple[Message, ...], str]:
    """The messages of a sharegpt or openai record, and the text of a leading system message."""
    entries = record.get(layout.columns.messages or "")
    if not isinstance(entries, list) or not entries:
        raise BadRecord(f"`{layout.columns.messages}` is not a list of messages")
    messages: list[Message] = []
    system = ""
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise BadRecord(f"message {number + 1} is {type(entry).__name__}, not an object")
        role = entry.get(layout.tags.role_tag or "")
        if number == 0 and role is not None and role in _system_roles(layout):
            system = _content(entry, layout, number)
        else:
            messages.append(_tagged_message(entry, role, layout, number))
    return tuple(messages), system


def _system_roles(layout: Layout) -> tuple[str | None, ...]:
    # "developer" is the newer name of the same role in the messages layout
    return (layout.tags.system_tag, "developer") if layout.formatting == "openai" else (layout.tags.system_tag,)


def _tagged_message(entry: Record, role: object, layout: Layout, number: int) -> Message:
    tags = layout.tags
    if role is None or not isinstance(role, str):
        raise BadRecord(f"message {number + 1} has no role (`{tags.role_tag}`)")
    if role == tags.assistant_tag and entry.get("tool_calls"):
        calls = _calls([call.get("function", call) for call in entry["tool_calls"]])
        return Message("assistant", _content(entry, layout, number, required=False), calls)
    content = _content(entry, layout, number)
    if role == tags.function_tag:
        return Message("assistant", "", _calls(_json(content, "a function call")))
    if role == tags.user_tag:
        return Message("user", content)
    if role == tags.assistant_tag:
        return Message("assistant", content)
    if role == tags.observation_tag:
        return Message("tool", content)
    raise BadRecord(f"message {number + 1} has the unknown role `{role}`")


def _content(entry: Record, layout: Layout, number: int, *, required: bool = True) -> str:
    """The text of one message; a list of text parts, as the openai layout allows, is joined."""
    value = entry.get(layout.tags.content_tag or "")
    if value is None and not required:
        return ""
    if layout.formatting == "openai" and isinstance(value, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in value):
            raise BadRecord(f"message {number + 1} has parts that are not text")
        return "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise BadRecord(f"`{layout.tags.content_tag}` of message {number + 1} is {type(value).__name__}, not text")
    return value


def _json(text: str, what: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        raise BadRecord(f"{what} is not valid JSON") from None


def _calls(value: object) -> tuple[Mapping[str, Any], ...]:
    calls = []
    for call in value if isinstance(value, list) else [value]:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or "arguments" not in call:
            raise BadRecord("a function call needs `name` and `arguments`")
        arguments = call["arguments"]
        arguments = _json(arguments, "`arguments` of a function call") if isinstance(arguments, str) else arguments
        calls.append({"name": call["name"], "arguments": arguments})
    return tuple(calls)


def _tools(value: object) -> tuple[Mapping[str, Any], ...]:
    if value is None or value == "":
        return ()
    tools = _json(value, "`tools`") if isinstance(value, str) else value
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRecord("`tools` is not a list of JSON schemas")
    return tuple(tools)


def _check_order(messages: Sequence[Message], *, several_results: bool) -> None:
    if not messages:
        raise BadRecord("there are no messages")
    answer_due = False
    before = ""
    for number, message in enumerate(messages):
        is_answer = message.role == "assistant"
        if is_answer != answer_due and not (several_results and message.role == before == "tool"):
            raise BadRecord(f"roles do not alternate at message {number + 1} (`{message.role}`)")
        if is_answer and not message.content.strip() and not message.calls:
            raise BadRecord("an answer is empty")
        answer_due, before = not is_answer, message.role
    if answer_due:
        raise BadRecord("the last message is not an answer")
