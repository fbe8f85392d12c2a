"""The quickstart's text, tokenizer and model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from docstrings import Documented
from prepare_quickstart import (
    FULL,
    Pair,
    answer,
    held_out_modules,
    make_corpus,
    make_model,
    make_pairs,
    module_names,
    paragraphs,
    read_documentation,
    train_tokenizer,
    what_it_is,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

Row = dict[str, str]


def rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def module_of(row: Row) -> str:
    """The top-level module that a question is about; the row's answer names it where the question does not."""
    found = re.search(r"of the module (\w+)", row["output"].partition("\n")[0]) or re.match(
        r"What is (\w+)[.?]", row["instruction"]
    )
    assert found is not None
    return found[1]


def text_of(row: Row) -> str:
    """The documentation in an answer, which stands after its first line."""
    return " ".join(row["output"].partition("\n")[2].split()).casefold()


def documented(module: str, name: str, text: str, kind: str = "function") -> Documented:
    return {"module": module, "name": name, "kind": kind, "text": text}


def test_an_answer_is_prose_without_signature_and_examples() -> None:
    text = (
        "dumps(obj, *, indent=None) -> str\n\nSerialize the object\nto text.\n\n>>> dumps(1)\n'1'\n\nMore is said here."
    )
    assert paragraphs(text) == ["Serialize the object to text.", "More is said here."]
    assert answer(text) == "Serialize the object to text.\nMore is said here."


@pytest.mark.parametrize("text", ["Too short.", "f(x) -> y", "x" * 2000, "Grüße an alle, die dies lesen wollen."])
def test_text_that_teaches_little_gives_no_answer(text: str) -> None:
    assert answer(text) is None


@pytest.mark.parametrize(
    ("item", "sentence"),
    [
        (documented("json", "json", "", "module"), "It is a module of the standard library."),
        (documented("json", "json.dumps", ""), "It is a function of the module json."),
        (documented("builtins", "str.split", "", "method"), "It is a method of the class str of the module builtins."),
        (documented("a.b", "a.b.C.d", "", "attribute"), "It is an attribute of the class C of the module a.b."),
    ],
)
def test_an_answer_begins_with_kind_and_home(item: Documented, sentence: str) -> None:
    assert what_it_is(item) == sentence


def test_no_question_and_no_answer_stands_twice() -> None:
    text = "Return the answer to the question."
    items = [documented("a", "a.f", text), documented("b", "b.f", text.upper().replace("RETURN", "Return"))]
    items.append(documented("a", "a.f", "Something else about the same function."))
    assert make_pairs(items) == {"a": [Pair("What is a.f?", "", f"It is a function of the module a.\n{text}")]}


def test_held_out_modules_are_about_the_share_and_never_one_subject() -> None:
    pairs = {f"module{i}": [Pair(f"{i} {j}", "", f"{i} {j}") for j in range(5)] for i in range(40)}
    pairs["giant"] = [Pair(f"giant {j}", "", f"giant {j}") for j in range(100)]
    heldout = held_out_modules(pairs, 0.1)
    assert "giant" not in heldout
    assert 30 <= sum(len(pairs[module]) for module in heldout) <= 35


def test_corpus_leaves_out_what_answers_a_held_out_question() -> None:
    shared = "Put an item into the queue, and block."
    items = [documented("queue", "queue.put", shared), documented("other", "other.put", shared)]
    items.append(documented("other", "other.get", "Take an item out of the queue."))
    corpus = make_corpus(items, {"queue"}, make_pairs(items)["queue"])
    assert corpus == [{"text": "other.get\n\nTake an item out of the queue."}]


def test_documentation_is_read_around_a_module_that_cannot_be_imported(capsys: pytest.CaptureFixture[str]) -> None:
    items = read_documentation(["bisect", "no.such", "heapq"])
    assert {item["module"] for item in items} == {"bisect", "heapq"}
    assert capsys.readouterr().out == ""


def test_module_names_are_public_and_in_order() -> None:
    names = module_names(None)
    assert {"json", "json.decoder", "email.mime.text", "builtins"} <= set(names)
    assert not any(part.startswith("_") or part == "antigravity" for name in names for part in name.split("."))


def test_rows_are_deduplicated_and_split_by_module(quickstart_world: Path) -> None:
    data = quickstart_world / "data"
    train, heldout, corpus = (rows(data / f"{name}.jsonl") for name in ("train", "heldout", "corpus"))
    everything = train + heldout
    assert len({row["instruction"] for row in everything}) == len(everything)
    assert len({text_of(row) for row in everything}) == len(everything)
    train_modules = {module_of(row) for row in train}
    heldout_modules = {module_of(row) for row in heldout}
    assert train_modules
    assert heldout_modules
    assert not train_modules & heldout_modules
    assert not {row["text"].partition("\n")[0].split(".")[0] for row in corpus} & heldout_modules
    learned = " ".join(" ".join(row["text"].split()) for row in corpus).casefold()
    assert [row["output"] for row in heldout if text_of(row) in learned] == []


def test_the_same_interpreter_makes_the_same_files(quickstart_world: Path, repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(repository / "jobs" / "prepare_quickstart.py"), "--small", "--to", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    files = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert {"train.jsonl", "heldout.jsonl", "corpus.jsonl", "model.safetensors", "tokenizer.json"} <= {
        file.name for file in files
    }
    assert [file for file in files if (tmp_path / file).read_bytes() != (quickstart_world / file).read_bytes()] == []


def test_tokenizer_writes_any_text_and_knows_its_turns(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for text in ("def f(x):\n    return x", "Grüße, 世界 🎉", "  spaces\t\n"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    rendered = str(tokenizer.apply_chat_template(turns, tokenize=False))
    assert rendered == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
    asked = str(tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True))
    assert rendered.startswith(asked)
    ids = tokenizer(rendered).input_ids
    assert ids.count(tokenizer.eos_token_id) == 2
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 2
    assert tokenizer.pad_token_id not in ids


def test_model_fits_its_tokenizer(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.num_key_value_heads < model.config.num_attention_heads


def test_the_quickstarts_model_has_three_to_ten_million_parameters() -> None:
    tokenizer = train_tokenizer(["a little text"], 300)
    assert 3e6 <= make_model(FULL, tokenizer).num_parameters() <= 10e6
