"""Under FSDP2 two workers do what one plain worker does, each with half of the model, and go on where they stopped."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from tests.contract.sharded import ShardedRun, local_bytes, on_disk, start_sharded
from tests.contract.sharded_pair import (
    ALONE,
    BF16_QUICK,
    BF16_SLOW,
    GROWN,
    LONG,
    LONG_UPDATES,
    PRECISIONS,
    QUICK,
    SAVED,
    SLOW,
    UPDATES,
    arguments,
    saved_alone,
)
from tests.contract.variants import FSDP2, VARIANTS
from tests.group import run_group
from tests.training.tiny import ARCHITECTURES, FP32, VOCABULARY, MemoryRows, Run, build, start
from torch import nn
from transformers import AutoModelForCausalLM

from tunefleet.errors import Refused
from tunefleet.models import causal_lm
from tunefleet.training.checkpoint import load, save
from tunefleet.training.loop import evaluate
from tunefleet.training.loss import objective
from tunefleet.training.progress import Progress
from tunefleet_strategies.contract import Precision
from tunefleet_strategies.full import Full

pytestmark = pytest.mark.timeout(700)  # the first test of a group waits for all of its cells
Seen = Callable[[Any], list[dict[str, Any]]]
Begun = dict[tuple[str, str], tuple[list[float], torch.Tensor]]
"""Of a cell: losses, and how far the weights have come."""

CELLS = [pytest.param(*cell, marks=() if cell in QUICK else pytest.mark.slow) for cell in FSDP2]
BF16_CELLS = [
    pytest.param(*cell, marks=() if cell in BF16_QUICK else pytest.mark.slow) for cell in (*BF16_QUICK, *BF16_SLOW)
]


def _pair(
    folder: Path, *more: str, module: str = "tests.contract.sharded_pair", seconds: float = 600
) -> list[dict[Any, Any]]:
    run_group([[module, str(rank), str(folder), *more] for rank in (0, 1)], seconds=seconds)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """A group of one rank, which is this process."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'alone'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Where both groups find the models, and leave what they write."""
    found = {share: tmp_path_factory.mktemp(share) for share in ("quick", "slow")}
    for architecture in ARCHITECTURES:
        for folder in found.values():
            on_disk(architecture, folder / "models" / architecture)
    return found


@pytest.fixture(scope="module")
def begun(folders: dict[str, Path]) -> Begun:
    """What one rank has come to where two go on."""
    folder = folders["quick"]
    with alone(folder):
        return {cell: begin_alone(*cell, folder) for cell in GROWN}


def begin_alone(variant: str, architecture: str, folder: Path) -> tuple[list[float], torch.Tensor]:
    run = start_sharded(VARIANTS[variant], folder / "models" / architecture, **arguments(variant, architecture))
    losses = [step.loss for step in run.steps(last=ALONE)]
    checkpoint = saved_alone(variant, architecture, folder)
    checkpoint.mkdir()
    save(checkpoint, run.state, Progress(step=ALONE))
    return losses, run.moved().detach()


@pytest.fixture(scope="module")
def quick(folders: dict[str, Path], begun: Begun) -> list[dict[Any, Any]]:
    """What both ranks of the group of the quick cells saw."""
    assert begun.keys() == set(GROWN), "the group finds them there"
    return _pair(folders["quick"], "quick", seconds=240)


@pytest.fixture(scope="module")
def slow(folders: dict[str, Path]) -> list[dict[Any, Any]]:
    """What both ranks of the group of the slow cells saw."""
    return _pair(folders["slow"], "slow")


@pytest.fixture
def seen(request: pytest.FixtureRequest) -> Seen:
    """What both ranks of a group saw of a cell. A group that has failed is not asked again: its fixture has failed."""

    def of(cell: Any) -> list[dict[str, Any]]:
        share = "slow" if cell in SLOW or cell in BF16_SLOW or cell[0] == "long" else "quick"
        return [rank[cell] for rank in request.getfixturevalue(share)]

    return of


def plain(variant: str, architecture: str, precision: Precision = FP32, **more: Any) -> tuple[Run, list[Any]]:
    """The same on one plain worker; and the bytes of its optimizer's state after each step."""
    given = {**arguments(variant, architecture), **more}
    run = start(VARIANTS[variant], architecture, precision=precision, **given)
    return run, [(step, moment_bytes(run)) for step in run.steps()]


def moment_bytes(run: Run) -> int:
    states = run.engine.optimizer.state.values()
    return local_bytes(t for state in states for name, t in state.items() if name != "step")


def distance(moved: torch.Tensor, run: Run) -> float:
    expected = run.moved()
    return float((moved - expected).norm() / expected.norm())


@pytest.mark.parametrize(("variant", "architecture"), CELLS)
def test_two_sharded_workers_equal_one_plain_worker(
    seen: Seen, folders: dict[str, Path], variant: str, architecture: str
) -> None:
    run, steps = plain(variant, architecture)
    first, second = seen((variant, architecture))
    for name, value in first["began"].items():
        assert torch.equal(value, run.started[name]), name
    assert first["losses"] == second["losses"]
    assert first["losses"] == pytest.approx([step.loss for step, _ in steps], abs=1e-5)
    assert first["norms"] == pytest.approx([step.grad_norm for step, _ in steps], rel=1e-4)
    assert max(first["norms"]) > 0.5, "clipping was never needed, so it was not tested"
    assert 0.0 < distance(first["moved"], run) <= 1e-4
    assert first["tokens"] + second["tokens"] == sum(run.feed.seen)
    assert first["tokens"] / sum(run.feed.seen) == pytest.approx(0.5, abs=0.15)
    assert first["bytes"] > 0
    # Each worker has half of everything, whatever trains at the time.
    whole = local_bytes(p.detach() for p in run.model.parameters())
    for rank in (first, second):
        assert rank["parameters"] <= 0.6 * whole
        assert all(mine <= 0.6 * all_of_it for mine, (_, all_of_it) in zip(rank["moments"], steps, strict=True))
    export = folders["slow" if (variant, architecture) in SLOW else "quick"] / f"{variant}-{architecture}-export"
    same_logits(export, run, architecture)


LAYER = re.compile(r"\.(layers|h)\.\d+\.")
LAST = {"model.norm.weight", "lm_head.weight"}
WORDS = 3 * 8
"""Bytes of what the ranks tell each other at each update: the loss, the wish to stop, the square of the norm."""


@pytest.mark.parametrize(("variant", "architecture"), CELLS)
def test_gradients_of_what_trains_are_sent_and_weights_gathered(seen: Seen, variant: str, architecture: str) -> None:
    """To the byte. In each pass a rank gives its rows of everything, and of the layers once more for the way back."""
    model = start(VARIANTS[variant], architecture).model
    rows = {name: -(-len(p) // 2) * p[0].numel() * p.element_size() for name, p in model.named_parameters()}
    layers = sum(size for name, size in rows.items() if LAYER.search(name))
    for rank in seen((variant, architecture)):
        for sent in rank["sent"]:
            gradients = sum(2 * rows[name] for name in sent["active"])
            least = sent["passes"] * (sum(rows.values()) + gradients) + WORDS
            most = least + sent["passes"] * layers
            if LAST.issuperset(sent["active"]):  # no layer is on the way back, though one may be fetched ahead
                assert least <= sent["bytes"] < most
            else:
                assert sent["bytes"] == most
        if variant == "badam_layer":
            assert len({len(sent["active"]) for sent in rank["sent"]}) > 1, "no block has followed another"


def same_logits(export: Path, run: Run, architecture: str) -> None:
    """The export, loaded as users load it, against the model that one plain worker has trained."""
    rebuilt: nn.Module
    if run.strategy.traits().trains_base:
        rebuilt = AutoModelForCausalLM.from_pretrained(export)
    else:
        rebuilt = PeftModel.from_pretrained(build(ARCHITECTURES[architecture]), export)
    ids = torch.randint(3, VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(1))
    causal_lm(run.model).set_attn_implementation("sdpa")
    with torch.no_grad():
        expected, got = run.model.eval()(input_ids=ids).logits, rebuilt.eval()(input_ids=ids).logits
    assert float((got - expected).abs().max()) <= 1e-4 * float(expected.max() - expected.min())


@pytest.mark.parametrize(("variant", "architecture"), CELLS)
def test_a_run_goes_on_bit_for_bit(seen: Seen, variant: str, architecture: str) -> None:
    first, second = seen((variant, architecture))
    for rank in (first, second):
        assert rank["again"] == list(zip(rank["losses"], rank["hashes"], strict=True))[SAVED:]
        assert len({prints["weights"] for prints in rank["hashes"]}) == UPDATES
    assert first["hashes"] == second["hashes"]


@pytest.mark.parametrize(("variant", "name"), BF16_CELLS)
def test_bf16_rounds_elsewhere_and_no_more(seen: Seen, variant: str, name: str) -> None:
    """Layers are gathered in bf16, so their norms' weights are rounded too; a plain worker keeps these in fp32."""
    run, steps = plain(variant, "llama", PRECISIONS[name])
    first, _ = seen((variant, name))
    assert first["losses"] == pytest.approx([step.loss for step, _ in steps], abs=1e-2)
    assert first["norms"] == pytest.approx([step.grad_norm for step, _ in steps], rel=2e-2)
    assert 0.0 < distance(first["moved"], run) <= 0.1
    for rank in seen((variant, name)):
        assert rank["again"] == list(zip(rank["losses"], rank["hashes"], strict=True))[SAVED:]
        assert all(mine <= 0.6 * all_of_it for mine, (_, all_of_it) in zip(rank["moments"], steps, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("cell", LONG, ids="-".join)
def test_forty_updates_equal_one_plain_worker(seen: Seen, cell: tuple[str, str]) -> None:
    run, steps = plain(*cell, updates=LONG_UPDATES)
    first, second = seen(("long", *cell))
    assert len(first["losses"]) == LONG_UPDATES
    assert first["losses"] == second["losses"]
    assert first["losses"] == pytest.approx([step.loss for step, _ in steps], abs=1e-5)
    assert first["norms"] == pytest.approx([step.grad_norm for step, _ in steps], rel=1e-4)
    assert 0.0 < distance(first["moved"], run) <= 1e-4


def test_activations_computed_again_change_nothing(seen: Seen) -> None:
    (checkpointed, _), (kept, _) = seen("checkpointed"), seen(("lora", "llama"))
    assert checkpointed["losses"] == pytest.approx(kept["losses"], abs=1e-6)
    assert torch.allclose(checkpointed["moved"], kept["moved"], atol=1e-6)
    assert checkpointed["bytes"] >= kept["bytes"]


def test_a_rank_without_samples_passes_blanks_through(seen: Seen) -> None:
    run, steps = plain("full", "gpt2", global_batch=1)
    first, second = seen("one row")
    assert first["losses"] == second["losses"]
    assert first["losses"] == pytest.approx([step.loss for step, _ in steps], abs=1e-5)
    assert distance(first["moved"], run) <= 1e-4


def test_no_more_than_a_share_is_in_memory_while_loading(seen: Seen) -> None:
    whole = local_bytes(p.detach() for p in build(ARCHITECTURES["llama"]).parameters())
    for rank in seen("loading"):
        assert 0.4 * whole <= rank["kept"] <= rank["most"] <= 0.6 * whole


@pytest.mark.slow
def test_the_system_sees_no_more_than_a_share_either(tmp_path: Path) -> None:
    """Rank 0 has just made the whole model, so some of its memory may be reused; rank 1 starts from nothing."""
    _, second = _pair(tmp_path, module="tests.contract.sharded_load")
    assert second["whole"] > 3e8
    assert 0.4 * second["whole"] <= second["kept"] <= second["most"] <= 0.6 * second["whole"]


def test_ranks_agree_on_what_one_of_them_knows(seen: Seen) -> None:
    run = start(Full(), "llama", rows=MemoryRows(count=7))
    loss = evaluate(run.engine, objective(run.model, FP32), run.feed)
    for rank in seen("agreed"):
        assert rank["evaluated"] == pytest.approx(loss, abs=1e-5)
        assert rank["stopped"] == [(1, True)]
        assert "The gradient of step 9 is not finite" in rank["failed"]
        assert rank["unmoved"]
    assert [rank["unread"] for rank in seen("agreed")] == [
        "Worker 1 cannot read its part of the checkpoint: resume from another checkpoint.",
        "The file is damaged.",
    ]


def go_on_alone(cell: tuple[str, str], folder: Path, checkpoint: str, saved: torch.Tensor) -> ShardedRun:
    """One rank that stands where two have saved."""
    variant, architecture = cell
    run = start_sharded(VARIANTS[variant], folder / "models" / architecture, **arguments(variant, architecture))
    notices = load(folder / checkpoint, run.state).notices
    assert "written by 2 workers and 1 continue" in notices[0]
    assert torch.equal(run.moved(), saved)
    return run


@pytest.mark.parametrize("cell", GROWN, ids="-".join)
def test_one_worker_goes_on_from_the_files_of_two(
    seen: Seen, folders: dict[str, Path], tmp_path: Path, cell: tuple[str, str]
) -> None:
    first, _ = seen(cell)
    with alone(tmp_path):
        run = go_on_alone(cell, folders["quick"], "-".join(cell), first["saved"])
        losses = [step.loss for step in run.steps(first=SAVED)]
        moved = run.moved().detach()
    assert losses == pytest.approx(first["losses"][SAVED:], abs=1e-5)
    assert float((moved - first["moved"]).norm() / first["moved"].norm()) <= 1e-4


@pytest.mark.parametrize("cell", GROWN, ids="-".join)
def test_workers_come_and_go_and_the_losses_stay(
    seen: Seen, folders: dict[str, Path], begun: Begun, tmp_path: Path, cell: tuple[str, str]
) -> None:
    """One rank, then two, then one again, each from the files of the one before: as one plain worker all the way."""
    losses, moved = begun[cell]
    first, second = seen(("grown", *cell))
    assert "written by 1 worker and 2 continue" in first["notices"][0]
    assert torch.equal(first["began"], moved)
    assert first["losses"] == second["losses"]
    with alone(tmp_path):
        run = go_on_alone(cell, folders["quick"], "-".join(cell) + "-grown", first["saved"])
        losses = [*losses, *first["losses"], *(step.loss for step in run.steps(first=SAVED))]
        moved = run.moved().detach()
    undisturbed, steps = plain(*cell)
    assert losses == pytest.approx([step.loss for step, _ in steps], abs=1e-5)
    assert 0.0 < distance(moved, undisturbed) <= 1e-4


@pytest.mark.parametrize(
    "name",
    [
        *(f"{what}-0000{rank}-of-00002.safetensors" for what in ("weights", "optimizer") for rank in (0, 1)),
        *("buffers.safetensors", "optimizer.pt"),
    ],
)
def test_a_missing_or_damaged_file_is_one_sentence(
    seen: Seen, folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """Of either rank: whoever goes on needs rows of both."""
    assert seen(("full", "llama"))
    folder = folders["quick"]
    file = shutil.copytree(folder / "full-llama", tmp_path / "checkpoint") / name
    content = file.read_bytes()
    with alone(tmp_path):
        run = start_sharded(VARIANTS["full"], folder / "models" / "llama", **arguments("full", "llama"))
        for changed in (content[: len(content) // 2], b"", None):
            file.unlink()
            if changed is not None:
                file.write_bytes(changed)
            with pytest.raises(Refused, match=rf"{name} is (missing|damaged)") as refusal:
                load(tmp_path / "checkpoint", run.state)
            assert "\n" not in str(refusal.value)
            assert str(refusal.value).endswith("resume from another checkpoint.")


def test_a_group_of_one_equals_the_plain_engine(folders: dict[str, Path], tmp_path: Path) -> None:
    with alone(tmp_path):
        run = start_sharded(VARIANTS["full"], folders["quick"] / "models" / "llama", **arguments("full", "llama"))
        losses = [step.loss for step in run.steps()]
        moved = run.moved().detach()
    one, steps = plain("full", "llama")
    assert losses == pytest.approx([step.loss for step, _ in steps], abs=1e-5)
    assert distance(moved, one) <= 1e-4
