"""Batches, property by property, over many random cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tunefleet.data.batches import BatchSchedule, collate, deal, epoch_order, micro_batches
from tunefleet.data.tokens import Row


def random_rows(random: np.random.Generator, count: int) -> list[Row]:
    rows = []
    for _ in range(count):
        segments = random.integers(1, 9, random.integers(1, 4)).astype(np.int32)
        ids = random.integers(3, 50, segments.sum()).astype(np.int32)
        rows.append(Row(ids, np.where(random.random(len(ids)) < 0.6, ids, -100).astype(np.int32), segments))
    return rows


def test_the_order_of_an_epoch_depends_on_seed_and_epoch_alone() -> None:
    first = epoch_order(50, 7, 0)
    np.random.seed(1)
    np.random.random(100)
    assert np.array_equal(first, epoch_order(50, 7, 0))
    assert sorted(first) == list(range(50))
    assert not np.array_equal(first, epoch_order(50, 7, 1))
    assert not np.array_equal(first, epoch_order(50, 8, 0))


def test_asking_for_an_order_leaves_the_global_random_state_alone() -> None:
    np.random.seed(5)
    expected = np.random.random(3)
    np.random.seed(5)
    epoch_order(50, 7, 0)
    assert np.array_equal(expected, np.random.random(3))


@pytest.mark.parametrize(("rows", "global_batch"), [(10, 4), (8, 4), (3, 16), (101, 7)])
def test_every_epoch_sees_every_row_once(rows: int, global_batch: int) -> None:
    schedule = BatchSchedule(rows, global_batch, updates=3 * -(-rows // global_batch), seed=3)
    per_epoch = schedule.updates_per_epoch
    for epoch in range(3):
        batches = [schedule.indices(update) for update in range(epoch * per_epoch, (epoch + 1) * per_epoch)]
        assert sorted(np.concatenate(batches)) == list(range(rows))
        assert all(len(batch) == global_batch for batch in batches[:-1])
    assert schedule.epoch(0) == 0
    assert schedule.epoch(per_epoch) == 1
    assert schedule.epoch(3 * per_epoch) == 3
    with pytest.raises(IndexError):
        schedule.indices(3 * per_epoch)


def test_the_schedule_can_be_entered_anywhere() -> None:
    straight = BatchSchedule(23, 5, 40, 1)
    expected = [straight.indices(update).tolist() for update in range(40)]
    assert [BatchSchedule(23, 5, 40, 1).indices(update).tolist() for update in reversed(range(40))] == expected[::-1]


def test_shares_are_the_global_batch_without_repeats() -> None:
    random = np.random.default_rng(0)
    for _ in range(300):
        rows, workers = int(random.integers(1, 60)), int(random.integers(1, 9))
        lengths = random.integers(1, 500, 80)
        indices = random.permutation(80)[:rows]
        shares = deal(indices, lengths, workers)
        assert len(shares) == workers
        assert sorted(np.concatenate(shares)) == sorted(indices)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        again = deal(indices, lengths, workers)
        assert all(np.array_equal(one, other) for one, other in zip(shares, again, strict=True))
        micro = int(random.integers(1, 6))
        for share in shares:
            pieces = micro_batches(share, micro)
            assert [index for piece in pieces for index in piece] == share.tolist()
            assert all(0 < len(piece) <= micro for piece in pieces)


def test_each_of_two_workers_sees_about_half_of_the_tokens() -> None:
    random = np.random.default_rng(1)
    for _ in range(100):
        lengths = np.ceil(random.lognormal(4, 1, 64)).astype(int).clip(1, 1024)
        first, second = (lengths[share].sum() for share in deal(np.arange(64), lengths, 2))
        assert abs(first - second) / lengths.sum() < 0.02


def targets_by_hand(rows: list[Row]) -> list[tuple[int, int]]:
    """(input token before, target) pairs in order, segment by segment."""
    pairs = []
    for row in rows:
        start = 0
        for length in row.segments:
            for at in range(start + 1, start + length):
                if row.labels[at] != -100:
                    pairs.append((int(row.input_ids[at - 1]), int(row.labels[at])))
            start += length
    return pairs


def test_both_layouts_have_the_same_targets_and_no_target_crosses_a_seam() -> None:
    random = np.random.default_rng(2)
    for _ in range(100):
        rows = random_rows(random, int(random.integers(1, 6)))
        flat, padded = collate(rows, pad_token_id=None), collate(rows, pad_token_id=2)
        for batch in (flat, padded):
            before = batch.input_ids.flatten()[batch.target_positions]
            assert list(zip(before.tolist(), batch.target_ids.tolist(), strict=True)) == targets_by_hand(rows)
            assert len(set(batch.target_positions.tolist())) == len(batch.target_positions)
            assert batch.tokens == sum(len(row.input_ids) for row in rows)
        assert flat.attention_mask is None
        assert sum(flat.segment_lengths) == flat.input_ids.shape[1] == flat.tokens


def test_positions_restart_and_padding_is_on_the_right() -> None:
    row = Row(np.arange(5, dtype=np.int32), np.arange(5, dtype=np.int32), np.array([3, 2], dtype=np.int32))
    flat, padded = collate([row], pad_token_id=None), collate([row], pad_token_id=9)
    assert flat.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert flat.segment_lengths == (3, 2)
    assert flat.target_positions.tolist() == [0, 1, 3]
    assert padded.input_ids.tolist() == [[0, 1, 2], [3, 4, 9]]
    assert padded.attention_mask is not None
    assert padded.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert padded.position_ids.tolist() == [[0, 1, 2], [0, 1, 0]]
    assert padded.target_positions.tolist() == [0, 1, 3]
    assert padded.segment_lengths == ()
    assert flat.input_ids.dtype == torch.int64


def test_a_row_without_targets_is_a_batch_like_any_other() -> None:
    row = Row(np.arange(3, dtype=np.int32), np.full(3, -100, dtype=np.int32), np.array([3], dtype=np.int32))
    batch = collate([row], pad_token_id=None)
    assert batch.tokens == 3
    assert batch.target_ids.shape == (0,)
