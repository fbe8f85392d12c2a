"""What a run came to, from what rank 0 returned or what its last attempt died of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunefleet.artifacts.folder import RunFolder
from tunefleet.errors import Refused, RunFailed
from tunefleet.worker.events import Noticed
from tunefleet.worker.failures import failures, last_failure


def ending_of(returned: object) -> dict[str, Any] | None:
    """What rank 0 returned; None where it failed."""
    return returned if isinstance(returned, dict) and "failed" not in returned else None


def news_of_a_move(ending: Mapping[str, Any]) -> Noticed:
    """What is told where an attempt left early, because the run must go on elsewhere."""
    return Noticed(f"Step {ending['step']}: {ending['moved']}; the run goes on in a new start.")


def summary_of(returned: object, error: Exception | None, folder: RunFolder, mark: str) -> dict[str, Any]:
    """The numbers of the run. Whatever made it leave, a run that goes on nowhere has stopped there, with a checkpoint.

    Args:
        returned: by rank 0, if it did.
        error: that ended the last attempt.
        mark: of the command.

    Raises:
        Refused: the workers found that the recipe cannot run.
        RunFailed: anything else went wrong.
    """
    ending = ending_of(returned)
    if ending is not None:
        return ending | {"stopped": ending["stopped"] or bool(ending["moved"])}
    failure = last_failure(failures(folder.record, mark))
    if failure is not None and failure.refused:
        raise Refused(failure.message)
    if isinstance(returned, dict) and returned.get("why"):
        raise RunFailed(str(returned["why"]))
    if failure is not None:
        raise RunFailed(f"The run failed at step {failure.step}: {failure.message}") from error
    raise RunFailed(f"The run failed without a word from its workers: {error}") from error
