"""Whether a command starts a run, continues it or leaves it alone, on folders that runs leave behind."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from filelock import FileLock
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem

from tunefleet.artifacts.claim import mark_of
from tunefleet.artifacts.folder import RunFolder
from tunefleet.artifacts.record import RESULT
from tunefleet.checkpoints import step_name
from tunefleet.errors import Refused
from tunefleet.hardware import Hardware
from tunefleet.launch.runs import claimed, open_run
from tunefleet.plan import Plan
from tunefleet.planning import make_plan
from tunefleet.recipe.read import read_flat
from tunefleet.shapes import ClusterShape, NodeShape
from tunefleet.storage import Place, place
from tunefleet_strategies.contract import ModelShape, ParameterShape

SHAPE = ModelShape("TinyForCausalLM", 10, 4, 1, (ParameterShape("embed", (10, 4), True),))
LAPTOP = ClusterShape((NodeShape(cpus=2),), cpu=Hardware("cpu", bf16=False))

HOLDER = """
import sys
from filelock import FileLock
lock = FileLock(sys.argv[1])
lock.acquire(timeout=0)
print("held", flush=True)
sys.stdin.read()
"""


def planned(root: Path, **keys: object) -> Plan:
    base: dict[str, object] = {"model_name_or_path": "base", "dataset": "rows.jsonl", "output_dir": "out"}
    recipe = read_flat(base | {"finetuning_type": "full", "ray_storage_path": "store", "ray_run_name": "first"} | keys)
    return make_plan(recipe, SHAPE, None, LAPTOP, str(root))


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(place(tmp_path / "store" / "first"))


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    source = tmp_path / "weights"
    source.mkdir()
    (source / "state.bin").write_bytes(b"0123456789")
    return source


def save(folder: RunFolder, weights: Path, *steps: int) -> None:
    for step in steps:
        folder.checkpoints.child(step_name(step)).upload(weights)


def finish(folder: RunFolder, weights: Path) -> None:
    folder.model.upload(weights)
    folder.record.child(RESULT).write_text("{}")


def steps(folder: RunFolder) -> list[int]:
    return [int(one.name.removeprefix("step_")) for one in folder.checkpoints.children()]


def listing(folder: RunFolder) -> dict[str, bytes]:
    root = Path(folder.root.path)
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}


def refusal(plan: Plan, folder: RunFolder) -> str:
    """The sentence of a refusal, which must leave everything as it was."""
    before = listing(folder)
    with pytest.raises(Refused) as caught:
        open_run(plan, folder)
    assert listing(folder) == before
    return str(caught.value)


# ---- starting and continuing ----------------------------------------------------------------------------------------


def test_a_new_run_starts_with_its_plan_on_record(folder: RunFolder, tmp_path: Path) -> None:
    plan = planned(tmp_path)
    assert open_run(plan, folder) == []
    assert Plan.model_validate_json(folder.record.child("plan.json").read_text()) == plan
    assert json.loads(folder.record.child("mathematics.json").read_text())["learning_rate"] == 5e-5
    assert steps(folder) == []


@pytest.mark.parametrize("keys", [{}, {"overwrite_output_dir": True}, {"resume_from_checkpoint": True}])
def test_an_unfinished_run_is_continued(
    folder: RunFolder, weights: Path, tmp_path: Path, keys: dict[str, object]
) -> None:
    open_run(planned(tmp_path), folder)
    save(folder, weights, 5, 10)
    assert open_run(planned(tmp_path, **keys), folder) == ["The run first goes on from step 10."]
    assert steps(folder) == [5, 10]


def test_another_number_of_threads_is_said(folder: RunFolder, weights: Path, tmp_path: Path) -> None:
    open_run(planned(tmp_path, resources_per_worker={"CPU": 2}), folder)
    save(folder, weights, 5)
    one = planned(tmp_path, resources_per_worker={"CPU": 1})
    goes_on, threads = open_run(one, folder)
    assert "1 thread(s), and had 2 before" in threads
    assert open_run(one, folder) == [goes_on]


def test_a_run_on_another_file_system_is_continued(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    folder = RunFolder(Place(SubTreeFileSystem(str(tmp_path / "far"), LocalFileSystem()), "first"))
    open_run(planned(tmp_path), folder)
    save(folder, weights, 5)
    with claimed(folder):
        assert open_run(planned(tmp_path), folder) == ["The run first goes on from step 5."]
    assert "learning_rate: 5e-05 -> 1.0" in refusal_text(planned(tmp_path, learning_rate=1.0), folder)


def refusal_text(plan: Plan, folder: RunFolder) -> str:
    with pytest.raises(Refused) as caught:
        open_run(plan, folder)
    return str(caught.value)


def test_a_run_that_died_before_its_first_checkpoint_begins_without_a_word(folder: RunFolder, tmp_path: Path) -> None:
    open_run(planned(tmp_path), folder)
    assert open_run(planned(tmp_path), folder) == []


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_notice(
    folder: RunFolder, weights: Path, tmp_path: Path
) -> None:
    open_run(planned(tmp_path), folder)
    save(folder, weights, 5, 10)
    (Path(folder.checkpoints.path) / step_name(10) / "state.bin").write_bytes(b"short")
    skipped, going_on = open_run(planned(tmp_path), folder)
    assert "step_00000010 is skipped: state.bin has 5 bytes" in skipped
    assert going_on == "The run first goes on from step 5."


def test_a_run_that_keeps_no_optimizer_begins_anew(folder: RunFolder, weights: Path, tmp_path: Path) -> None:
    plan = planned(tmp_path, save_only_model=True)
    open_run(plan, folder)
    save(folder, weights, 5)
    assert open_run(plan, folder) == ["The unfinished run first keeps nothing to go on from and begins anew."]
    assert steps(folder) == []
    assert folder.record.child("mathematics.json").exists()


def test_logging_may_change_on_the_way_and_the_record_has_the_new_plan(
    folder: RunFolder, weights: Path, tmp_path: Path
) -> None:
    open_run(planned(tmp_path), folder)
    save(folder, weights, 5)
    open_run(planned(tmp_path, logging_steps=3), folder)
    assert json.loads(folder.record.child("plan.json").read_text())["cadence"]["logging"] == 3
    assert steps(folder) == [5]


def test_a_changed_learning_rate_is_refused_by_name(folder: RunFolder, weights: Path, tmp_path: Path) -> None:
    open_run(planned(tmp_path), folder)
    save(folder, weights, 5)
    sentence = refusal(planned(tmp_path, learning_rate=1e-3, seed=1, overwrite_output_dir=True), folder)
    assert "learning_rate: 5e-05 -> 0.001; seed: 42 -> 1)" in sentence
    assert "resume_from_checkpoint: false" in sentence


def test_the_mend_for_a_changed_learning_rate_starts_anew(folder: RunFolder, weights: Path, tmp_path: Path) -> None:
    open_run(planned(tmp_path), folder)
    save(folder, weights, 5)
    changed = {"learning_rate": 1e-3}
    assert open_run(planned(tmp_path, **changed, resume_from_checkpoint=False), folder) == []
    assert steps(folder) == []
    assert open_run(planned(tmp_path, **changed), folder) == [], "the record has the new value"


# ---- finished runs --------------------------------------------------------------------------------------------------


def test_a_finished_run_is_left_alone(folder: RunFolder, weights: Path, tmp_path: Path) -> None:
    open_run(planned(tmp_path), folder)
    save(folder, weights, 5)
    finish(folder, weights)
    sentence = refusal(planned(tmp_path), folder)
    assert "is finished" in sentence
    assert "overwrite_output_dir: true" in sentence


@pytest.mark.parametrize("keys", [{}, {"learning_rate": 1e-3}, {"resume_from_checkpoint": False}])
def test_a_finished_run_is_done_anew_on_request(
    folder: RunFolder, weights: Path, tmp_path: Path, keys: dict[str, object]
) -> None:
    open_run(planned(tmp_path), folder)
    save(folder, weights, 5)
    finish(folder, weights)
    assert open_run(planned(tmp_path, overwrite_output_dir=True, **keys), folder) == []
    assert steps(folder) == []
    assert not folder.finished()
    assert not folder.model.exists()


# ---- resume_from_checkpoint -----------------------------------------------------------------------------------------


def test_false_starts_an_unfinished_run_anew(folder: RunFolder, weights: Path, tmp_path: Path) -> None:
    open_run(planned(tmp_path), folder)
    save(folder, weights, 5)
    folder.record.child("metrics.jsonl").write_text("{}")
    assert open_run(planned(tmp_path, resume_from_checkpoint=False), folder) == []
    assert steps(folder) == []
    assert not folder.record.child("metrics.jsonl").exists()


def test_true_needs_a_checkpoint(folder: RunFolder, tmp_path: Path) -> None:
    assert "leave the key out" in refusal(planned(tmp_path, resume_from_checkpoint=True), folder)
    open_run(planned(tmp_path), folder)
    assert "leave the key out" in refusal(planned(tmp_path, resume_from_checkpoint=True), folder)


@pytest.mark.parametrize("keys", [{"overwrite_output_dir": True}, {"save_only_model": True}])
def test_true_never_destroys_what_it_cannot_continue(
    folder: RunFolder, weights: Path, tmp_path: Path, keys: dict[str, object]
) -> None:
    open_run(planned(tmp_path), folder)
    save(folder, weights, 5)
    if "overwrite_output_dir" in keys:
        finish(folder, weights)
    assert "no unfinished run" in refusal(planned(tmp_path, resume_from_checkpoint=True, **keys), folder)


@pytest.mark.parametrize(
    "written", ["store/first/checkpoints/step_00000005", "{root}/store/first/checkpoints/step_00000005/"]
)
def test_a_checkpoint_of_its_own_forgets_the_later_ones_once(
    folder: RunFolder, weights: Path, tmp_path: Path, written: str
) -> None:
    open_run(planned(tmp_path), folder)
    save(folder, weights, 5, 10, 15)
    plan = planned(tmp_path, resume_from_checkpoint=written.format(root=tmp_path))
    open_run(plan, folder)
    assert steps(folder) == [5]
    save(folder, weights, 10)
    assert open_run(plan, folder) == ["The run first goes on from step 10."], "the same command goes on"
    assert steps(folder) == [5, 10]
    open_run(planned(tmp_path), folder)
    assert steps(folder) == [5, 10]


def test_a_checkpoint_of_its_own_needs_the_same_numbers(folder: RunFolder, weights: Path, tmp_path: Path) -> None:
    open_run(planned(tmp_path), folder)
    save(folder, weights, 5, 10)
    own = folder.checkpoints.child(step_name(5)).path
    assert "seed: 42 -> 1" in refusal(planned(tmp_path, resume_from_checkpoint=own, seed=1), folder)


def test_a_finished_run_goes_another_way_from_a_checkpoint_of_its_own(
    folder: RunFolder, weights: Path, tmp_path: Path
) -> None:
    open_run(planned(tmp_path), folder)
    save(folder, weights, 5, 10)
    finish(folder, weights)
    own = folder.checkpoints.child(step_name(5)).path
    assert "is finished" in refusal(planned(tmp_path, resume_from_checkpoint=own), folder)
    open_run(planned(tmp_path, resume_from_checkpoint=own, overwrite_output_dir=True), folder)
    assert steps(folder) == [5]
    assert not folder.finished()
    assert not folder.model.exists()


def test_a_foreign_checkpoint_clears_the_run_once_and_stays_where_it_is(
    folder: RunFolder, weights: Path, tmp_path: Path
) -> None:
    other = place(tmp_path / "store" / "second" / "checkpoints" / step_name(40))
    other.upload(weights)
    open_run(planned(tmp_path, seed=1), folder)
    save(folder, weights, 5)
    plan = planned(tmp_path, resume_from_checkpoint=f"store/second/checkpoints/{step_name(40)}")
    open_run(plan, folder)
    assert steps(folder) == [], "the run has begun at the other one"
    assert other.problem(hashes=True) is None
    save(folder, weights, 50)
    assert open_run(plan, folder) == ["The run first goes on from step 50."]
    assert steps(folder) == [50]


def test_a_run_whose_name_begins_like_another_is_foreign(folder: RunFolder, weights: Path, tmp_path: Path) -> None:
    save(RunFolder(place(tmp_path / "store" / "first-b")), weights, 5)
    open_run(planned(tmp_path), folder)
    save(folder, weights, 3)
    open_run(planned(tmp_path, resume_from_checkpoint=f"store/first-b/checkpoints/{step_name(5)}"), folder)
    assert steps(folder) == []


def test_another_checkpoint_than_the_last_time_starts_there(folder: RunFolder, weights: Path, tmp_path: Path) -> None:
    open_run(planned(tmp_path), folder)
    save(folder, weights, 5, 10, 15)
    open_run(planned(tmp_path, resume_from_checkpoint=f"store/first/checkpoints/{step_name(10)}"), folder)
    assert steps(folder) == [5, 10]
    open_run(planned(tmp_path, resume_from_checkpoint=f"store/first/checkpoints/{step_name(5)}"), folder)
    assert steps(folder) == [5]


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ("short", "is not whole (state.bin"),
        ("changed", "is not whole (the content of state.bin changed): name another checkpoint"),
        ("unsealed", "is not whole (complete.json is missing"),
        ("absent", "is not there: correct the path"),
        ("last", "is at step 5, and the run ends at step 5: raise max_steps"),
    ],
)
@pytest.mark.parametrize("whose", ["first", "second"])
def test_a_checkpoint_that_is_no_beginning_is_refused_and_costs_the_run_nothing(
    folder: RunFolder, weights: Path, tmp_path: Path, harm: str, said: str, whose: str
) -> None:
    updates = 5 if harm == "last" else 100
    open_run(planned(tmp_path, max_steps=updates), folder)
    save(folder, weights, 5, 10)
    save(RunFolder(place(tmp_path / "store" / "second")), weights, 5)
    named = tmp_path / "store" / whose / "checkpoints" / step_name(5)
    if harm == "short":
        (named / "state.bin").write_bytes(b"")
    elif harm == "changed":
        (named / "state.bin").write_bytes(b"0123456780")
    elif harm == "unsealed":
        (named / "complete.json").unlink()
    elif harm == "absent":
        named = named.with_name(step_name(7))
    sentence = refusal(planned(tmp_path, max_steps=updates, resume_from_checkpoint=str(named)), folder)
    assert f"resume_from_checkpoint {named} {said}" in sentence
    assert steps(folder) == [5, 10]


def test_a_run_goes_on_when_the_checkpoint_that_it_began_at_is_gone(
    folder: RunFolder, weights: Path, tmp_path: Path
) -> None:
    """As save_total_limit removes it once there is a newer one."""
    open_run(planned(tmp_path), folder)
    save(folder, weights, 5, 10)
    plan = planned(tmp_path, resume_from_checkpoint=f"store/first/checkpoints/{step_name(5)}", save_total_limit=1)
    open_run(plan, folder)
    save(folder, weights, 10)
    folder.checkpoints.child(step_name(5)).delete()
    assert open_run(plan, folder) == ["The run first goes on from step 10."]


@pytest.mark.parametrize("name", ["store/first", "last", "store/first/checkpoints/step_5"])
def test_what_is_no_checkpoint_is_refused(folder: RunFolder, tmp_path: Path, name: str) -> None:
    sentence = refusal(planned(tmp_path, resume_from_checkpoint=name), folder)
    assert f"{tmp_path / name} is not a checkpoint" in sentence


# ---- what other attempts leave --------------------------------------------------------------------------------------


def test_notes_of_ray_and_of_failures_are_cleared_away(folder: RunFolder, weights: Path, tmp_path: Path) -> None:
    open_run(planned(tmp_path), folder)
    save(folder, weights, 5)
    leftovers = [
        folder.root.child("checkpoint_manager_snapshot.json"),
        folder.record.child("failures", "0001_0000.json"),
    ]
    for leftover in leftovers:
        leftover.write_text("{}")
    folder.record.child("metrics.jsonl").write_text("kept")
    open_run(planned(tmp_path), folder)
    assert [leftover.name for leftover in leftovers if leftover.exists()] == []
    assert folder.record.child("metrics.jsonl").read_text() == "kept"


def test_the_name_of_rays_snapshot_is_the_one_that_is_cleared() -> None:
    from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME

    assert CHECKPOINT_MANAGER_SNAPSHOT_FILENAME == "checkpoint_manager_snapshot.json"


# ---- two drivers ----------------------------------------------------------------------------------------------------


def test_a_run_is_claimed_once_and_free_again_afterwards(folder: RunFolder) -> None:
    with (
        claimed(folder),
        pytest.raises(Refused, match="The run first is being run by another process"),
        claimed(folder),
    ):
        raise AssertionError("claimed twice")
    with claimed(folder):
        lock = FileLock(Path(folder.root.path) / ".lock")
        with pytest.raises(TimeoutError):
            lock.acquire(timeout=0)


@pytest.mark.parametrize("fails", [False, True])
def test_checkpoints_in_the_making_are_swept_up(folder: RunFolder, fails: bool) -> None:
    scratch = Path(folder.root.uri) / "scratch"
    (scratch / "killed").mkdir(parents=True)
    with suppress(ValueError), claimed(folder):
        assert not scratch.exists()
        (scratch / "killed again").mkdir(parents=True)
        if fails:
            raise ValueError("odd")
    assert not scratch.exists()


def test_a_claim_ends_with_an_error_in_its_block(folder: RunFolder) -> None:
    with pytest.raises(ValueError, match="odd"), claimed(folder):
        raise ValueError("odd")
    with claimed(folder):
        pass


def test_another_process_holds_its_claim_until_it_dies(folder: RunFolder) -> None:
    root = Path(folder.root.path)
    root.mkdir(parents=True)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(root / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(Refused, match="choose another ray_run_name"), claimed(folder):
            pass
    finally:
        holder.kill()
        holder.communicate()
    with claimed(folder):
        pass


def test_a_run_on_another_machines_disk_is_locked_on_this_one(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lock would outlast a machine that died with it."""
    monkeypatch.setattr("tunefleet.launch.runs.on_network", lambda _path: True)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "here"))
    (tmp_path / "here").mkdir()
    with claimed(folder):
        assert not (Path(folder.root.path) / ".lock").exists()
        with pytest.raises(Refused, match="is being run by another process"), claimed(folder):
            raise AssertionError("claimed twice")
    with claimed(folder):
        pass


def test_each_command_leaves_its_own_mark(folder: RunFolder) -> None:
    marks = []
    for _ in range(2):
        with claimed(folder) as mark:
            assert mark in folder.claim.read_text()
            marks.append(mark)
    assert len(set(marks)) == 2


# ---- records that somebody has edited -------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "{", "[]", "5"])
def test_a_record_of_the_mathematics_that_is_damaged_is_refused(
    folder: RunFolder, weights: Path, tmp_path: Path, text: str
) -> None:
    open_run(planned(tmp_path), folder)
    save(folder, weights, 5)
    folder.record.child("mathematics.json").write_text(text)
    assert "mathematics.json is damaged" in refusal(planned(tmp_path), folder)


def test_checkpoints_without_a_record_are_of_nobody_knows_what(
    folder: RunFolder, weights: Path, tmp_path: Path
) -> None:
    open_run(planned(tmp_path), folder)
    save(folder, weights, 5, 10)
    folder.record.delete()
    for keys in ({}, {"learning_rate": 1.0}, {"resume_from_checkpoint": True}):
        assert "mathematics.json is missing" in refusal(planned(tmp_path, **keys), folder)
    open_run(planned(tmp_path, resume_from_checkpoint=False), folder)
    assert steps(folder) == []


def test_a_damaged_note_of_where_a_run_began_loses_no_checkpoint(
    folder: RunFolder, weights: Path, tmp_path: Path
) -> None:
    open_run(planned(tmp_path), folder)
    save(folder, weights, 5, 10)
    from_five = planned(tmp_path, resume_from_checkpoint=folder.checkpoints.child(step_name(5)).uri)
    open_run(from_five, folder)
    save(folder, weights, 15)
    folder.record.child("origin.json").write_text("{")
    assert "origin.json is damaged" in refusal(from_five, folder)
    assert steps(folder) == [5, 15]


@pytest.mark.parametrize("text", ["[]", "5", "{"])
def test_a_damaged_plan_stops_nobody(folder: RunFolder, weights: Path, tmp_path: Path, text: str) -> None:
    open_run(planned(tmp_path), folder)
    save(folder, weights, 5)
    folder.record.child("plan.json").write_text(text)
    folder.claim.write_text(text)
    assert mark_of(folder.claim) == ""
    assert open_run(planned(tmp_path), folder) == ["The run first goes on from step 5."]
