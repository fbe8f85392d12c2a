"""The record of a run: exactly once, also after a kill -9 and a resume."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tunefleet.artifacts.metrics import METRICS, TIMING_FIELDS, Line, read_metrics
from tunefleet.artifacts.record import (
    ATTEMPTS,
    RECORD,
    RESULT,
    Recorder,
    read_attempts,
    write_record,
    write_result,
)
from tunefleet.training.step import Pace, Step

UPDATES = 23


def update(number: int) -> Step:
    """The update of that number in a run whose losses and token counts are uneven."""
    target_tokens = 0 if number == 7 else 3 + number * number % 11
    return Step(
        step=number,
        epoch=number / 8,
        loss=1 / 3 + 1 / number,
        learning_rate=1e-4 / number,
        grad_norm=0.1 * number,
        tokens=target_tokens + 5,
        target_tokens=target_tokens,
        seconds=0.5,
        tokens_per_second=1.0,
        mfu=0.25,
        stopped=False,
        pace=Pace(100, 0.01, 0.05),
    )


def record(
    folder: Path, start: int = 0, end: int = UPDATES, state: dict[str, object] | None = None
) -> dict[str, object]:
    """Record the updates after `start` up to `end`, with evaluations; returns the last state."""
    with Recorder(folder, start, logging_steps=5, updates=UPDATES, world_size=2, state=state) as recorder:
        for number in range(start + 1, end + 1):
            recorder.step(update(number))
            if number % 4 == 0:
                recorder.evaluation(number, number / 8, 2.0 + (number - 12) ** 2)
        return dict(recorder.state())


def without_times(lines: list[Line]) -> list[Line]:
    return [{key: value for key, value in line.items() if key not in TIMING_FIELDS} for line in lines]


def test_a_line_is_the_mean_over_the_tokens_since_the_line_before(tmp_path: Path) -> None:
    record(tmp_path)
    lines = [line for line in read_metrics(tmp_path / METRICS) if "loss" in line]
    assert [line["step"] for line in lines] == [5, 10, 15, 20, 23]
    steps = [update(number) for number in range(6, 11)]
    targets = sum(step.target_tokens for step in steps)
    assert lines[1]["loss"] == pytest.approx(sum(step.loss * step.target_tokens for step in steps) / targets, rel=1e-12)
    assert lines[1]["grad_norm"] == 1.0
    assert lines[1]["tokens"] == sum(update(number).tokens for number in range(1, 11))
    assert lines[1]["tokens_per_second"] == pytest.approx(sum(step.tokens for step in steps) / 2.5)
    assert lines[1]["mfu"] == pytest.approx(0.25)


@pytest.mark.parametrize("interrupted", [1, 4, 7, 12, 20, 22])
def test_a_resumed_run_has_the_lines_of_the_uninterrupted_one(tmp_path: Path, interrupted: int) -> None:
    whole = record(tmp_path / "whole")
    saved = record(tmp_path / "resumed", end=interrupted)
    # Work after the checkpoint, lost with its process.
    record(tmp_path / "resumed", interrupted, min(interrupted + 6, UPDATES), saved)
    resumed = record(tmp_path / "resumed", interrupted, UPDATES, json.loads(json.dumps(saved)))
    assert read_metrics(tmp_path / "resumed" / METRICS) == read_metrics(tmp_path / "whole" / METRICS)
    assert resumed == whole


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    whole = record(tmp_path / "whole")
    saved = record(tmp_path / "torn", end=12)
    with (tmp_path / "torn" / METRICS).open("a", encoding="utf-8") as file:
        file.write('{"step": 15, "lo')
    assert record(tmp_path / "torn", 12, UPDATES, saved) == whole
    assert read_metrics(tmp_path / "torn" / METRICS) == read_metrics(tmp_path / "whole" / METRICS)


def test_lines_survive_a_kill(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from tunefleet.artifacts.record import Recorder; "
        "recorder = Recorder(Path(sys.argv[1]), logging_steps=1, updates=9, world_size=1); "
        "recorder.evaluation(3, 0.5, 2.5); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", script, tmp_path], check=False)
    assert killed.returncode == -9
    assert read_metrics(tmp_path / METRICS) == [{"step": 3, "epoch": 0.5, "eval_loss": 2.5}]
    assert curves(tmp_path)["eval/loss"] == [(3, 2.5)]
    record(tmp_path, end=2)
    first, second = read_attempts(tmp_path)
    assert first["reason"] == "killed"
    assert (second["executed_steps"], second["start_step"], second["reason"]) == (2, 0, "stopped")


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Every curve as TensorBoard reads it."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    saved = record(tmp_path, end=12)
    record(tmp_path, 12, 18, saved)
    record(tmp_path, 12, UPDATES, saved)
    shown = curves(tmp_path)
    lines = read_metrics(tmp_path / METRICS)
    assert [step for step, _ in shown["train/loss"]] == [5, 10, 15, 20, 23]
    assert [step for step, _ in shown["eval/loss"]] == [4, 8, 12, 16, 20]
    assert [value for _, value in shown["train/loss"]] == pytest.approx(
        [line["loss"] for line in lines if "loss" in line]
    )
    assert set(shown) >= {"train/learning_rate", "train/grad_norm", "train/tokens_per_second"}


def test_a_page_left_open_starts_over_after_a_resume(tmp_path: Path) -> None:
    saved = record(tmp_path, end=12)
    record(tmp_path, 12, 18, saved)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [one.step for one in events.Scalars("train/loss")] == [5, 10, 15]
    time.sleep(1.1)  # event files are named by the second
    record(tmp_path, 12, UPDATES, saved)
    events.Reload()
    assert [one.step for one in events.Scalars("train/loss")] == [5, 10, 15, 20, 23]


def test_no_events_where_none_are_asked_for(tmp_path: Path) -> None:
    Recorder(tmp_path, logging_steps=1, updates=1, world_size=1, tensorboard=False).close("finished")
    assert not (tmp_path / "tensorboard").exists()


def test_attempts_say_what_was_executed(tmp_path: Path) -> None:
    saved = record(tmp_path, end=12)
    record(tmp_path, 12, UPDATES, saved)
    first, second = read_attempts(tmp_path)
    assert [first[key] for key in ("attempt", "start_step", "executed_steps", "end_step")] == [1, 0, 12, 12]
    assert [second[key] for key in ("attempt", "start_step", "executed_steps", "end_step")] == [2, 12, 11, 23]
    assert (first["reason"], second["reason"], second["world_size"]) == ("stopped", "finished", 2)
    assert second["pid"] == os.getpid()


def test_an_error_is_the_reason_of_its_attempt(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, logging_steps=1, updates=3, world_size=1)

    def fail() -> None:
        with recorder:
            recorder.step(update(1))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert read_attempts(tmp_path)[0]["reason"] == "failed: ZeroDivisionError"
    assert not (tmp_path / RESULT).exists()


def test_a_lost_metrics_file_is_noticed(tmp_path: Path) -> None:
    saved = record(tmp_path, end=12)
    (tmp_path / METRICS).unlink()
    recorder = Recorder(tmp_path, 12, logging_steps=5, updates=UPDATES, world_size=1, state=saved)
    recorder.close("stopped")
    assert "0 lines up to step 12 and the checkpoint counted 5" in recorder.notices[0]


def test_a_state_of_other_fields_is_refused(tmp_path: Path) -> None:
    saved = record(tmp_path, end=5)
    del saved["loss"]
    with pytest.raises(ValueError, match="'loss'"):
        Recorder(tmp_path, 5, logging_steps=5, updates=9, world_size=1, state=saved)


def test_the_best_evaluation_is_known_after_a_resume(tmp_path: Path) -> None:
    saved = record(tmp_path, end=14)
    recorder = Recorder(tmp_path, 14, logging_steps=5, updates=UPDATES, world_size=1, state=saved)
    assert recorder.best_step == 12
    assert not recorder.evaluation(16, 2.0, 9.0)
    assert recorder.evaluation(20, 2.5, 1.0)
    assert recorder.summary()["best_step"] == 20
    recorder.close("stopped")


def test_what_is_not_finite_is_valid_json(tmp_path: Path) -> None:
    with Recorder(tmp_path, logging_steps=1, updates=1, world_size=1) as recorder:
        recorder.evaluation(1, 1.0, math.inf)
    assert json.loads((tmp_path / METRICS).read_text(), parse_constant=pytest.fail)["eval_loss"] is None


def test_the_result_holds_numbers_and_fingerprints(tmp_path: Path) -> None:
    with Recorder(tmp_path, logging_steps=5, updates=4, world_size=1) as recorder:
        for number in range(1, 5):
            recorder.step(update(number))
        write_result(tmp_path, recorder.summary(), {"weights": "ab"})
    result = json.loads((tmp_path / RESULT).read_text())
    assert (result["step"], result["executed_steps"], result["attempts"]) == (4, 4, 1)
    assert result["tokens_per_second"] == pytest.approx(result["tokens"] / 2.0)
    assert result["fingerprints"] == {"weights": "ab"}
    assert result["versions"]["torch"]


def test_the_record_repeats_the_run_and_keeps_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hunter2")
    recipe = {
        "seed": 3,
        "ray_init_kwargs": {"runtime_env": {"env_vars": {"KEY": "hunter2"}}, "_redis_password": "hunter2"},
    }
    command = ["tunefleet", "train", "my recipe.yaml"]
    write_record(
        tmp_path, recipe=recipe, plan={"updates": 9}, command=command, seeds={"seed": 3}, hashes={"data": "cd"}
    )
    text = (tmp_path / RECORD).read_text()
    written = json.loads(text)
    assert "hunter2" not in text
    assert (written["recipe"]["seed"], written["plan"]["updates"], written["command"]) == (3, 9, command)
    assert written["hashes"] == {"data": "cd"}
    assert written["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert written["host"]["cpus"] >= 1


def test_attempts_are_whole_lines(tmp_path: Path) -> None:
    record(tmp_path)
    assert (tmp_path / ATTEMPTS).read_text().count("\n") == 1
