"""Trials in forks of a server, without Ray: what they compute, and what happens when one of them dies."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file, save_file
from tests.search.warm.in_forks import Folder, exact_lines, forks_of, next_result, run_through, until

from tunefleet.errors import RunFailed
from tunefleet.search.warm.forks import ForkServer, fork, fork_server, shared_folder
from tunefleet.worker.shared import SharedStart

pytestmark = pytest.mark.timeout(240)

LONG = 200


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, quickstart_world: Path) -> Iterator[ForkServer]:
    with fork_server() as made:
        made.keep(Folder(tmp_path_factory.mktemp("stock"), tiny_model, quickstart_world).stock())
        yield made


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Path, quickstart_world: Path) -> Folder:
    return Folder(tmp_path, tiny_model, quickstart_world)


def test_a_warm_trial_computes_what_a_run_in_a_process_of_its_own_does(folder: Folder, server: ForkServer) -> None:
    """Two in a row, so that what the first did to the kept model would show in the second."""
    for name, rank in (("one", 4), ("two", 8)):
        plan = folder.plan(name, lora_rank=rank)
        results = run_through(folder.begin(name, server))
        assert [result["step"] for result in results] == [2, 4, 6, 8, 10, 12]
        assert results[-1]["ended"] == "finished"
        folder.run_twin(plan)
        assert exact_lines(folder.record(name)) == exact_lines(folder.record(f"{name}_twin"))
        assert folder.prints(name) == folder.prints(f"{name}_twin")
    assert until(lambda: not forks_of(server))


@pytest.mark.slow
def test_pissa_is_factorised_once_and_changes_no_bit(folder: Folder, server: ForkServer) -> None:
    keys = {"pissa_init": True, "lora_rank": 4, "pissa_iter": 4}
    shared = Path(shared_folder(server.address))
    for name, rate in (("first", 1e-3), ("second", 3e-3)):
        plan = folder.plan(name, learning_rate=rate, **keys)
        assert run_through(folder.begin(name, server))[-1]["ended"] == "finished"
        folder.run_twin(plan)
        assert exact_lines(folder.record(name)) == exact_lines(folder.record(f"{name}_twin"))
        assert folder.prints(name) == folder.prints(f"{name}_twin")
    assert len(list(shared.iterdir())) == 1
    file = SharedStart(shared, plan).file
    damaged = {name: value + 1 for name, value in load_file(file).items()}
    save_file(damaged, file)
    folder.plan("third", learning_rate=1e-3, **keys)
    run_through(folder.begin("third", server))
    assert folder.prints("third") != folder.prints("first")  # so it is what the second one began from
    folder.plan("another_seed", learning_rate=1e-3, seed=8, **keys)
    run_through(folder.begin("another_seed", server))
    assert len(list(shared.iterdir())) == 2


@pytest.mark.slow
def test_a_worker_that_is_killed_is_begun_again_from_its_checkpoint(folder: Folder, server: ForkServer) -> None:
    plan = folder.plan("killed", max_steps=LONG, save_steps=20)
    trial = folder.begin("killed", server)
    while next_result(trial)["step"] < 40:
        pass
    assert until(lambda: folder.checkpoints("killed") != [])
    (worker,) = (one for one in forks_of(server) if one.pid != trial.pid)
    worker.kill()
    assert run_through(trial)[-1]["ended"] == "finished"
    first, last = folder.attempts("killed")
    assert first["reason"] == "killed"
    assert last["start_step"] >= 20
    assert last["executed_steps"] == LONG - last["start_step"]
    folder.run_twin(plan)
    assert folder.prints("killed") == folder.prints("killed_twin")


def test_a_trial_that_fails_leaves_the_next_one_alone(folder: Folder, server: ForkServer) -> None:
    folder.plan("explodes", finetuning_type="full", lora_dropout=None, learning_rate=1e30, max_grad_norm=0)
    last = run_through(folder.begin("explodes", server))[-1]
    assert last["ended"] == "failed"
    assert "not finite" in last["error"]
    plan = folder.plan("after")
    assert run_through(folder.begin("after", server))[-1]["ended"] == "finished"
    folder.run_twin(plan)
    assert exact_lines(folder.record("after")) == exact_lines(folder.record("after_twin"))


def test_a_trial_that_nobody_asks_goes_no_further_than_its_next_result(folder: Folder, server: ForkServer) -> None:
    """So that the processor is free for others, when a scheduler stops a trial and its host hears nothing of it."""
    folder.plan("held", max_steps=LONG, logging_steps=20, save_steps=LONG)
    trial = folder.begin("held", server)
    assert next_result(trial)["step"] == 20
    (worker,) = (one for one in forks_of(server) if one.pid != trial.pid)
    assert until(lambda: worker.status() == psutil.STATUS_STOPPED)
    assert folder.lines("held")[-1]["step"] in (40, 60)
    trial.line.send("stop")
    assert until(lambda: not forks_of(server))
    (attempt,) = folder.attempts("held")
    assert attempt["reason"] == "stopped"
    assert folder.checkpoints("held") == [attempt["executed_steps"]]
    assert attempt["executed_steps"] < LONG


@pytest.mark.parametrize("dies", ["host", "trial"])
def test_nothing_is_left_of_a_trial_whose_host_or_driver_dies(folder: Folder, server: ForkServer, dies: str) -> None:
    folder.plan("left", max_steps=100 * LONG, save_steps=20)
    trial = folder.begin("left", server)
    assert next_result(trial)["step"] == 2
    assert len(forks_of(server)) == 2
    trial.line.send("next")
    if dies == "host":
        trial.line.close()
    else:
        trial.signal(signal.SIGKILL)
    assert until(lambda: not forks_of(server))


@pytest.mark.slow
def test_forks_of_a_server_that_has_ended_are_refused_with_what_it_said(tmp_path: Path) -> None:
    with fork_server() as server:
        server.keep(["no plan"])
        with pytest.raises(RunFailed, match=r"The process that forks trials has ended \(it said: "):
            fork(server.address, "trial", None)
