"""ZeRO on two workers is one plain worker: losses, gradient norms and weights; parts are parts, and resumes exact."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.group import run_group
from tests.training.deepspeed_files import FILES
from tests.training.tiny import ARCHITECTURES, build
from tests.worker.alone import run_alone
from tests.worker.zero_cells import (
    LOGGED,
    LONG,
    LONG_KEYS,
    METHODS,
    OTHERS_QUICK,
    OTHERS_SLOW,
    QUICK,
    SLOW,
    Keys,
    zero,
)
from transformers import LlamaConfig, LlamaForCausalLM

from tunefleet.artifacts.metrics import read_metrics
from tunefleet.recipe.read import read_flat

Seen = list[dict[str, Any]]
"""What each rank saw of a cell."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, quickstart_world: Path) -> tuple[Path, Keys]:
    folder = tmp_path_factory.mktemp("zero")
    keys: Keys = {
        "model_name_or_path": str(tiny_model),
        "dataset": "quickstart_train",
        "dataset_dir": str(quickstart_world / "data"),
        "cache_dir": str(quickstart_world / "cache"),
        "cutoff_len": 64,
        "finetuning_type": "full",
        "ray_storage_path": str(folder / "runs"),
        "resources_per_worker": {"CPU": 1},
        "report_to": "none",
        "plot_loss": False,
        "seed": 1,
        # Every third batch has three rows: two for one worker, and one and a blank micro-batch for the other.
        "max_samples": 15,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 3,
        "max_steps": 6,
        "learning_rate": 3e-3,
        "warmup_ratio": 0.2,
        "max_grad_norm": 0.5,
        "adam_epsilon": 1e-6,
        "save_strategy": "no",
        "logging_steps": 1,
        "bf16": False,
    }
    return folder, keys


def train(
    world: tuple[Path, Keys],
    workers: int,
    cells: Mapping[str, Keys],
    stops: Mapping[str, int],
    harms: Mapping[str, Mapping[str, str]] | None = None,
) -> None:
    """Let so many ranks train every cell; what they saw lies in the folder afterwards.

    Args:
        harms: what is done to a checkpoint before a cell begins.
    """
    folder, common = world
    written = {
        name: {"keys": {**common, "ray_num_workers": workers, **own_names(folder, name), **keys}}
        | ({"stop_at": stops[name]} if name in stops else {})
        | ({"harm": harms[name]} if harms and name in harms else {})
        for name, keys in cells.items()
    }
    (folder / "cells.json").write_text(json.dumps(written))
    (folder / "meet").unlink(missing_ok=True)
    # What is freed goes back to the system at once, so that memory in use is what is alive.
    malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    ranks = [["tests.worker.zero_ranks", str(rank), str(workers), str(folder)] for rank in range(workers)]
    run_group(ranks, seconds=900, environment=malloc)


def own_names(folder: Path, name: str) -> Keys:
    return {"output_dir": str(folder / name), "ray_run_name": name}


def seen(world: tuple[Path, Keys], name: str, workers: int = 2) -> Seen:
    return [json.loads((world[0] / f"{name}.{rank}.json").read_text()) for rank in range(workers)]


def exported(world: tuple[Path, Keys], name: str) -> dict[str, torch.Tensor]:
    model = world[0] / "runs" / name / "model"
    (file,) = model.glob("*.safetensors")
    return load_file(file)


def plain(world: tuple[Path, Keys], name: str, keys: Keys, workers: int = 2) -> list[dict[str, Any]]:
    """The lines of the same run with one plain worker, trained in this process the first time it is asked for."""
    folder, common = world
    record = folder / "runs" / name / "record"
    if not record.exists():
        # The same global batch on one worker: the planned number of workers goes into the accumulation.
        steps = common["gradient_accumulation_steps"] * workers
        own = {**own_names(folder, name), "gradient_accumulation_steps": steps}
        run_alone(read_flat({**common, **keys, **own, "ray_num_workers": 1}), folder)
    return [line for line in read_metrics(record / "metrics.jsonl") if "loss" in line]


def assert_equal_to_plain(
    world: tuple[Path, Keys], cell: str, method: str, *, workers: int = 2, reference: str = "", **more: Any
) -> None:
    """E2 of the rules of exactness: losses, norms, and how far the weights have come.

    Args:
        reference: the name of the run with one plain worker; that of the method, if empty.
        more: what the cell writes beside its method and its engine.
    """
    assert "error" not in seen(world, cell, workers)[0], seen(world, cell, workers)[0]
    reference = reference or f"plain_{method}"
    lines = plain(world, reference, METHODS[method] | more, workers)
    first = seen(world, cell, workers)[0]
    assert all(rank["losses"] == first["losses"] for rank in seen(world, cell, workers))
    assert first["losses"] == pytest.approx([line["loss"] for line in lines], abs=1e-5)
    assert first["norms"] == pytest.approx([line["grad_norm"] for line in lines], rel=1e-4)
    assert max(first["norms"]) > 0.5 or "lora" in method or "pissa" in method or method == "dora"
    assert first["rates"] == pytest.approx([line["learning_rate"] for line in lines])
    assert_weights_equal(world, cell, reference, Path((world[1] | more)["model_name_or_path"]))


def assert_weights_equal(world: tuple[Path, Keys], run: str, reference: str, model: Path) -> None:
    """What two runs export is no further apart than a ten-thousandth of the way that the weights have come."""
    ours, expected = exported(world, run), exported(world, reference)
    start = load_file(model / "model.safetensors")
    assert ours.keys() == expected.keys()
    moved = torch.cat([(expected[name] - start.get(name, torch.zeros(()))).flatten() for name in expected])
    apart = torch.cat([(ours[name] - expected[name]).flatten() for name in expected])
    assert float(apart.norm()) <= 1e-4 * float(moved.norm()) > 0


RESUMED = {"full_3": METHODS["full"], "badam_3": METHODS["badam"]}
"""Cells that are stopped after their fifth step (BAdam: in the middle of its third turn) and continued."""


@pytest.fixture(scope="module")
def quick(world: tuple[Path, Keys]) -> tuple[Path, Keys]:
    cells = {name: METHODS[method] | {"deepspeed": zero(stage) | LOGGED} for name, (method, stage) in QUICK.items()}
    cells |= others(world, OTHERS_QUICK)
    evaluated = {"eval_dataset": "quickstart_heldout", "eval_strategy": "steps", "eval_steps": 3}
    cells["full_3_bf16"] = {"deepspeed": zero(3), "bf16": True} | evaluated
    cells["explodes"] = {"deepspeed": zero(2), "learning_rate": 1e30, "warmup_ratio": 0.0}
    stops = {}
    for name, keys in RESUMED.items():
        halves = keys | {"deepspeed": zero(3), "save_strategy": "steps", "ray_run_name": f"halves_{name}"}
        cells |= {f"{name}_stopped": halves, f"{name}_continued": halves}
        stops[f"{name}_stopped"] = 4
    cells |= damaged("zero3", {"deepspeed": zero(3)})
    train(world, 2, cells, stops | {"damaged_zero3_stopped": 4}, harms("zero3", "optimizer-2-of-2.pt"))
    return world


def others(world: tuple[Path, Keys], cells: Mapping[str, tuple[str, str, int]]) -> dict[str, Keys]:
    """Cells on other architectures, whose models are written first."""
    return {
        name: METHODS[method] | {"deepspeed": zero(stage), "model_name_or_path": model_of(world, architecture)}
        for name, (method, architecture, stage) in cells.items()
    }


def model_of(world: tuple[Path, Keys], architecture: str) -> str:
    """A tiny model of an architecture, with the tokenizer that there is."""
    folder = world[0] / "models" / architecture
    if not folder.exists():
        shutil.copytree(world[1]["model_name_or_path"], folder, ignore=shutil.ignore_patterns("*.safetensors"))
        model = build(ARCHITECTURES[architecture])
        model.resize_token_embeddings(512, mean_resizing=False)
        model.save_pretrained(folder)
    return str(folder)


def damaged(engine: str, keys: Keys) -> dict[str, Keys]:
    """A run that stops, one that goes on as it, and two that begin with its newest checkpoint by name."""
    saving = keys | {"save_strategy": "steps", "save_steps": 2, "ray_run_name": f"damaged_{engine}"}
    newest = f"runs/damaged_{engine}/checkpoints/step_00000005"
    return {
        f"damaged_{engine}_stopped": saving,
        f"damaged_{engine}_sealed": keys | {"resume_from_checkpoint": f"sealed_{engine}/step_00000005"},
        f"damaged_{engine}_named": keys | {"resume_from_checkpoint": newest},
        f"damaged_{engine}_continued": saving,
    }


def harms(engine: str, file: str) -> dict[str, dict[str, str]]:
    """First a copy that is cut short in the second rank's part and sealed like that; then a bit of the checkpoint."""
    newest = {"checkpoint": f"runs/damaged_{engine}/checkpoints/step_00000005", "file": file}
    return {
        f"damaged_{engine}_sealed": newest | {"copy": f"sealed_{engine}/step_00000005"},
        f"damaged_{engine}_named": newest,
    }


@pytest.mark.parametrize("cell", QUICK)
def test_two_workers_under_zero_equal_one_plain_worker(quick: tuple[Path, Keys], cell: str) -> None:
    assert_equal_to_plain(quick, cell, QUICK[cell][0])


@pytest.mark.parametrize("cell", OTHERS_QUICK)
def test_other_architectures_equal_one_plain_worker(quick: tuple[Path, Keys], cell: str) -> None:
    method, architecture, _ = OTHERS_QUICK[cell]
    assert_equal_to_plain(
        quick,
        cell,
        method,
        reference=f"plain_{method}_{architecture}",
        model_name_or_path=model_of(quick, architecture),
    )


def assert_damage_is_told(world: tuple[Path, Keys], engine: str, file: str, undisturbed: str) -> None:
    """What can be told before loading is told of the name; else by the rank that reads it, and no other waits for it.

    Without a name the run goes on from the checkpoint before.
    """
    for rank in seen(world, f"damaged_{engine}_named"):
        assert rank["error"].startswith("Refused: ")
        assert f"is not whole (the content of {file} changed): name another checkpoint." in rank["error"]
    told = [rank["error"] for rank in seen(world, f"damaged_{engine}_sealed")]
    assert all(one.startswith("Refused: ") and "\n" not in one for one in told)
    assert f"{file} is damaged" in told[1]
    assert all(one.endswith("resume from another checkpoint.") for one in told)
    continued, whole = seen(world, f"damaged_{engine}_continued"), seen(world, undisturbed)
    assert continued[0]["losses"] == continued[1]["losses"] == whole[0]["losses"][4:]
    assert continued[0]["ending"]["executed_steps"] == len(whole[0]["losses"]) - 4
    assert continued[0]["ending"]["fingerprints"] == whole[0]["ending"]["fingerprints"]
    assert any(
        "step_00000005 is skipped" in said and f"the content of {file} changed" in said
        for said in continued[0]["messages"]
    )


def test_a_damaged_part_is_refused_or_the_checkpoint_before_is_taken(quick: tuple[Path, Keys]) -> None:
    assert_damage_is_told(quick, "zero3", "optimizer-2-of-2.pt", "full_3")


PASSES = (3, 3, 2)
"""Micro-batches of a rank: of six rows, of six, and of the three that are left; then again."""
WORDS = 2 * 8
"""Bytes of our own for each update: the loss and the wish to stop."""


def entries_of(world: tuple[Path, Keys], cell: str) -> list[int]:
    """What trains at each update."""
    updates = len(seen(world, cell)[0]["losses"])
    if cell.startswith("badam"):
        sizes = block_entries(world[1]["model_name_or_path"])
        return [sizes[update // 2 % 4] for update in range(updates)]
    return updates * [sum(tensor.numel() for tensor in exported(world, cell).values())]


def sent_for(world: tuple[Path, Keys], cell: str) -> Iterator[tuple[int, int, dict[str, int]]]:
    """For each update of each rank: its passes, the bytes of what trains in fp32, and what was sent."""
    for rank in seen(world, cell):
        for update, (entries, sent) in enumerate(zip(entries_of(world, cell), rank["sent"], strict=True)):
            # A word for the norm of each group, of 4 bytes or 8, is all that DeepSpeed adds.
            assert sent["engine"] == WORDS + sum(number for kind, number in sent.items() if kind != "engine")
            yield PASSES[update % 3], 4 * entries, sent


@pytest.mark.parametrize("cell", ["full_2", pytest.param("lora_2_logged", marks=pytest.mark.slow)])
def test_zero_2_sends_gradients_of_what_trains_for_each_pass_and_gathers_it_once(
    request: pytest.FixtureRequest, cell: str
) -> None:
    """Over gloo DeepSpeed sums a gradient whole; each rank gives its half of what the update has made."""
    world = request.getfixturevalue("quick" if cell in QUICK else "slow")
    for passes, size, sent in sent_for(world, cell):
        assert 0 < sent["all_reduce"] - passes * size <= 16
        assert sent["all_gather_into_tensor"] == size // 2
        assert sent.keys() == {"all_reduce", "all_gather_into_tensor", "engine"}


@pytest.mark.parametrize("cell", ["full_3", "lora_3", "badam_3"])
def test_zero_3_sends_gradients_of_what_trains_for_each_pass_and_gathers_weights_twice(
    quick: tuple[Path, Keys], cell: str
) -> None:
    whole = 4 * block_sum(quick) + (4 * entries_of(quick, cell)[0] if cell == "lora_3" else 0)
    gathered = []
    for passes, size, sent in sent_for(quick, cell):
        assert sent["reduce_scatter_tensor"] == passes * size
        gathered.append((passes, sent["all_gather_into_tensor"]))
    # Before each pass, and before its way back, a rank gives its half of the weights; norms, kept whole, after it.
    # A turn that begins may gather once more what it trains, which is less than all of it.
    most = [whole if cell == "badam_3" and update % 2 else 0 for update in range(len(gathered) // 2)] * 2
    assert all(
        0 < one <= (passes * 2 * whole + 4 * 320 + turn) // 2
        for turn, (passes, one) in zip(most, gathered, strict=True)
    )
    if cell == "full_3":
        passes, last = gathered[-1]
        assert last == (passes * 2 * (whole - 4 * 320) + 4 * 320) // 2


@pytest.mark.parametrize("cell", ["full_3", "badam_3"])
def test_an_update_leaves_no_gradient_for_the_next(quick: tuple[Path, Keys], cell: str) -> None:
    """A parameter that the next update does not touch would be stepped by it again."""
    for rank in seen(quick, cell):
        assert rank["left"] == [0.0] * len(rank["losses"])


def test_bf16_is_near_fp32(quick: tuple[Path, Keys]) -> None:
    """Masters in fp32: what bf16 passes round away is no more than their own 8 bits."""
    mixed, exact = seen(quick, "full_3_bf16")[0], seen(quick, "full_3")[0]
    assert mixed["losses"] == pytest.approx(exact["losses"], rel=2e-3)
    assert mixed["losses"] != exact["losses"]
    assert mixed["norms"] == pytest.approx(exact["norms"], rel=2e-2)
    assert mixed["kept"][-1]["masters"] > 0
    assert {tensor.dtype for tensor in exported(quick, "full_3_bf16").values()} == {torch.bfloat16}


def test_a_gradient_that_is_not_finite_ends_the_run_on_all_workers(quick: tuple[Path, Keys]) -> None:
    for rank in seen(quick, "explodes"):
        assert rank["error"].startswith("RunFailed: The gradient of step 2 is not finite")


def test_each_worker_holds_its_part_of_the_model(quick: tuple[Path, Keys]) -> None:
    for cell in ("full_3", "lora_3", "badam_3", "full_3_bf16"):
        for rank in seen(quick, cell):
            assert all(kept["parameters"] <= 0.6 * kept["whole"] for kept in rank["kept"]), cell
    assert all(kept["parameters"] == kept["whole"] for kept in seen(quick, "full_2")[0]["kept"])


def test_moments_are_shared_out(quick: tuple[Path, Keys]) -> None:
    for cell in ("full_2", "full_3"):
        whole = seen(quick, cell)[0]["kept"][-1]["whole"]
        assert all(rank["kept"][-1]["moments"] == pytest.approx(whole, rel=0.02) for rank in seen(quick, cell))


def test_badam_keeps_state_of_the_active_block_only(quick: tuple[Path, Keys]) -> None:
    """At a switch nothing of the block before is left, on either worker."""
    sizes = block_entries(quick[1]["model_name_or_path"])
    for rank in seen(quick, "badam_3"):
        for applied, kept in enumerate(rank["kept"], start=1):
            entries = sizes[applied // 2 % 4] / 2  # on each of two workers
            assert kept["masters"] == pytest.approx(4 * entries, rel=0.05)
            # Behind a switch the next block stands ready, without moments.
            assert kept["moments"] == pytest.approx(8 * entries if applied % 2 else 0, rel=0.05)


def test_the_plan_says_what_each_worker_keeps(quick: tuple[Path, Keys]) -> None:
    for cell in ("full_2", "full_3", "lora_3", "badam_3", "full_3_bf16"):
        first = seen(quick, cell)[0]
        most = max(kept["moments"] + kept["masters"] for kept in first["kept"])
        assert first["planned"]["weight_bytes"] == pytest.approx(first["kept"][0]["parameters"], rel=0.02), cell
        assert first["planned"]["optimizer_bytes"] == pytest.approx(most, rel=0.05), cell


def block_entries(model: str) -> list[int]:
    """Entries of BAdam's blocks: embedding, the two layers, head with the final norm."""
    weights = load_file(Path(model) / "model.safetensors")
    sizes = [0, 0, 0, 0]
    for name, weight in weights.items():
        place = 0 if "embed" in name else 1 if ".layers.0." in name else 2 if ".layers.1." in name else 3
        sizes[place] += weight.numel()
    return sizes


@pytest.mark.parametrize("cell", RESUMED)
def test_stopped_and_continued_is_as_if_nothing_had_happened(quick: tuple[Path, Keys], cell: str) -> None:
    whole, stopped, continued = seen(quick, cell), seen(quick, f"{cell}_stopped"), seen(quick, f"{cell}_continued")
    assert stopped[0]["ending"]["stopped"]
    done = len(stopped[0]["losses"])
    assert 0 < done < len(whole[0]["losses"])
    for rank in (0, 1):
        assert stopped[rank]["losses"] + continued[rank]["losses"] == whole[rank]["losses"]
    assert continued[0]["ending"]["executed_steps"] == len(whole[0]["losses"]) - done
    assert continued[0]["ending"]["fingerprints"] == whole[0]["ending"]["fingerprints"]


@pytest.fixture(scope="module")
def slow(world: tuple[Path, Keys]) -> tuple[Path, Keys]:
    cells = {name: METHODS[method] | {"deepspeed": zero(stage)} for name, (method, stage) in SLOW.items()}
    cells |= {name: {"deepspeed": content} for name, content in FILES.items()}
    cells |= {"zero2_offload": {"deepspeed": "zero2_offload"}, "zero3_offload": {"deepspeed": "zero3_offload"}}
    for stage in (1, 2, 3):
        cells[f"mixed_{stage}"] = {"deepspeed": zero(stage), "bf16": True}
    for stage in (2, 3):
        cells[f"pure_{stage}"] = {"deepspeed": zero(stage), "bf16": None, "pure_bf16": True}
    cells["lora_2_logged"] = METHODS["lora"] | {"deepspeed": zero(2) | LOGGED}
    cells["badam_mixed"] = METHODS["badam"] | {"deepspeed": zero(3), "bf16": True}
    cells["badam_pure"] = METHODS["badam"] | {"deepspeed": zero(3), "bf16": None, "pure_bf16": True}
    cells |= others(world, OTHERS_SLOW)
    cells |= {name: METHODS[method] | {"deepspeed": zero(stage)} | LONG_KEYS for name, (method, stage) in LONG.items()}
    cells |= {"fsdp2_undisturbed": {"sharding": "fsdp2"}} | damaged("fsdp2", {"sharding": "fsdp2"})
    train(world, 2, cells, {"damaged_fsdp2_stopped": 4}, harms("fsdp2", "weights-00001-of-00002.safetensors"))
    return world


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("cell", SLOW)
def test_every_method_and_stage_equals_one_plain_worker(slow: tuple[Path, Keys], cell: str) -> None:
    assert_equal_to_plain(slow, cell, SLOW[cell][0])


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("cell", [*FILES, "zero2_offload", "zero3_offload"])
def test_llama_factorys_files_and_our_names_equal_one_plain_worker(slow: tuple[Path, Keys], cell: str) -> None:
    assert_equal_to_plain(slow, cell, "full")


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_number_formats_of_every_stage(slow: tuple[Path, Keys]) -> None:
    exact = [line["loss"] for line in plain(slow, "plain_full", {})]
    for cell in ("mixed_1", "mixed_2", "mixed_3", "pure_2", "pure_3"):
        first = seen(slow, cell)[0]
        assert first["losses"] == pytest.approx(exact, rel=3e-3), cell
        assert first["kept"][-1]["whole"] == 2 * block_sum(slow)
    assert seen(slow, "mixed_3")[0]["kept"][-1]["masters"] == pytest.approx(2 * block_sum(slow), rel=0.02)
    assert seen(slow, "pure_3")[0]["kept"][-1]["moments"] == pytest.approx(2 * block_sum(slow), rel=0.02)
    exact = [line["loss"] for line in plain(slow, "plain_badam", METHODS["badam"])]
    for cell, itemsize in (("badam_mixed", 4), ("badam_pure", 2)):
        first = seen(slow, cell)[0]
        assert first["losses"] == pytest.approx(exact, rel=3e-3), cell
        assert first["kept"][-1]["whole"] == itemsize * block_sum(slow)


def block_sum(world: tuple[Path, Keys]) -> int:
    return sum(block_entries(world[1]["model_name_or_path"]))


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_badam_under_zero_on_one_worker_and_no_parts_of_two(quick: tuple[Path, Keys]) -> None:
    checkpoint = quick[0] / "runs" / "halves_full_3" / "checkpoints" / "step_00000005"
    cells = {
        "badam_one": METHODS["badam"] | {"deepspeed": zero(3)},
        "elsewhere": {"deepspeed": zero(3), "resume_from_checkpoint": str(checkpoint)},
    }
    train(quick, 1, cells, {})
    first = seen(quick, "badam_one", 1)[0]
    lines = plain(quick, "plain_badam_one", METHODS["badam"], workers=1)
    assert first["losses"] == pytest.approx([line["loss"] for line in lines], abs=1e-5)
    said = seen(quick, "elsewhere", 1)[0]["error"]
    assert "shared out by ZeRO over 2 workers and 1 continue" in said
    assert said.endswith("write ray_num_workers: 2.")


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("cell", OTHERS_SLOW)
def test_every_architecture_equals_one_plain_worker(slow: tuple[Path, Keys], cell: str) -> None:
    method, architecture, _ = OTHERS_SLOW[cell]
    assert_equal_to_plain(
        slow, cell, method, reference=f"plain_{method}_{architecture}", model_name_or_path=model_of(slow, architecture)
    )


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("cell", LONG)
def test_forty_updates_equal_one_plain_worker(slow: tuple[Path, Keys], cell: str) -> None:
    method, _ = LONG[cell]
    assert_equal_to_plain(slow, cell, method, reference=f"plain_long_{method}", **LONG_KEYS)
    assert len(seen(slow, cell)[0]["losses"]) == LONG_KEYS["max_steps"]


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_a_damaged_part_under_fsdp2_too(slow: tuple[Path, Keys]) -> None:
    assert_damage_is_told(slow, "fsdp2", "weights-00001-of-00002.safetensors", "fsdp2_undisturbed")


ELASTIC = ("full", "lora", "badam")


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_an_elastic_run_under_fsdp2_is_one_run_whatever_workers_it_has(world: tuple[Path, Keys]) -> None:
    """Two workers, then one, then two again: all that a worker does, without Ray."""
    parts: dict[str, list[Seen]] = {method: [] for method in ELASTIC}
    for attempt, (workers, stop_at) in enumerate(((2, 2), (1, 4), (2, None))):
        cells: dict[str, Keys] = {}
        stops: dict[str, int] = {}
        for method in ELASTIC:
            name = f"elastic_{method}_{attempt}"
            own = {"sharding": "fsdp2", "ray_num_workers": [1, 2], "ray_run_name": f"elastic_{method}"}
            cells[name] = METHODS[method] | own | {"save_strategy": "steps"}
            stops |= {} if stop_at is None else {name: stop_at}
        train(world, workers, cells, stops)
        for method in ELASTIC:
            parts[method].append(seen(world, f"elastic_{method}_{attempt}", workers))
    for method, attempts in parts.items():
        assert all("error" not in rank for ranks in attempts for rank in ranks), attempts
        assert [len(ranks[0]["losses"]) for ranks in attempts][:2] == [3, 2]
        lines = plain(world, f"plain_{method}", METHODS[method])
        losses = [loss for ranks in attempts for loss in ranks[0]["losses"]]
        assert losses == pytest.approx([line["loss"] for line in lines], abs=1e-5)
        for (ranks, after), before in zip(((attempts[1], 1), (attempts[2], 2)), (2, 1), strict=True):
            told = " ".join(ranks[0]["messages"])
            assert f"written by {before} worker{'s' if before > 1 else ''} and {after} continue" in told
        model = Path(world[1]["model_name_or_path"])
        assert_weights_equal(world, f"elastic_{method}", f"plain_{method}", model)


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_no_worker_holds_the_whole_model_while_it_is_loaded(world: tuple[Path, Keys], tmp_path: Path) -> None:
    """Memory from the first byte of loading to the finished engine, on a model that everything else is small beside."""
    tiny = Path(world[1]["model_name_or_path"])
    config = LlamaConfig.from_pretrained(tiny)
    config.update({"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 10, "head_dim": 64})
    config.update({"num_attention_heads": 16, "num_key_value_heads": 16})
    shutil.copytree(tiny, tmp_path / "large")
    large = LlamaForCausalLM(config)
    large.save_pretrained(tmp_path / "large")
    size = sum(4 * p.numel() for p in large.parameters())
    assert size > 600e6
    del large
    cell: Keys = METHODS["lora"] | {
        "lora_target": "q_proj",
        "max_steps": 1,
        "model_name_or_path": str(tmp_path / "large"),
    }
    # By default DeepSpeed keeps whole what it needs again within 10^9 entries, which is all of so small a model.
    thrifty = zero(3, stage3_max_live_parameters=1_000_000, stage3_max_reuse_distance=0, reduce_bucket_size=1_000_000)
    cells = {"warm": {"deepspeed": thrifty, "max_steps": 1}, "large_3": cell | {"deepspeed": thrifty}}
    train(world, 2, cells | {"large_2": cell | {"deepspeed": "zero2"}}, {})
    assert all(rank["kept"][0]["parameters"] <= 0.55 * size for rank in seen(world, "large_3"))
    # Rank 0 reads pages of the file; what it has of its own shows on the other rank, where all is received.
    assert seen(world, "large_2")[1]["peak"] >= 0.95 * size, "a model that is loaded whole must be seen"
    assert max(rank["peak"] for rank in seen(world, "large_3")) <= 0.6 * size
