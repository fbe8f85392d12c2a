"""Rows that so many ranks wrote are read back by any other number of them, and damaged files are told apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tunefleet.errors import Refused
from tunefleet.training.engines.shards import Shard, Span, load_shards, save_shards, shard_file, stored_shards

WORLDS = (1, 2, 3, 5)
WHOLE = {
    "matrix": torch.arange(35, dtype=torch.float32).reshape(7, 5),
    "one row": torch.arange(4, dtype=torch.bfloat16)[None],
    "vector": torch.arange(6, dtype=torch.int64),
    "block": torch.arange(24, dtype=torch.float64).reshape(4, 3, 2),
}
"""Of several formats. Some ranks get fewer rows than others, and of `one row` all but one get none."""


def rows_of(whole: Tensor, rank: int, world: int, *, empty: bool = False) -> Shard:
    span = Span.of(len(whole), rank, world)
    own = whole[span.start : span.stop].clone()
    return Shard(torch.zeros_like(own) if empty else own, span.start, tuple(whole.shape))


def write(folder: Path, world: int) -> None:
    for rank in range(world):
        shards = {name: rows_of(whole, rank, world) for name, whole in WHOLE.items()}
        save_shards(shards, shard_file(folder, "weights", rank, world))


@pytest.mark.parametrize("readers", WORLDS)
@pytest.mark.parametrize("writers", WORLDS)
def test_any_number_of_ranks_reads_what_any_other_wrote(writers: int, readers: int, tmp_path: Path) -> None:
    write(tmp_path, writers)
    read = [
        {name: rows_of(whole, rank, readers, empty=True) for name, whole in WHOLE.items()} for rank in range(readers)
    ]
    for own in read:
        load_shards(tmp_path, "weights", own)
    for name, whole in WHOLE.items():
        assert torch.equal(torch.cat([own[name].local for own in read]), whole), name
        assert stored_shards(tmp_path, "weights")[name].whole == tuple(whole.shape)
        assert stored_shards(tmp_path, "weights")[name].dtype == whole.dtype


def wanted(world: int = 1) -> dict[str, Shard]:
    return {name: rows_of(whole, 0, world, empty=True) for name, whole in WHOLE.items()}


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("harm", ["missing", "cut", "empty", "head"])
def test_a_damaged_file_of_any_rank_is_one_sentence(harm: str, rank: int, tmp_path: Path) -> None:
    write(tmp_path, 3)
    file = shard_file(tmp_path, "weights", rank, 3)
    content = file.read_bytes()
    file.unlink()
    changed = {"cut": content[:-1], "empty": b"", "head": bytes([content[0] ^ 0xFF]) + content[1:]}
    if harm != "missing":
        file.write_bytes(changed[harm])
    with pytest.raises(Refused, match=rf"{file.name} is (missing|damaged)") as refusal:
        load_shards(tmp_path, "weights", wanted())
    assert str(refusal.value).endswith("resume from another checkpoint.")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("stranger", [(0, 2), (2, 3)], ids=["rank 0's", "of three ranks"])
def test_a_file_under_another_ranks_name_is_told(stranger: tuple[int, int], tmp_path: Path) -> None:
    """Its rows would stand twice, and others nowhere."""
    write(tmp_path, 2)
    other = tmp_path / "other"
    other.mkdir()
    write(other, stranger[1])
    shard_file(other, "weights", *stranger).replace(shard_file(tmp_path, "weights", 1, 2))
    with pytest.raises(
        ValueError, match=r"weights-00001-of-00002\.safetensors holds other rows of matrix than its name"
    ):
        load_shards(tmp_path, "weights", wanted())
