"""What attempts died of, and whether another one is worth trying."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tunefleet.errors import PeerFailed, Refused, RunFailed
from tunefleet.storage import Damaged, Place, place
from tunefleet.worker.failures import Failure, describe_failure, failures, hopeless, last_failure, record_failure
from tunefleet_strategies.errors import StrategyError

MARK = "of this command"


@pytest.fixture
def record(tmp_path: Path) -> Place:
    return place(tmp_path / "run" / "record")


def failure(
    attempt: int = 1, rank: int = 0, step: int = 5, message: str = "boom", final: bool = False, kind: str = "OSError"
) -> Failure:
    return Failure(attempt, rank, step, kind, message, refused=False, final=final)


@pytest.mark.parametrize(
    ("error", "kind", "message", "refused", "final"),
    [
        (Refused("mend it."), "Refused", "mend it.", True, True),
        (StrategyError("no such layer; name another"), "StrategyError", "no such layer; name another", True, True),
        (RunFailed("not finite"), "RunFailed", "not finite", False, True),
        (Damaged("gone"), "Damaged", "gone", False, True),
        (ValueError("odd"), "ValueError", "ValueError: odd", False, False),
        (OSError(), "OSError", "OSError: ", False, False),
    ],
)
def test_an_exception_becomes_data(error: Exception, kind: str, message: str, refused: bool, final: bool) -> None:
    assert describe_failure(error, attempt=2, rank=1, step=7) == Failure(2, 1, 7, kind, message, refused, final)


@pytest.mark.parametrize(
    ("error", "so"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (MemoryError(), True),
        (ValueError("odd"), False),
    ],
)
def test_memory_that_was_too_small_is_known_as_that(error: Exception, so: bool) -> None:
    assert describe_failure(error, 1, 0, 0).out_of_memory is so


@pytest.mark.parametrize("make", [torch.empty, np.empty])
def test_memory_of_a_cpu_that_was_too_small_is_known_as_that(make: Callable[[tuple[int, int]], object]) -> None:
    with pytest.raises((RuntimeError, MemoryError)) as raised:
        make((10**13, 64))  # more than a process can address
    assert describe_failure(raised.value, 1, 0, 0).out_of_memory


def test_nothing_failed_yet(record: Place) -> None:
    assert failures(record, MARK) == []
    assert last_failure([]) is None
    assert not hopeless([])


def test_failures_of_several_ranks_are_read_in_order(record: Place) -> None:
    written = [failure(attempt, rank) for attempt, rank in ((2, 0), (1, 10), (1, 2), (10, 0), (2, 1))]
    for one in written:
        record_failure(record, MARK, one)
    assert failures(record, MARK) == sorted(written, key=lambda one: (one.attempt, one.rank))


def test_other_files_beside_failures_are_passed_over(record: Place) -> None:
    record_failure(record, MARK, failure())
    record.child("failures", MARK, ".0001_0001.json.tmp-0").write_text("{")
    assert failures(record, MARK) == [failure()]


def test_the_last_failure_is_of_the_newest_attempt() -> None:
    past = [failure(1, message="old", final=True), failure(2, 0, message="new"), failure(2, 1, message="echo")]
    assert last_failure(past) == past[1]


def test_the_last_failure_is_the_foreseen_one_of_its_attempt() -> None:
    past = [failure(1, 0, message="a rank was lost"), failure(1, 1, message="not finite", final=True)]
    assert last_failure(past) == past[1]


def test_one_failure_is_worth_another_attempt_unless_it_is_final() -> None:
    assert not hopeless([failure()])
    assert hopeless([failure(final=True)])


@pytest.mark.parametrize(
    ("change", "is_hopeless"),
    [({}, True), ({"rank": 1}, True), ({"step": 6}, False), ({"message": "bang"}, False), ({"kind": "X"}, False)],
)
def test_the_same_error_at_the_same_step_twice_is_hopeless(change: dict[str, object], is_hopeless: bool) -> None:
    assert hopeless([failure(1), replace(failure(2), **change)]) is is_hopeless  # type: ignore[arg-type]


def test_the_same_error_of_two_ranks_at_once_counts_once() -> None:
    assert not hopeless([failure(1, rank=0), failure(1, rank=1)])


def test_an_error_that_comes_again_later_is_hopeless_too() -> None:
    assert hopeless([failure(1), failure(2, message="another"), failure(3)])
    assert not hopeless([failure(1), failure(2), failure(3, step=9)])


@pytest.mark.parametrize(
    ("error", "echo"),
    [
        (PeerFailed("Rank 1 failed: no space left"), True),
        (dist.DistBackendError("NCCL communicator was aborted"), True),
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (OSError("no space left"), False),
    ],
)
def test_what_only_says_that_another_rank_was_lost_is_told_apart(error: Exception, echo: bool) -> None:
    assert describe_failure(error, 1, 0, 5).echo is echo


def test_workers_lost_twice_at_one_step_are_worth_another_attempt() -> None:
    lost = [replace(failure(attempt, rank), echo=True) for attempt in (1, 2) for rank in (0, 1)]
    assert not hopeless(lost)
    assert hopeless([replace(one, echo=False) for one in lost])


def test_a_ranks_own_failure_says_more_than_its_echo() -> None:
    past = [replace(failure(1, 0, message="Rank 1 failed"), echo=True), failure(1, 1, message="no space left")]
    assert last_failure(past) == past[1]
    again = [replace(one, attempt=2) for one in past]
    assert hopeless([*past, *again])


def test_failures_of_another_command_do_not_count(record: Place) -> None:
    record_failure(record, "another", failure(final=True))
    assert failures(record, MARK) == []
