"""The whole way from files to memory-mapped rows."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from tunefleet.data.prepare import PreparedData, prepare
from tunefleet.data.settings import DataSettings
from tunefleet.data.tokens import TokenSplit
from tunefleet.errors import Refused

MakeSettings = Callable[..., DataSettings]
MakeTokenizer = Callable[..., PreTrainedTokenizerBase]


def all_rows(split: TokenSplit | None) -> list[tuple[list[int], list[int], list[int]]]:
    assert split is not None
    rows = [split.row(index) for index in range(split.rows)]
    return [(row.input_ids.tolist(), row.labels.tolist(), row.segments.tolist()) for row in rows]


def segments_of(split: TokenSplit | None) -> list[tuple[int, ...]]:
    """Every segment, whatever row it lies in."""
    found = []
    for ids, _, lengths in all_rows(split):
        ends = np.cumsum(lengths)
        found += [tuple(ids[end - length : end]) for end, length in zip(ends, lengths, strict=True)]
    return sorted(found)


def ready(settings: DataSettings, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> PreparedData:
    return prepare(settings, tokenizer, seed=seed, need_eval=settings.has_evaluation)


def test_rows_are_made_once_and_found_again(settings: MakeSettings, chat_tokenizer: PreTrainedTokenizerBase) -> None:
    stages: list[tuple[str, int, int]] = []
    first = prepare(settings(), chat_tokenizer, seed=0, need_eval=False, progress=lambda *seen: stages.append(seen))
    second = ready(settings(), chat_tokenizer)
    assert (first.built, second.built) == (True, False)
    assert first.train is not None
    assert first.train.rows == 40
    assert first.evaluation is None
    assert first.key == second.key
    assert first.files == second.files
    assert all_rows(first.train) == all_rows(second.train)
    assert {stage for stage, _, _ in stages} == {"read training", "tokenise training", "write train"}
    assert stages[-1] == ("write train", 40, 40)
    assert ready(settings(overwrite_cache=True), chat_tokenizer).built


@pytest.mark.parametrize(
    "changed",
    [
        {"cutoff_len": 30},
        {"max_samples": 7},
        {"train_on_prompt": True},
        {"mask_history": True},
        {"template": "alpaca"},
        {"packing": True},
        {"val_size": 0.1},
    ],
)
def test_every_setting_that_matters_is_in_the_key(
    settings: MakeSettings, chat_tokenizer: PreTrainedTokenizerBase, changed: dict[str, object]
) -> None:
    assert ready(settings(**changed), chat_tokenizer).key != ready(settings(), chat_tokenizer).key


def test_the_key_follows_rows_and_tokenizer_but_not_seed_or_place(
    settings: MakeSettings, make_tokenizer: MakeTokenizer, chatml: str, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(chat_template=chatml)
    first = ready(settings(), tokenizer)
    assert ready(settings(), tokenizer, seed=9).key == first.key
    moved = tmp_path / "moved.json"
    moved.write_bytes((tmp_path / "rows.json").read_bytes())
    assert ready(settings(dataset=str(moved)), tokenizer).key == first.key
    moved.write_text(moved.read_text().replace("fox", "dog"))
    assert ready(settings(dataset=str(moved)), tokenizer).key != first.key
    assert ready(settings(), make_tokenizer(marks=False, chat_template=chatml)).key != first.key
    tokenizer(["a", "bbb"], padding=False, truncation=True, max_length=2)
    assert ready(settings(), tokenizer).key == first.key


def test_a_damaged_cache_is_made_again(settings: MakeSettings, chat_tokenizer: PreTrainedTokenizerBase) -> None:
    first = ready(settings(), chat_tokenizer)
    expected = all_rows(first.train)
    file = first.folder / "train.arrow"
    file.write_bytes(file.read_bytes()[:-100])
    again = ready(settings(), chat_tokenizer)
    assert again.built
    assert all_rows(again.train) == expected


def test_several_data_sets_follow_each_other(
    settings: MakeSettings, chat_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(
        json.dumps({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]})
    )
    names = f"{tmp_path / 'rows.json'},{other}"
    both = ready(settings(dataset=names, max_samples=3), chat_tokenizer)
    assert both.train is not None
    assert both.train.rows == 4
    assert "user\nx<|im_end|>" in chat_tokenizer.decode(both.train.row(3).input_ids.tolist())


def test_val_size_splits_with_the_seed(settings: MakeSettings, chat_tokenizer: PreTrainedTokenizerBase) -> None:
    whole = segments_of(ready(settings(), chat_tokenizer).train)
    for val_size, count in ((0.1, 4), (7, 7)):
        split = ready(settings(val_size=val_size), chat_tokenizer)
        assert split.evaluation is not None
        assert split.evaluation.rows == count
        assert sorted(segments_of(split.train) + segments_of(split.evaluation)) == whole
        other = ready(settings(val_size=val_size), chat_tokenizer, seed=1)
        assert segments_of(other.evaluation) != segments_of(split.evaluation)
    with pytest.raises(Refused, match="leaves none"):
        ready(settings(val_size=40), chat_tokenizer)


def test_eval_dataset_stands_apart(
    settings: MakeSettings, chat_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps({"instruction": "x", "output": "y"}))
    data = ready(settings(eval_dataset=str(held)), chat_tokenizer)
    assert data.train is not None
    assert data.evaluation is not None
    assert (data.train.rows, data.evaluation.rows) == (40, 1)
    only = prepare(settings(eval_dataset=str(held)), chat_tokenizer, seed=0, need_train=False, need_eval=True)
    assert only.train is None
    with pytest.raises(Refused, match="no rows to evaluate on"):
        prepare(settings(), chat_tokenizer, seed=0, need_eval=True)


def test_packing_fills_rows_and_keeps_every_segment(
    settings: MakeSettings, chat_tokenizer: PreTrainedTokenizerBase
) -> None:
    loose = ready(settings(cutoff_len=200), chat_tokenizer)
    for key in ("packing", "neat_packing"):
        packed = ready(settings(cutoff_len=200, **{key: True}), chat_tokenizer)
        assert packed.train is not None
        assert loose.train is not None
        assert packed.train.rows < loose.train.rows
        assert packed.train.lengths.max() <= 200
        assert segments_of(packed.train) == segments_of(loose.train)
        assert packed.train.target_tokens == loose.train.target_tokens


def test_conversations_cut_by_a_forgetting_template_stay_on_one_side_of_the_split(
    settings: MakeSettings, make_tokenizer: MakeTokenizer, forgetting: str, tmp_path: Path
) -> None:
    talks = [{"instruction": f"second {n}", "output": "b", "history": [[f"first {n}", "a"]]} for n in range(10)]
    (tmp_path / "talks.json").write_text(json.dumps(talks))
    tokenizer = make_tokenizer(chat_template=forgetting)
    data = ready(settings(dataset=str(tmp_path / "talks.json"), val_size=3), tokenizer)
    assert data.train is not None
    assert data.evaluation is not None
    assert (data.train.rows, data.evaluation.rows) == (14, 6)
    assert any("10 conversations became 20 rows" in notice for notice in data.notices)
    texts = [tokenizer.decode(list(ids)) for ids in segments_of(data.evaluation)]
    numbers = [{n for n in range(10) if f"first {n}" in text}.pop() for text in texts]
    assert len(set(numbers)) == 3


def test_bad_rows_are_counted_and_shown_in_order(
    settings: MakeSettings, chat_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": ""}, {"instruction": 3, "output": "b"}]
    (tmp_path / "bad.json").write_text(json.dumps(rows * 4))
    data = ready(settings(dataset=str(tmp_path / "bad.json")), chat_tokenizer)
    assert data.bad_rows.count == 8
    assert [row.row for row in data.bad_rows.first] == [2, 3, 5, 6, 8]
    assert data.bad_rows.first[0].reason == "an answer is empty"
    assert ready(settings(dataset=str(tmp_path / "bad.json")), chat_tokenizer).bad_rows == data.bad_rows
    (tmp_path / "bad.json").write_text(json.dumps(rows[1:]))
    with pytest.raises(Refused, match=r"all 2 are unusable .*row 1: an answer is empty"):
        ready(settings(dataset=str(tmp_path / "bad.json")), chat_tokenizer)
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(Refused, match="is empty"):
        ready(settings(dataset=str(tmp_path / "bad.json")), chat_tokenizer)


def test_pretraining_keeps_documents_apart(
    settings: MakeSettings, make_tokenizer: MakeTokenizer, tmp_path: Path
) -> None:
    documents = ["the fox " * n for n in (1, 2, 40, 3, 5)]
    (tmp_path / "text.txt").write_text("\n".join(documents))
    tokenizer = make_tokenizer(bos=True)
    data = ready(settings(dataset=str(tmp_path / "text.txt"), stage="pt", cutoff_len=32), tokenizer)
    assert data.train is not None
    assert data.train.lengths.max() <= 32
    joined: list[int] = []
    whole = [[0, *tokenizer(text, add_special_tokens=False)["input_ids"], 1] for text in documents]
    expected = sorted(tuple(ids[start : start + 32]) for ids in whole for start in range(0, len(ids), 32))
    assert segments_of(data.train) == expected
    for ids, labels, _ in all_rows(data.train):
        assert ids == labels
        joined += ids
    assert data.train.target_tokens == len(joined) - len(expected)
    assert (data.template, data.template_jinja) == ("", "")


def test_several_processes_give_the_same_rows(
    settings: MakeSettings, chat_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [{"instruction": f"what is {n}?", "output": "" if n % 400 == 7 else f"{n}"} for n in range(1100)]
    (tmp_path / "many.json").write_text(json.dumps(rows))
    one = ready(settings(dataset=str(tmp_path / "many.json"), preprocessing_num_workers=1), chat_tokenizer)
    expected = (one.key, one.bad_rows, dict(one.files))
    two = ready(
        settings(dataset=str(tmp_path / "many.json"), preprocessing_num_workers=2, overwrite_cache=True), chat_tokenizer
    )
    assert two.built
    assert (two.key, two.bad_rows, dict(two.files)) == expected


def test_tokenized_path_is_written_then_used_and_checked(
    settings: MakeSettings, chat_tokenizer: PreTrainedTokenizerBase, make_tokenizer: MakeTokenizer, tmp_path: Path
) -> None:
    place = tmp_path / "tokens"
    first = ready(settings(tokenized_path=str(place)), chat_tokenizer)
    assert first.folder == place
    expected = all_rows(first.train)
    (tmp_path / "rows.json").rename(tmp_path / "gone.json")
    second = ready(settings(tokenized_path=str(place)), chat_tokenizer)
    assert not second.built
    assert all_rows(second.train) == expected
    with pytest.raises(Refused, match=r"another `cutoff_len` \(2048, now 9\), `mask_history` \(False, now True\)"):
        ready(settings(tokenized_path=str(place), cutoff_len=9, mask_history=True), chat_tokenizer)
    with pytest.raises(Refused, match="`tokenizer`"):
        ready(settings(tokenized_path=str(place)), make_tokenizer(marks=False))
    (place / "train.arrow").write_bytes(b"x")
    with pytest.raises(Refused, match="damaged"):
        ready(settings(tokenized_path=str(place)), chat_tokenizer)
    with pytest.raises(Refused, match="holds other files"):
        ready(settings(tokenized_path=str(tmp_path)), chat_tokenizer)


def test_what_a_saved_tokenizer_should_carry(settings: MakeSettings, plain_tokenizer: PreTrainedTokenizerBase) -> None:
    data = ready(settings(template="llama3"), plain_tokenizer)
    messages = [{"role": "user", "content": "Hi"}]
    prompt = plain_tokenizer.apply_chat_template(
        messages, chat_template=data.template_jinja, add_generation_prompt=True, tokenize=False
    )
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    assert prompt == f"<s>{header.format('user')}Hi<|eot_id|>{header.format('assistant')}"
    assert plain_tokenizer.convert_ids_to_tokens(list(data.stop_token_ids)) == ["<|eot_id|>"]


PROCESS = """
import sys
from transformers import PreTrainedTokenizerFast
from tunefleet.data.prepare import prepare
from tunefleet.data.settings import DataSettings
tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[1])
settings = DataSettings(dataset=(sys.argv[2],), cache_dir=sys.argv[3])
print("ready", flush=True)
sys.stdin.readline()
data = prepare(settings, tokenizer, seed=0, need_eval=False)
print(data.key, data.train.rows, int(data.train.row(39).input_ids.sum()), flush=True)
"""


def test_two_processes_at_once_prepare_the_same(
    settings: MakeSettings, chat_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    chat_tokenizer.save_pretrained(tmp_path / "tokenizer")
    command = [sys.executable, "-c", PROCESS, *(str(tmp_path / name) for name in ("tokenizer", "rows.json", "cache"))]
    environment = {"PYTHONPATH": str(Path(__file__).resolve().parents[2] / "platform"), "HF_HUB_OFFLINE": "1"}
    pair = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    for process in pair:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    answers = [process.communicate("go\n", timeout=60)[0] for process in pair]
    here = ready(settings(), chat_tokenizer)
    assert not here.built
    assert here.train is not None
    expected = f"{here.key} {here.train.rows} {int(here.train.row(39).input_ids.sum())}\n"
    assert answers == [expected, expected]


def test_importing_is_light() -> None:
    code = (
        "import sys, tunefleet.data.prepare, tunefleet.data.batches;"
        "print(*sorted({'transformers', 'datasets', 'ray'} & set(sys.modules)))"
    )
    environment = {"PYTHONPATH": str(Path(__file__).resolve().parents[2] / "platform")}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout == "\n"
