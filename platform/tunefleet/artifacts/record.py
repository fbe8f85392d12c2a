"""The record of a run, kept by rank 0 while the run goes on. Its folder holds

record.json     recipe, plan, command, versions, hashes, seeds: what repeats the run
metrics.jsonl   a line for each logged step and each evaluation, each exactly once
tensorboard/    the same as curves
mlflow.json     the run's name at MLflow, where it is asked for; wandb.json likewise
attempts.jsonl  a line for each time that workers started: from which step, how many steps they took, how it ended
result.json     final numbers and fingerprints; there exactly when the run is finished
lineage.json    of a trial that took over another's state: from which, at which step, with which values
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

from tunefleet.artifacts.metrics import METRICS, WORKERS, Line, dump, rewind
from tunefleet.artifacts.surroundings import git_commit, host_facts, versions
from tunefleet.artifacts.trackers.delivery import Delivery
from tunefleet.artifacts.trackers.tracker import End, Tracker
from tunefleet.secret_names import is_secret
from tunefleet.storage import place

if TYPE_CHECKING:
    from tunefleet.artifacts.curves import Curves
    from tunefleet.training.step import Step

RECORD = "record.json"
ATTEMPTS = "attempts.jsonl"
RESULT = "result.json"
LINEAGE = "lineage.json"
TENSORBOARD = "tensorboard"
Json = Mapping[str, object]


@dataclass
class Sums:
    """What has run up, since the last logged line and since the run began. A checkpoint carries it as plain JSON."""

    loss: float = 0.0
    """Sum of the token losses since the last line."""
    target_tokens: int = 0
    """Tokens that this sum is over."""
    line_tokens: int = 0
    """Real tokens since the last line."""
    line_seconds: float = 0.0
    line_mfu_seconds: float | None = 0.0
    """Utilisation times seconds since the last line; None where the hardware's peak is unknown."""
    tokens: int = 0
    """Real tokens since the run began, over all attempts that count."""
    seconds: float = 0.0
    lines: int = 0
    """Lines in metrics.jsonl."""
    last_loss: float | None = None
    eval_loss: float | None = None
    first_eval_loss: float | None = None
    best_step: int | None = None
    best_eval_loss: float | None = None

    def add(self, step: Step) -> None:
        """Take one update in."""
        self.loss += step.loss * step.target_tokens
        self.target_tokens += step.target_tokens
        self.line_tokens += step.tokens
        self.line_seconds += step.seconds
        if step.mfu is None or self.line_mfu_seconds is None:
            self.line_mfu_seconds = None
        else:
            self.line_mfu_seconds += step.mfu * step.seconds
        self.tokens += step.tokens
        self.seconds += step.seconds

    def line(self, step: Step, measurements: Mapping[str, float], workers: Mapping[str, Sequence[float]]) -> Line:
        """The line of a logged step: the mean over every target token since the line before; then start anew.

        `learning_rate`, `grad_norm` and the method's measurements are those of this update, `tokens` counts from the
        run's beginning.
        """
        seconds, mfu_seconds = self.line_seconds, self.line_mfu_seconds
        self.last_loss = self.loss / self.target_tokens if self.target_tokens else None
        written: Line = {
            "step": step.step,
            "epoch": step.epoch,
            "loss": self.last_loss,
            "learning_rate": step.learning_rate,
            "grad_norm": step.grad_norm,
            "tokens": self.tokens,
            "tokens_per_second": self.line_tokens / seconds if seconds else None,
            "mfu": mfu_seconds / seconds if seconds and mfu_seconds is not None else None,
            "seconds": self.seconds,
            **measurements,
            **({WORKERS: {figure: list(values) for figure, values in workers.items()}} if workers else {}),
        }
        self.loss, self.target_tokens, self.line_tokens, self.line_seconds, self.line_mfu_seconds = 0.0, 0, 0, 0.0, 0.0
        self.lines += 1
        return written


class Recorder:
    """Keeps metrics, curves and the list of attempts of a run, on local disk.

    Everything of a step (its evaluation too) is recorded before the checkpoint of that step is saved, with `state()`
    inside it. A new recorder with that step and state goes back to exactly there. As a context manager it notes how the
    attempt ended; a process that was killed is noted by the next one.
    """

    def __init__(
        self,
        folder: Path,
        resume_step: int = 0,
        *,
        logging_steps: int,
        updates: int,
        world_size: int,
        state: Json | None = None,
        tensorboard: bool = True,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        """Open the record at `resume_step`.

        Args:
            folder: made if missing.
            resume_step: updates done by the checkpoint that this attempt starts from; 0 at the beginning.
            logging_steps: updates from line to line; the last update has a line in any case.
            updates: updates of the whole run.
            world_size: workers of this attempt.
            state: what `state` returned at `resume_step`; None at the beginning.
            tensorboard: whether to write events.
            trackers: where else the lines go.
        """
        self.notices: list[str] = []
        self.executed = 0
        self._folder, self._last_step = folder, resume_step
        self._logging_steps, self._updates = logging_steps, updates
        self._sums = _restored(state)
        folder.mkdir(parents=True, exist_ok=True)
        # Whoever brings no state begins: lines of an attempt that never came to a checkpoint are not part of the run.
        history = rewind(folder / METRICS, -1 if state is None else resume_step)
        self._expect(len(history), resume_step)
        self._file = (folder / METRICS).open("a", encoding="utf-8")
        self._curves = self._open_curves(history) if tensorboard else None
        self._deliveries = [Delivery(tracker, history) for tracker in trackers]
        self._attempts = _begin_attempt(folder, resume_step, world_size)
        self._save_attempts()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.close(f"failed: {kind.__name__}")
        elif not self._file.closed:
            self.close("finished" if self._last_step >= self._updates else "stopped")

    @property
    def best_step(self) -> int | None:
        """The step with the lowest evaluation loss so far (the first of equals)."""
        return self._sums.best_step

    def step(
        self,
        step: Step,
        measure: Callable[[], Mapping[str, float]] = dict,
        workers: Mapping[str, Sequence[float]] | None = None,
    ) -> Line | None:
        """Take an update in. Returns the line that was written, if this step has one.

        Args:
            measure: called for the method's own figures of this update, if it has a line.
            workers: for each figure of the workers since the line before one number for each rank, if it has a line.
        """
        self.executed += 1
        self._last_step = step.step
        self._sums.add(step)
        if not has_line(step.step, self._logging_steps, self._updates):
            return None
        line = self._sums.line(step, measure(), workers or {})
        self._write(line)
        return line

    def evaluation(self, step: int, epoch: float, eval_loss: float) -> bool:
        """Write an evaluation's line. Returns whether it is the best so far."""
        sums = self._sums
        sums.lines += 1
        self._write({"step": step, "epoch": epoch, "eval_loss": eval_loss})
        sums.eval_loss = eval_loss
        if sums.first_eval_loss is None:
            sums.first_eval_loss = eval_loss
        # The model before its first step is a yardstick, and no checkpoint holds it.
        better = step > 0 and (sums.best_eval_loss is None or eval_loss < sums.best_eval_loss)
        if better:
            sums.best_step, sums.best_eval_loss = step, eval_loss
        return better

    def state(self) -> dict[str, int | float | None]:
        """What a checkpoint of the step just recorded must carry: plain JSON, floats in full precision."""
        self._save_attempts()
        return asdict(self._sums)

    def summary(self) -> dict[str, int | float | None]:
        """The run's numbers so far, over all attempts that count."""
        sums = self._sums
        return {
            "step": self._last_step,
            "updates": self._updates,
            "loss": sums.last_loss,
            "eval_loss": sums.eval_loss,
            "first_eval_loss": sums.first_eval_loss,
            "best_step": sums.best_step,
            "best_eval_loss": sums.best_eval_loss,
            "tokens": sums.tokens,
            "seconds": sums.seconds,
            "tokens_per_second": sums.tokens / sums.seconds if sums.seconds else None,
            "attempts": len(self._attempts),
            "executed_steps": self.executed,
        }

    def complaints(self) -> list[str]:
        """What has gone wrong at trackers since the last time."""
        return [text for delivery in self._deliveries for text in delivery.complaints()]

    def close(self, reason: str) -> None:
        """Note how this attempt ended (`finished`, `stopped` or `failed: ...`), and close the files."""
        self._attempts[-1] |= {"reason": reason, "ended": _now()}
        self._save_attempts()
        self._file.close()
        if self._curves is not None:
            self._curves.close()
        end: End = "finished" if reason == "finished" else "stopped" if reason == "stopped" else "failed"
        for delivery in self._deliveries:
            delivery.close(end)

    def _write(self, line: Line) -> None:
        self._file.write(dump(line))
        self._file.flush()
        if self._curves is not None:
            self._curves.write(line)
        for delivery in self._deliveries:
            delivery.write(line)

    def _open_curves(self, history: list[Line]) -> Curves:
        from tunefleet.artifacts.curves import Curves  # a quarter of a second, which a run without does not pay

        return Curves(self._folder / TENSORBOARD, history)

    def _expect(self, found: int, resume_step: int) -> None:
        """A record that was lost does not stop the run that it is of, but someone should know."""
        if found != self._sums.lines:
            self.notices.append(
                f"{METRICS} holds {found} lines up to step {resume_step} and the checkpoint counted "
                f"{self._sums.lines}: the others are lost."
            )
            self._sums.lines = found

    def _save_attempts(self) -> None:
        self._attempts[-1] |= {"executed_steps": self.executed, "end_step": self._last_step}
        text = "".join(json.dumps(attempt) + "\n" for attempt in self._attempts)
        place(self._folder / ATTEMPTS).write_text(text)


def has_line(step: int, logging_steps: int, updates: int) -> bool:
    """Whether a line is written for an update: every so many, and the last in any case."""
    return step % logging_steps == 0 or step == updates


def read_attempts(folder: Path) -> list[dict[str, object]]:
    """The attempts of a run, oldest first; none where it never started.

    Fields: attempt (from 1), start_step, world_size, pid, host, started, executed_steps, end_step, reason, ended. Those
    of a killed attempt say what was known at its last checkpoint.
    """
    file = folder / ATTEMPTS
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def _begin_attempt(folder: Path, start_step: int, world_size: int) -> list[dict[str, object]]:
    earlier = read_attempts(folder)
    for attempt in earlier:
        if attempt["reason"] == "running":
            attempt["reason"] = "killed"
    now: dict[str, object] = {
        "attempt": len(earlier) + 1,
        "start_step": start_step,
        "world_size": world_size,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": _now(),
        "reason": "running",
    }
    return [*earlier, now]


def _restored(state: Json | None) -> Sums:
    """The sums of a checkpoint.

    Raises:
        ValueError: a field is missing or unknown.
    """
    if state is None:
        return Sums()
    names = {field.name for field in fields(Sums)}
    if set(state) != names:
        raise ValueError(f"the recorder's state has other fields than expected: {sorted(names ^ set(state))}")
    return Sums(**cast(dict[str, Any], dict(state)))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_record(
    folder: Path,
    *,
    recipe: Json,
    plan: Json,
    command: Sequence[str] | str,
    seeds: Mapping[str, int],
    hashes: Mapping[str, str],
) -> None:
    """Write `record.json`: what is needed to run it again and to know what it ran on.

    Args:
        recipe: every key, resolved.
        hashes: fingerprints of what went in, by name (data, base weights, tokenizer, ...).
        command: what repeats the run.
    """
    record = {
        "command": command,
        "recipe": recipe,
        "plan": plan,
        "seeds": dict(seeds),
        "hashes": dict(hashes),
        "versions": versions(),
        "git_commit": git_commit(Path.cwd()),
        "host": host_facts(),
        "written": _now(),
    }
    place(folder / RECORD).write_text(json.dumps(without_secrets(record), indent=2) + "\n")


def write_result(folder: Path, summary: Json, fingerprints: Mapping[str, str]) -> dict[str, object]:
    """Write `result.json`, whose presence says that the run is finished, and return what it holds.

    Args:
        summary: the final numbers (`Recorder.summary` and what else is worth keeping).
        fingerprints: of final weights, optimizer, random and data state, by name.
    """
    result: dict[str, object] = {**summary, "fingerprints": dict(fingerprints), "versions": versions()}
    place(folder / RESULT).write_text(json.dumps(result, indent=2) + "\n")
    return result


def without_secrets(value: object) -> object:
    """The same value with what `env_vars` and keys named like secrets hold left out, at any depth."""
    if isinstance(value, Mapping):
        return {key: "(not recorded)" if _is_secret(str(key)) else without_secrets(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(one) for one in value]
    return value


def _is_secret(key: str) -> bool:
    return key == "env_vars" or is_secret(key)
