"""What is asked of each side, and what is read from the files it leaves."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from beside.commands import Timed
from beside.sides import packed_length, read_ours, read_peer, sides
from beside.work import Work

WORK = Work(
    base=Path("base"),
    adapter=Path("adapter"),
    data=Path("data"),
    steps=2,
    epoch_tokens=6500,
    tokens_of_step=(600, 700),
    padded_of_step=(1600, 1700),
    longest=200,
    parameters=1000,
)
LINES = ("{'loss': '9.1', 'epoch': '0.5'}", "{'loss': '9.0', 'epoch': '1'}", "{'train_runtime': '4'}")
TIMED = Timed(30.0, tuple(zip((11.0, 14.0, 15.0), LINES, strict=True)))


def trainer_state(folder: Path, tokens: int) -> Path:
    history = [{"loss": 9.1, "grad_norm": 2.0}, {"loss": 9.0, "grad_norm": 1.0}, {"train_runtime": 4.0}]
    file = folder / "trainer_state.json"
    file.write_text(json.dumps({"log_history": history, "num_input_tokens_seen": tokens}))
    return file


def test_the_sides_take_turns_and_a_packed_row_is_as_large_as_a_step() -> None:
    asked = sides(WORK)
    assert [side.is_peer for side in asked] == [True, False, True, False]
    assert packed_length(WORK) == 656  # a multiple of 8 just over the mean step of 650 tokens
    assert asked[2].settings["cutoff_len"] == 656


def test_no_row_is_longer_than_the_packed_rows() -> None:
    long_tail = replace(WORK, longest=904)
    assert packed_length(long_tail) > 904


def test_the_peer_is_read_by_its_log_lines_and_its_own_state(tmp_path: Path) -> None:
    run = read_peer(sides(WORK)[0], TIMED, trainer_state(tmp_path, 1300), WORK)
    assert run.step_seconds == (3.0,)
    assert run.tokens == 1300
    assert run.losses == (9.1, 9.0)
    assert run.grad_norms == (2.0, 1.0)


def test_the_tokens_of_packed_rows_are_their_mean_over_the_epoch(tmp_path: Path) -> None:
    packed = replace(TIMED, lines=((2.0, "[INFO] >>   Num examples = 10"), *TIMED.lines))
    run = read_peer(sides(WORK)[2], packed, trainer_state(tmp_path, 0), WORK)
    assert run.step_tokens == (650.0, 650.0)


def test_a_peer_that_read_other_tokens_is_not_compared(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="1299 tokens where 1300"):
        read_peer(sides(WORK)[0], TIMED, trainer_state(tmp_path, 1299), WORK)


def test_our_steps_are_read_from_metrics_without_evaluations(tmp_path: Path) -> None:
    step = {"step": 1, "loss": 9.0, "grad_norm": 1.5, "tokens": 600, "seconds": 2.0}
    file = tmp_path / "metrics.jsonl"
    file.write_text(json.dumps(step) + "\n" + json.dumps({"step": 1, "eval_loss": 8.0}) + "\n")
    run = read_ours(TIMED, file)
    assert run.step_seconds == (2.0,)
    assert run.losses == (9.0,)
    assert run.tokens == 600
