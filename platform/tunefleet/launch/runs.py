"""Whether a command starts a run, continues it, or must leave it alone; and its folder made ready for that."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import JsonValue

from tunefleet.artifacts.claim import claim_run
from tunefleet.artifacts.folder import RunFolder
from tunefleet.artifacts.metrics import METRICS
from tunefleet.artifacts.record import LINEAGE, RECORD, RESULT, without_secrets
from tunefleet.checkpoints import forget_after, newest_complete, step_of
from tunefleet.continuation import differences, mathematics
from tunefleet.errors import Refused
from tunefleet.hardware import on_network
from tunefleet.launch.home import refuse_unwritable
from tunefleet.plan import Plan
from tunefleet.storage import Place, place

_MATHEMATICS, PLAN, _ORIGIN = "mathematics.json", "plan.json", "origin.json"

# Ray's own notes on checkpoints. They go before each start: ours decide, and Ray refuses to start where its notes name
# a checkpoint that retention has removed.
_RAY_NOTES = "checkpoint_manager_snapshot.json"


@contextmanager
def claimed(folder: RunFolder) -> Iterator[str]:
    """Hold a run against a second driver on the same machine; sweep up what killed workers left half written.

    The lock is the system's, so it ends with its process, however that ends. Against a driver on another machine there
    is no lock: there the one that came last has the run (`artifacts/claim.py`). Yields the mark of this command.

    Raises:
        Refused: another process is running it.
    """
    local = folder.root.local_path
    if local is None:
        yield claim_run(folder.claim)
        return
    refuse_unwritable(local, "ray_storage_path")
    lock = FileLock(_lock_file(local))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise Refused(
            f"The run {local.name} is being run by another process: wait for it, or choose another ray_run_name."
        ) from error
    try:
        mark = claim_run(folder.claim)
        folder.scratch.delete()
        yield mark
    finally:
        folder.scratch.delete()
        lock.release()


def _lock_file(run: Path) -> Path:
    """Where a run is locked: beside it, or on this machine where its disk is another's.

    There a lock would outlast the machine that died with it, and would not be needed: see `claimed`.
    """
    if not on_network(run):
        return run / ".lock"
    return Path(tempfile.gettempdir()) / f"tunefleet-{hashlib.sha256(str(run).encode()).hexdigest()[:32]}.lock"


def open_run(plan: Plan, folder: RunFolder) -> list[str]:
    """Make a run's folder ready to start or to be continued. Returns notices.

    Raises:
        Refused: the run is finished, the recipe is not the one that it was started with, or the checkpoint that the
            recipe names is none.
    """
    run, finished = plan.recipe.run, folder.finished()
    if finished and not run.overwrite_output_dir:
        raise Refused(
            f"The run {plan.place.run_name} is finished ({folder.root.uri}): write overwrite_output_dir: true to "
            f"run it anew, or choose another output_dir or ray_run_name."
        )
    if run.resume_from_checkpoint is True and not _can_continue(plan, folder, finished):
        raise Refused(
            f"resume_from_checkpoint: true, but {folder.root.uri} is no unfinished run with a checkpoint: leave the "
            f"key out to start."
        )
    notices: list[str] = []
    origin = _named_checkpoint(plan)
    started = folder.record.child(_MATHEMATICS).exists()
    if not (started or finished or origin is not None or run.resume_from_checkpoint is False):
        _refuse_nameless_checkpoints(plan, folder)
    if origin is not None and (finished or not _began_from(folder, origin)):
        _begin_from(origin, plan, folder, started)
    elif finished or run.resume_from_checkpoint is False:
        _clear(folder)
    elif started:
        notices = _continue(plan, folder)
    clear_notes(folder)
    folder.record.child(_MATHEMATICS).write_text(json.dumps(mathematics(plan), indent=2))
    folder.record.child(PLAN).write_text(json.dumps(without_secrets(plan.model_dump(mode="json")), indent=2))
    return notices


def hand_down(donor: RunFolder, heir: RunFolder, plan: Plan, may_change: frozenset[str], came: JsonValue) -> None:
    """Make the record of a run one that goes on from where another run stands, under a plan of its own.

    `metrics.jsonl` becomes the donor's, as the model's history is now; `lineage.json` says how it came here.

    Args:
        may_change: keys that may differ from the donor's; what says otherwise "was started with other values".
        came: the newest entry of the lineage.

    Raises:
        Refused: another key differs.
    """
    recorded: dict[str, object] = json.loads(donor.record.child(_MATHEMATICS).read_text())
    now: dict[str, object] = json.loads(json.dumps(mathematics(plan)))
    others = {key: value for key, value in now.items() if key not in may_change}
    changed = differences({key: value for key, value in recorded.items() if key not in may_change}, others)
    if changed:
        raise Refused(
            f"The run {heir.root.name} cannot go on from {donor.root.name} with other values ({'; '.join(changed)}): "
            f"only {', '.join(sorted(may_change))} may change."
        )
    lineage = _lineage(donor)
    for name in (RECORD, RESULT):
        heir.record.child(name).delete()
    for name, text in (
        (METRICS, donor.record.child(METRICS).read_text()),
        (LINEAGE, json.dumps([*lineage, came], indent=1)),
        (_MATHEMATICS, json.dumps(now, indent=2)),
        (PLAN, json.dumps(without_secrets(plan.model_dump(mode="json")), indent=2)),
    ):
        heir.record.child(name).write_text(text)


def _lineage(folder: RunFolder) -> list[JsonValue]:
    note = folder.record.child(LINEAGE)
    kept: list[JsonValue] = json.loads(note.read_text()) if note.exists() else []
    return kept


def clear_notes(folder: RunFolder) -> None:
    """Take away what Ray noted of checkpoints and what attempts noted of their failures, before a new start."""
    for leftover in (folder.root.child(_RAY_NOTES), folder.record.child("failures")):
        leftover.delete()


def _can_continue(plan: Plan, folder: RunFolder, finished: bool) -> bool:
    return plan.resumable and not finished and newest_complete(folder.checkpoints)[0] is not None


def _continue(plan: Plan, folder: RunFolder) -> list[str]:
    if not plan.resumable:
        _clear(folder)
        return [f"The unfinished run {plan.place.run_name} keeps nothing to go on from and begins anew."]
    newest, notices = newest_complete(folder.checkpoints)
    if newest is None and _changed(plan, folder):
        _clear(folder)
        return [*notices, f"The unfinished run {plan.place.run_name} has no checkpoint: it begins anew, as changed."]
    _refuse_differences(plan, folder)
    if newest is None:
        return notices
    goes_on = f"The run {plan.place.run_name} goes on from step {step_of(newest)}."
    return [*notices, goes_on, *_other_rounding(plan, folder)]


def _other_rounding(plan: Plan, folder: RunFolder) -> list[str]:
    """A word on what lets sums be rounded otherwise than before: bit-identity holds at one number of threads."""
    record = folder.record.child(PLAN)
    try:
        before = json.loads(record.read_text())["workers"]["threads"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return []
    now = plan.workers.threads
    if before == now:
        return []
    return [
        f"Each worker has {now} thread(s), and had {before} before: sums are rounded otherwise, so the run is what it "
        f"would have been to rounding and not bit for bit."
    ]


def _named_checkpoint(plan: Plan) -> Place | None:
    """The checkpoint that the recipe names; whether it is whole matters only to who begins there."""
    wish = plan.recipe.run.resume_from_checkpoint
    if not isinstance(wish, str):
        return None
    named = place(wish, base=Path(plan.place.root))
    step_of(named)
    return named


def _began_from(folder: RunFolder, origin: Place) -> bool:
    """Whether this start was made already, so that the same command goes on instead of starting there again."""
    note = folder.record.child(_ORIGIN)
    try:
        return bool(json.loads(note.read_text()) == origin.uri)
    except FileNotFoundError:
        return False
    except ValueError as error:
        raise Refused(
            f"{note.uri} is damaged, so it cannot be told whether this run began from {origin.uri} already: leave "
            f"resume_from_checkpoint out to go on with it, or choose another ray_run_name."
        ) from error


def _begin_from(origin: Place, plan: Plan, folder: RunFolder, started: bool) -> None:
    """Go another way from a checkpoint of this run, or begin at one of another run.

    Raises:
        Refused: the checkpoint is not there, not whole, or leaves nothing to do.
    """
    _refuse_useless(origin, plan)
    if origin.path.startswith(f"{folder.checkpoints.path}/"):
        if started:
            _refuse_differences(plan, folder)
        forget_after(folder.checkpoints, step_of(origin))
        folder.record.child(RESULT).delete()
        folder.model.delete()
    else:
        _clear(folder)
    folder.record.child(_ORIGIN).write_text(json.dumps(origin.uri))


def _refuse_useless(origin: Place, plan: Plan) -> None:
    """See that a run can begin at a checkpoint, before anything is cleared away for it."""
    named = f"resume_from_checkpoint {origin.uri}"
    if not origin.exists():
        raise Refused(f"{named} is not there: correct the path.")
    problem = origin.problem(hashes=origin.local_path is not None)  # a remote one is hashed when it is downloaded
    if problem is not None:
        raise Refused(f"{named} is not whole ({problem}): name another checkpoint.")
    step, updates = step_of(origin), plan.batch.updates
    if updates is not None and step >= updates:
        raise Refused(
            f"{named} is at step {step}, and the run ends at step {updates}: raise max_steps or num_train_epochs, or "
            f"name an earlier checkpoint."
        )


def _clear(folder: RunFolder) -> None:
    for part in (folder.checkpoints, folder.model, folder.record):
        part.delete()


def _changed(plan: Plan, folder: RunFolder) -> list[str]:
    """What this recipe does otherwise than the one that the run was started with."""
    record = folder.record.child(_MATHEMATICS)
    try:
        recorded = json.loads(record.read_text())
    except ValueError:
        recorded = None
    if not isinstance(recorded, dict):
        raise Refused(
            f"{record.uri} is damaged, so it cannot be told what the unfinished run {plan.place.run_name} was started "
            f"with: write resume_from_checkpoint: false to start anew, or choose another ray_run_name."
        )
    return differences(recorded, json.loads(json.dumps(mathematics(plan))))


def _refuse_nameless_checkpoints(plan: Plan, folder: RunFolder) -> None:
    """Leave checkpoints alone whose record is gone: they may be of any other recipe."""
    newest, _ = newest_complete(folder.checkpoints)
    if newest is not None:
        raise Refused(
            f"{folder.root.uri} holds checkpoints, but {_MATHEMATICS} is missing from its record, so it cannot be told "
            f"what the run {plan.place.run_name} was started with: write resume_from_checkpoint: false to start anew, "
            f"name one of its checkpoints there, or choose another ray_run_name."
        )


def _refuse_differences(plan: Plan, folder: RunFolder) -> None:
    changed = _changed(plan, folder)
    if changed:
        raise Refused(
            f"The unfinished run {plan.place.run_name} was started with other values ({'; '.join(changed)}): restore "
            f"them to continue it, write resume_from_checkpoint: false to start anew, or choose another ray_run_name."
        )
