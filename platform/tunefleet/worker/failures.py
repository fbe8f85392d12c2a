"""What an attempt died of, so that the next one knows whether to try again.

Ray Train starts the workers anew after any exception, up to `max_failures` times. An error that would only come again
is not worth that: a refusal, or the same exception at the same step twice. Then the new attempt ends at once. What a
rank says because another one was lost is an echo and says nothing of the next attempt.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch.distributed as dist

from tunefleet.errors import LONGEST_REASON, PeerFailed, Refused, RunFailed, first_line
from tunefleet.storage import Place
from tunefleet_strategies.errors import StrategyError

_LOST_CONNECTION = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed")
_FULL = frozenset({errno.ENOSPC, errno.EFBIG, errno.EDQUOT})
_FULL_TEXT = re.compile(rf"\(os error ({'|'.join(map(str, sorted(_FULL)))})\)|PytorchStreamWriter failed writing")


@dataclass(frozen=True)
class Failure:
    """How one rank's attempt ended."""

    attempt: int
    """Counts the attempts that left a failure, from 1."""
    rank: int
    step: int
    """Updates applied before it."""
    kind: str
    message: str
    refused: bool
    """Whether the recipe is at fault."""
    final: bool
    """Whether it would only come again."""
    echo: bool = False
    """Whether it only says that another rank was lost."""

    @property
    def out_of_memory(self) -> bool:
        """Whether memory was too small: on a GPU torch has an exception for that, on a CPU it says so in words."""
        return self.kind.endswith("MemoryError") or "can't allocate memory" in self.message

    def repeats(self, other: Failure) -> bool:
        """Whether this is the same error at the same step."""
        same = (self.step, self.kind, self.message) == (other.step, other.kind, other.message)
        return same and not self.echo


def describe_failure(error: Exception, attempt: int, rank: int, step: int) -> Failure:
    """An exception as data."""
    refused = isinstance(error, Refused | StrategyError)
    if not refused and disk_is_full(error):
        said = first_line(error, LONGEST_REASON)
        error = RunFailed(
            f"The worker's disk takes no more ({said}): make room on it, or lower save_total_limit; older "
            "checkpoints are whole, and the same command goes on from the newest."
        )
    known = refused or isinstance(error, RunFailed)
    message = str(error) if known else f"{type(error).__name__}: {error}"
    return Failure(attempt, rank, step, type(error).__name__, message, refused, final=known, echo=is_echo(error))


def is_echo(error: Exception) -> bool:
    """Whether an error only says that another rank was lost: what `Seat` or torch's collectives raise then."""
    if isinstance(error, PeerFailed | dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _LOST_CONNECTION)


def disk_is_full(error: BaseException) -> bool:
    """Whether a file could not grow: the disk is full, or a limit on files or on a user's share of it is reached.

    The writers of tensors know no errno: it stands in their text, or in the error that they hide.
    """
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    if _FULL_TEXT.search(str(error)):
        return True
    hidden = error.__cause__ or error.__context__
    return hidden is not None and disk_is_full(hidden)


def record_failure(record: Place, mark: str, failure: Failure) -> None:
    """Keep a failure in a file of its own: several ranks may fail at once."""
    name = f"{failure.attempt:04d}_{failure.rank:04d}.json"
    notes_of(record, mark).child(name).write_text(json.dumps(asdict(failure), indent=2))


def failures(record: Place, mark: str) -> list[Failure]:
    """All failures since the command of this mark was given, oldest attempt first, each attempt's lowest rank first."""
    files = [file for file in notes_of(record, mark).children() if file.name.endswith(".json")]
    return [Failure(**json.loads(file.read_text())) for file in sorted(files, key=lambda file: file.name)]


def last_failure(past: Sequence[Failure]) -> Failure | None:
    """The newest attempt's failure: the one that was foreseen if there is one, else the lowest rank's own."""
    newest = [failure for failure in past if failure.attempt == past[-1].attempt]
    return min(newest, key=lambda failure: (not failure.final, failure.echo, failure.rank), default=None)


def notes_of(record: Place, mark: str) -> Place:
    """Where failures are kept, of this command alone: workers that outlived another one may still fail."""
    return record.child("failures", mark)


def hopeless(past: Sequence[Failure]) -> bool:
    """Whether another attempt is no use."""
    last = last_failure(past)
    if last is None or last.final:
        return last is not None
    return any(last.repeats(failure) for failure in past if failure.attempt < last.attempt)
