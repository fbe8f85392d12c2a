"""The plan as a pure function: every number of a run, and every refusal, from plain values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from torch import nn
from torch.optim import Optimizer

from tunefleet.continuation import differences, mathematics
from tunefleet.errors import Refused
from tunefleet.hardware import Hardware
from tunefleet.plan import Plan, batch_schedule
from tunefleet.planning import _refuse_elastic, make_plan, planned_precision, planned_workers
from tunefleet.recipe.read import read_flat
from tunefleet.recipe.sections import Recipe
from tunefleet.shapes import SINGLE_WORKER, ClusterShape, DataShape, NodeShape, NodeType, SplitShape, at_most
from tunefleet_strategies.contract import (
    AttachContext,
    Domain,
    Footprint,
    ModelShape,
    OptimizerSpec,
    ParameterShape,
    Precision,
    Sharding,
    Strategy,
    Traits,
)
from tunefleet_strategies.errors import StrategyError
from tunefleet_strategies.parts import Anatomy

BASE: dict[str, object] = {
    "model_name_or_path": "base",
    "dataset": "rows.jsonl",
    "output_dir": "outputs/first",
    "finetuning_type": "full",
}
SHAPE = ModelShape(
    "TinyForCausalLM",
    vocab_size=10,
    hidden_size=4,
    layers=1,
    parameters=(ParameterShape("embed", (10, 4), True), ParameterShape("head", (4, 10), False)),
)
DECODER = ModelShape(
    architecture="TwoLayers",
    vocab_size=10,
    hidden_size=4,
    layers=2,
    parameters=tuple(ParameterShape(f"layers.{layer}.up.weight", (8, 4), True) for layer in (0, 1)),
    anatomy=Anatomy(
        layers=("layers.0", "layers.1"),
        linears=("layers.0.up", "layers.1.up"),
        fused=(),
        outside=(),
        embeddings=(),
        heads=(),
        tied=None,
    ),
)
SHAPED = replace(
    SHAPE,
    parameters=(*SHAPE.parameters, ParameterShape("layers.0.up.weight", (4, 4), True)),
    anatomy=Anatomy(("layers.0",), ("layers.0.up",), (), ("embed",), ("embed",), (), None),
)
PLAIN, WITH_BF16 = Hardware("cpu", bf16=False), Hardware("cpu", bf16=True)
GPU = Hardware("cuda", bf16=True)
LAPTOP = ClusterShape((NodeShape(cpus=4),), cpu=PLAIN)
GPU_NODE = ClusterShape((NodeShape(cpus=8, gpus=2),), cpu=PLAIN, gpu=GPU)


class Picky(Strategy):
    """A method whose traits forbid most things."""

    name: ClassVar[str] = "picky"
    summary: ClassVar[str] = "one worker, no accumulation"
    selector: ClassVar[Mapping[str, object]] = {"finetuning_type": "picky"}

    def traits(self) -> Traits:
        return Traits(max_workers=1, accumulation=False, resumable=False)

    def attach(self, model: nn.Module, context: AttachContext) -> nn.Module:
        return model

    def optimizer(self, model: nn.Module, spec: OptimizerSpec) -> Optimizer:
        raise NotImplementedError

    def footprint(self, shape: ModelShape, precision: Precision) -> Footprint:
        return Footprint(weights=shape.total, gradients=shape.trainable, optimizer_state=7)

    def search_space(self) -> dict[str, Domain]:
        return {}

    def export(self, model: nn.Module, folder: Path, initial: Mapping[str, object]) -> None:
        raise NotImplementedError


def recipe(**keys: object) -> Recipe:
    return read_flat(BASE | keys)


def picky(**keys: object) -> Recipe:
    return recipe(**keys).model_copy(update={"method": Picky()})


def data(rows: int = 100, digest: str = "abc") -> DataShape:
    return DataShape(SplitShape(rows, rows * 9, rows * 5), SplitShape(7, 70, 30), train_sha256=digest, bad_rows=2)


def planned(
    cluster: ClusterShape = LAPTOP,
    rows: int | None = 100,
    digest: str = "abc",
    notices: tuple[str, ...] = (),
    **keys: object,
) -> Plan:
    shape = None if rows is None else data(rows, digest)
    return make_plan(recipe(**keys), SHAPE, shape, cluster, "/work", notices)


def refusal(read: Recipe, cluster: ClusterShape = LAPTOP, shape: ModelShape = SHAPE) -> str:
    with pytest.raises((Refused, StrategyError)) as caught:
        make_plan(read, shape, data(), cluster, "/work")
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


# ---- batch and updates ----------------------------------------------------------------------------------------------


def test_the_global_batch_is_micro_batch_times_accumulation_times_workers() -> None:
    batch = planned(per_device_train_batch_size=3, gradient_accumulation_steps=4, ray_num_workers=2).batch
    assert (batch.micro_batch_samples, batch.accumulation, batch.global_batch_samples) == (3, 4, 24)
    assert batch.updates_per_epoch == 5, "100 rows, the last batch short"


@pytest.mark.parametrize(
    ("keys", "rows", "updates"),
    [
        *(({"num_train_epochs": 1}, 80, 10), ({"num_train_epochs": 1}, 81, 11), ({"num_train_epochs": 3}, 80, 30)),
        *(({"num_train_epochs": 0.5}, 80, 5), ({"num_train_epochs": 0.51}, 80, 6), ({"num_train_epochs": 1.5}, 8, 2)),
        *(
            ({"num_train_epochs": 0.001}, 8, 1),
            ({"max_steps": 7}, 80, 7),
            ({"max_steps": 7}, None, 7),
            ({}, None, None),
        ),
    ],
)
def test_updates_follow_from_steps_or_epochs(keys: dict[str, Any], rows: int | None, updates: int | None) -> None:
    assert planned(rows=rows, **keys).batch.updates == updates


@pytest.mark.parametrize(
    ("keys", "rows", "warmup"),
    [
        *(({"warmup_ratio": 0.1, "max_steps": 20}, 80, 2), ({"warmup_ratio": 0.11, "max_steps": 20}, 80, 3)),
        *(({"warmup_steps": 4, "warmup_ratio": 0.5}, 80, 4), ({"warmup_steps": 4}, None, 4), ({}, 80, 0)),
        *(({"warmup_steps": 0.1, "max_steps": 30}, 80, 3), ({"warmup_ratio": 0.1}, None, None)),
    ],
)
def test_warm_up_follows_from_steps_or_ratio(keys: dict[str, Any], rows: int | None, warmup: int | None) -> None:
    assert planned(rows=rows, **keys).batch.warmup_updates == warmup


def test_the_schedule_of_batches_depends_on_seed_and_data_alone() -> None:
    one = batch_schedule(planned(per_device_train_batch_size=8, ray_num_workers=1))
    two = batch_schedule(planned(per_device_train_batch_size=4, ray_num_workers=2, learning_rate=1))
    assert one == two
    assert (one.rows, one.global_batch, one.updates, one.seed) == (100, 8, 39, 42)
    assert batch_schedule(planned(data_seed=5)).seed == 5


@pytest.mark.parametrize("keys", [{}, {"max_steps": 3}])
def test_there_is_no_schedule_without_data(keys: dict[str, Any]) -> None:
    with pytest.raises(Refused, match="not been tokenised"):
        batch_schedule(planned(rows=None, **keys))


# ---- workers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cpus", "count", "each"),
    [
        *(((4,), 1, 4), ((4,), 2, 2), ((4,), 3, 1), ((8, 8), 2, 8), ((8, 8), 4, 4), ((8, 8), 3, 4)),
        *(((4, 2), 3, 2), ((16, 1), 2, 8), ((2.5,), 1, 2)),
    ],
)
def test_cpus_are_divided_evenly_over_the_machines(cpus: tuple[float, ...], count: int, each: int) -> None:
    cluster = ClusterShape(tuple(NodeShape(one) for one in cpus), cpu=PLAIN)
    workers = planned(cluster, ray_num_workers=count).workers
    assert (workers.device, workers.resources, workers.threads) == ("cpu", {"CPU": each}, each)


def test_each_worker_gets_a_gpu_where_there_are_any() -> None:
    workers = planned(GPU_NODE, ray_num_workers=2).workers
    assert (workers.device, workers.resources, workers.threads) == ("cuda", {"GPU": 1, "CPU": 1}, 1)


def test_written_resources_decide_device_and_threads() -> None:
    workers = planned(GPU_NODE, resources_per_worker={"CPU": 2.0}, placement_strategy="SPREAD").workers
    assert (workers.device, workers.threads, workers.placement_strategy) == ("cpu", 2, "SPREAD")
    assert planned(GPU_NODE, resources_per_worker={"CPU": 0.5, "GPU": 0.5}).workers.device == "cuda"
    assert planned(LAPTOP, resources_per_worker={"CPU": 0.5}).workers.threads == 1


def test_custom_resources_are_counted_on_each_machine() -> None:
    nodes = (NodeShape(4, others={"fast_disk": 1}), NodeShape(4, others={"fast_disk": 1}), NodeShape(4))
    cluster = ClusterShape(nodes, cpu=PLAIN)
    asked = {"CPU": 1, "fast_disk": 1}
    assert planned(cluster, ray_num_workers=2, resources_per_worker=asked).workers.count == 2
    sentence = refusal(recipe(ray_num_workers=3, resources_per_worker=asked), cluster)
    assert "at most ray_num_workers: 2" in sentence


def test_one_worker_is_never_spread_over_two_machines() -> None:
    cluster = ClusterShape((NodeShape(3), NodeShape(3)), cpu=PLAIN)
    assert cluster.cpus == 6
    assert cluster.fits({"CPU": 2}) == 2
    assert cluster.fits({"CPU": 4}) == 0


def test_parts_of_a_cpu_are_counted_without_rounding_down() -> None:
    assert 1.2 / 0.4 < 3
    assert NodeShape(1.2).fits({"CPU": 0.4}) == 3


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"ray_num_workers": 5}, ["ray_num_workers: 5", "(4 CPU, 0 GPU)", "ray_num_workers: 4 does"]),
        ({"resources_per_worker": {"GPU": 1}}, ["1 GPU", "0 GPU", "no node offers GPU, so correct or remove it"]),
        (
            {"resources_per_worker": {"CPU": 1, "fpga": 1, "tape": 2}},
            ["1 CPU, 1 fpga, 2 tape", "(4 CPU, 0 GPU, 0 fpga, 0 tape)", "no node offers fpga or tape"],
        ),
        ({"resources_per_worker": {"CPU": 9}}, ["9 CPU", "make resources_per_worker smaller"]),
        ({"ray_num_workers": [5, 8]}, ["ray_num_workers: [5, 8]", "ray_num_workers: 4 does"]),
        (
            {"ray_num_workers": [1, 3], "save_only_model": True},
            ["ray_num_workers: [1, 3]", "save_only_model: true", "write save_only_model: false"],
        ),
        ({"deepspeed": "ds.json"}, ["deepspeed: ds.json", "name a JSON file"]),
        ({"use_galore": True, "deepspeed": "zero3"}, ["galore does not run", "leave the key out"]),
        ({"use_badam": True, "deepspeed": "zero2"}, ["badam is sharded by FSDP2 and ZeRO-3 only", "asks for ZeRO-2"]),
        (
            {"deepspeed": {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 7}},
            ["train_micro_batch_size_per_gpu is 7", "per_device_train_batch_size is 8"],
        ),
        (
            {"sharding": "fsdp2", "finetuning_type": "lora", "pissa_init": True},
            ["lora with pissa_init: true is sharded by ZeRO-0", "sharding is fsdp2", "write sharding: none"],
        ),
        ({"sharding": "fsdp2", "fp16": True}, ["fp16", "sharding is fsdp2", "bf16: true"]),
        ({"fp16": True}, ["fp16", "CPU", "bf16: true"]),
    ],
)
def test_what_cannot_run_is_refused_with_a_mend(keys: dict[str, Any], said: list[str]) -> None:
    sentence = refusal(recipe(**keys))
    assert [piece for piece in said if piece not in sentence] == []


def test_the_mend_of_a_refusal_runs() -> None:
    refusal(recipe(ray_num_workers=5))
    assert planned(ray_num_workers=4).workers.count == 4
    refusal(recipe(ray_num_workers=[5, 8]))
    assert planned(ray_num_workers=[4, 8]).workers.count == 8


def test_the_batch_of_an_elastic_run_counts_its_most_workers() -> None:
    elastic = planned(per_device_train_batch_size=3, gradient_accumulation_steps=2, ray_num_workers=[1, 4])
    fixed = planned(per_device_train_batch_size=3, gradient_accumulation_steps=2, ray_num_workers=4)
    assert elastic.batch == fixed.batch
    assert (elastic.workers.least, elastic.workers.count, elastic.workers.elastic) == (1, 4, True)
    assert elastic.workers.resources == fixed.workers.resources
    assert not fixed.workers.elastic
    assert mathematics(elastic) == mathematics(fixed), "one may go on as the other"
    assert differences(mathematics(elastic), mathematics(planned(ray_num_workers=[1, 3])))


@pytest.mark.parametrize("sharding", ["zero0", "zero2", "zero3"])
def test_elastic_workers_are_refused_for_deepspeed_alone(sharding: Sharding) -> None:
    read = recipe(ray_num_workers=[1, 4])
    workers = planned(ray_num_workers=[1, 4]).workers
    with pytest.raises(Refused, match=r"\[1, 4\] lets the number .* DeepSpeed .*: write ray_num_workers: 4, or train"):
        _refuse_elastic(read, workers, sharding)
    _refuse_elastic(read, workers, "fsdp2")
    _refuse_elastic(read, planned(ray_num_workers=4).workers, sharding)


def test_a_method_for_few_workers_is_refused_more() -> None:
    sentence = refusal(picky(ray_num_workers=2))
    assert "picky" in sentence
    assert "write ray_num_workers: 1 and per_device_train_batch_size: 16 to keep the global batch" in sentence


def test_ratio_mode_runs_on_one_worker_and_says_what_would_run() -> None:
    keys: dict[str, Any] = {"finetuning_type": "full", "use_badam": True, "badam_mode": "ratio"}
    keys |= {"gradient_accumulation_steps": 3, "lora_rank": None}
    sentence = refusal(recipe(**keys, ray_num_workers=2))
    assert sentence == (
        "badam with badam_mode: ratio runs on one worker, but ray_num_workers is 2: "
        "write ray_num_workers: 1 and gradient_accumulation_steps: 6 to keep the global batch."
    )
    assert "ray_num_workers is [1, 2]: write ray_num_workers: 1" in refusal(recipe(**keys, ray_num_workers=[1, 2]))
    mended = recipe(**keys | {"gradient_accumulation_steps": 6})
    assert make_plan(mended, DECODER, data(), LAPTOP, "/work").workers.count == 1
    layer = recipe(**keys | {"badam_mode": "layer"}, ray_num_workers=2)
    assert make_plan(layer, DECODER, data(), LAPTOP, "/work").workers.count == 2


def test_a_form_of_adamw_refuses_another_optimizer() -> None:
    sentence = refusal(recipe(finetuning_type="full", use_badam=True, optim="sgd"))
    assert sentence == "badam cannot use optim: sgd; write optim: adamw_torch"
    sentence = refusal(recipe(finetuning_type="full", use_badam=True, optim="adamw_8bit"))
    assert "adamw_8bit (it belongs to optimizer_backend: upstream)" in sentence
    assert planned(finetuning_type="full", optim="sgd").model.optimizer_bytes == 0


def test_an_optimizer_without_decay_refuses_weight_decay() -> None:
    keys: dict[str, Any] = {"finetuning_type": "full", "use_badam": True, "badam_mode": "ratio", "lora_rank": None}
    keys |= {"weight_decay": 0.1, "gradient_accumulation_steps": 1}
    assert refusal(recipe(**keys, optimizer_backend="upstream")) == (
        "badam with badam_mode: ratio and optimizer_backend: upstream knows no weight decay, but weight_decay is 0.1: "
        "write weight_decay: 0."
    )
    assert make_plan(recipe(**keys), DECODER, data(), LAPTOP, "/work").recipe.training.weight_decay == 0.1


def test_what_only_the_published_ratio_mode_cannot_do_is_not_laid_on_ratio_mode() -> None:
    keys: dict[str, Any] = {"finetuning_type": "full", "use_badam": True, "badam_mode": "ratio", "lora_rank": None}
    accumulated = keys | {"gradient_accumulation_steps": 4}
    assert refusal(recipe(**accumulated, optimizer_backend="upstream")).startswith(
        "badam with badam_mode: ratio and optimizer_backend: upstream cannot accumulate gradients, but"
    )
    assert make_plan(recipe(**accumulated), DECODER, data(), LAPTOP, "/work").resumable


def test_what_only_changes_what_is_said_may_change_in_a_continued_run() -> None:
    one, other = (recipe(finetuning_type="full", use_badam=True, badam_verbose=level) for level in (0, 2))
    first, second = (mathematics(make_plan(each, DECODER, data(), LAPTOP, "/work")) for each in (one, other))
    assert differences(first, second) == []


def test_a_method_without_accumulation_is_refused_it() -> None:
    sentence = refusal(picky(gradient_accumulation_steps=4))
    assert "picky cannot accumulate" in sentence
    assert "gradient_accumulation_steps is 4" in sentence
    assert "per_device_train_batch_size" in sentence


class Hasty(Picky):
    """A method that uses each gradient at once."""

    name: ClassVar[str] = "hasty"

    def traits(self) -> Traits:
        return Traits(clipping=False)


def test_a_method_that_cannot_clip_refuses_a_written_norm_and_drops_the_default() -> None:
    def hasty(**keys: object) -> Recipe:
        return recipe(**keys).model_copy(update={"method": Hasty()})

    sentence = refusal(hasty(max_grad_norm=1.0))
    assert "hasty uses each gradient" in sentence
    assert sentence.endswith("write max_grad_norm: 0.")
    told = make_plan(hasty(), SHAPE, data(), LAPTOP, "/work").notices
    assert any("gradients are not clipped" in notice for notice in told)
    assert not any(
        "clipped" in notice for notice in make_plan(hasty(max_grad_norm=0), SHAPE, data(), LAPTOP, "/work").notices
    )


GALORE: dict[str, object] = {"use_galore": True}
LAYERWISE = GALORE | {"galore_layerwise": True}
UPSTREAM = GALORE | {"optimizer_backend": "upstream"}


@pytest.mark.parametrize(
    ("keys", "label"),
    [
        (GALORE, "galore"),
        (LAYERWISE, "galore with galore_layerwise: true"),
        (UPSTREAM, "galore with optimizer_backend: upstream"),
        ({"use_badam": True, "badam_mode": "ratio"}, "badam with badam_mode: ratio"),
        ({"use_badam": True, "optimizer_backend": "upstream"}, "badam with optimizer_backend: upstream"),
    ],
)
@pytest.mark.parametrize("config", ["ds_z2.json", {"zero_optimization": {"stage": 3}}])
def test_what_no_sharding_carries_is_refused_a_deepspeed_file(keys: dict[str, Any], label: str, config: object) -> None:
    sentence = refusal(recipe(**keys, deepspeed=config), shape=SHAPED)
    assert sentence.startswith(f"{label} does not run where weights or optimizer state are sharded, but deepspeed is ")
    assert "leave the key out" in sentence
    make_plan(recipe(**keys), SHAPED, data(), LAPTOP, "/work")


@pytest.mark.parametrize(
    ("keys", "said", "mended"),
    [
        (
            LAYERWISE | {"ray_num_workers": 2},
            ["galore_layerwise", "ray_num_workers is 2", "per_device_train_batch_size: 16 to keep the global batch"],
            {"ray_num_workers": 1},
        ),
        (
            LAYERWISE | {"gradient_accumulation_steps": 4},
            ["galore_layerwise", "gradient_accumulation_steps is 4"],
            {"gradient_accumulation_steps": 1},
        ),
        (LAYERWISE | {"max_grad_norm": 1.0}, ["galore_layerwise", "max_grad_norm is 1"], {"max_grad_norm": 0}),
        (UPSTREAM | {"ray_num_workers": 2}, ["optimizer_backend", "ray_num_workers is 2"], {"ray_num_workers": 1}),
        (GALORE | {"optim": "sgd"}, ["galore", "optim: sgd"], {"optim": "adamw_torch"}),
        (GALORE | {"optim": "adamw_8bit"}, ["optimizer_backend: upstream", "adamw_8bit"], {"optim": "adamw_torch"}),
        (UPSTREAM | {"optim": "adamw_8bit"}, ["adamw_8bit", "resources_per_worker"], {"optim": "adamw_torch"}),
        ({"optim": "adamw_8bit"}, ["full", "adamw_8bit"], {"optim": "adamw_torch"}),
    ],
)
def test_what_galore_cannot_do_is_refused_in_one_sentence_and_its_mend_runs(
    keys: dict[str, Any], said: list[str], mended: dict[str, object]
) -> None:
    sentence = refusal(recipe(**keys), shape=SHAPED)
    assert all(part in sentence for part in said)
    make_plan(recipe(**keys | mended), SHAPED, data(), LAPTOP, "/work")


def test_galore_that_cannot_be_resumed_or_clipped_says_so() -> None:
    def notices(keys: dict[str, object]) -> str:
        return " ".join(make_plan(recipe(**keys), SHAPED, data(), LAPTOP, "/work").notices)

    assert "galore with optimizer_backend: upstream cannot be saved" in notices(UPSTREAM)
    assert "galore with galore_layerwise: true uses each gradient" in notices(LAYERWISE)
    assert notices(GALORE | {"galore_scale": 1.0}) == ""


def test_what_the_traits_allow_is_planned() -> None:
    plan = make_plan(picky(), SHAPE, data(), LAPTOP, "/work")
    assert plan.model.optimizer_bytes == 7
    assert not plan.resumable
    assert any("cannot be resumed" in notice for notice in plan.notices)


# ---- numbers and bytes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hardware", "keys", "formats"),
    [
        (PLAIN, {}, ("float32", "float32", "float32")),
        (WITH_BF16, {}, ("bfloat16", "float32", "bfloat16")),
        (WITH_BF16, {"bf16": False}, ("float32", "float32", "float32")),
        (PLAIN, {"bf16": True}, ("bfloat16", "float32", "bfloat16")),
        (PLAIN, {"pure_bf16": True}, ("bfloat16", "bfloat16", "bfloat16")),
    ],
)
def test_number_formats_follow_recipe_and_processor(
    hardware: Hardware, keys: dict[str, Any], formats: tuple[str, ...]
) -> None:
    precision = planned(ClusterShape((NodeShape(2),), cpu=hardware), **keys).precision
    assert (precision.compute, precision.trainable, precision.frozen) == formats
    resolved = precision.resolved()
    assert [str(one) for one in (resolved.compute, resolved.trainable, resolved.frozen)] == [
        f"torch.{name}" for name in formats
    ]


@pytest.mark.parametrize(
    ("keys", "compute"),
    [({}, "bfloat16"), ({"fp16": True}, "float16"), ({"resources_per_worker": {"CPU": 1}}, "float32")],
)
def test_the_device_that_the_workers_get_decides_the_format(keys: dict[str, Any], compute: str) -> None:
    assert planned(GPU_NODE, **keys).precision.compute == compute


@pytest.mark.parametrize("keys", [{}, {"pure_bf16": True}, {"bf16": True}])
def test_the_format_is_known_before_the_model(keys: dict[str, Any]) -> None:
    assert planned_precision(recipe(**keys), GPU_NODE) == planned(GPU_NODE, **keys).precision.resolved()


def test_bf16_that_is_emulated_or_chosen_is_said() -> None:
    assert any("no native bf16" in notice for notice in planned(bf16=True).notices)
    assert any("Computing in bf16" in notice for notice in planned(GPU_NODE).notices)
    assert planned().notices == ()


@pytest.mark.parametrize(("optim", "optimizer_bytes"), [("adamw_torch", 2 * 40 * 4 + 4), ("sgd", 0)])
def test_bytes_of_weights_gradients_and_optimizer(optim: str, optimizer_bytes: int) -> None:
    model = planned(optim=optim).model
    assert (model.parameters, model.trainable_parameters) == (80, 40)
    assert (model.weight_bytes, model.gradient_bytes, model.optimizer_bytes) == (320, 160, optimizer_bytes)


# ---- cadence, data, place -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "saving", "evaluation", "at_end"),
    [
        ({}, 500, None, False),
        ({"save_strategy": "no"}, None, None, False),
        ({"save_strategy": "epoch"}, 13, None, False),
        ({"save_steps": 5, "eval_strategy": "steps", "eval_steps": 3}, 5, 3, True),
        ({"eval_strategy": "steps", "logging_steps": 4}, 500, 4, True),
        ({"eval_strategy": "epoch"}, 500, 13, True),
        ({"do_eval": True}, 500, None, True),
    ],
)
def test_cadence_counts_updates(keys: dict[str, Any], saving: int | None, evaluation: int | None, at_end: bool) -> None:
    cadence = planned(eval_dataset="held", **keys).cadence
    assert (cadence.saving, cadence.evaluation, cadence.evaluates_at_end) == (saving, evaluation, at_end)
    assert cadence.logging == keys.get("logging_steps", 10)
    assert not cadence.evaluates_at_start


def test_an_evaluation_at_the_start_is_planned() -> None:
    assert planned(eval_dataset="held", eval_on_start=True).cadence.evaluates_at_start


def test_data_and_place_are_written_down() -> None:
    plan = planned(ray_storage_path="store")
    assert plan.data is not None
    assert (plan.data.train_rows, plan.data.train_tokens, plan.data.train_target_tokens) == (100, 900, 500)
    assert (plan.data.evaluation_rows, plan.data.bad_rows, plan.data.train_sha256) == (7, 2, "abc")
    place = plan.place
    assert (place.run_name, place.storage_path, place.output_dir, place.root) == (
        *("outputs-first", "store", "outputs/first", "/work"),
    )
    assert planned(rows=None).data is None


def test_notices_of_recipe_and_caller_are_kept_in_order() -> None:
    plan = planned(notices=("first said",), max_steps=3, num_train_epochs=2, save_only_model=True)
    assert [notice.partition(" ")[0] for notice in plan.notices] == ["max_steps:", "first", "save_only_model:"]
    assert not plan.resumable
    assert planned().resumable


# ---- as JSON --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys",
    [
        *({}, {"finetuning_type": "lora", "lora_target": "q_proj"}, {"finetuning_type": "freeze"}),
        *({"disable_gradient_checkpointing": False}, {"gradient_checkpointing": True}),
        {"warmup_steps": 0.1, "resume_from_checkpoint": False, "bf16": False},
        {"resources_per_worker": {"CPU": 0.5}, "ray_init_kwargs": {"resources": {"a": 1}}, "val_size": 0.1},
        {"eval_strategy": "steps", "val_size": 3, "load_best_model_at_end": True, "report_to": "none"},
        {"stage": "pt", "neat_packing": False, "packing": True, "template": "qwen", "learning_rate": 1.1e-7},
    ],
)
@pytest.mark.parametrize("rows", [None, 100])
def test_a_plan_travels_as_json(keys: dict[str, Any], rows: int | None) -> None:
    plan = planned(rows=rows, **keys)
    again = Plan.model_validate_json(plan.model_dump_json())
    assert again == plan
    assert type(again.recipe.method) is type(plan.recipe.method)
    assert mathematics(again) == mathematics(plan)
    assert again.model_dump_json() == plan.model_dump_json()


# ---- what may differ between a run and its continuation -------------------------------------------------------------


@pytest.mark.parametrize(
    "keys",
    [
        *({"logging_steps": 3}, {"save_steps": 7}, {"save_total_limit": 2}, {"output_dir": "elsewhere"}, {"seed": 42}),
        *({"ray_storage_path": "s3://b/c"}, {"placement_strategy": "SPREAD"}, {"resources_per_worker": {"CPU": 1}}),
        *({"max_failures": 0}, {"plot_loss": False}, {"overwrite_output_dir": True}, {"cache_dir": "c"}),
        *({"gradient_checkpointing": True}, {"dataloader_num_workers": 2}, {"eval_dataset": "x", "do_eval": True}),
        *({"report_to": "none"}, {"resume_from_checkpoint": True}, {"ray_address": "auto"}, {"dataset_dir": "d"}),
    ],
)
def test_logging_saving_and_placement_may_change(keys: dict[str, Any]) -> None:
    assert differences(mathematics(planned()), mathematics(planned(**keys))) == []


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        *(({"learning_rate": 1e-3}, "learning_rate: 5e-05 -> 0.001"), ({"seed": 1}, "seed: 42 -> 1")),
        *(({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps: 1 -> 2"),),
        *(
            ({"num_train_epochs": 1}, "num_train_epochs: 3.0 -> 1.0"),
            ({"optim": "sgd"}, "optim: 'adamw_torch' -> 'sgd'"),
        ),
        *(({"ray_num_workers": 2}, "ray_num_workers: 1 -> 2"), ({"digest": "xyz"}, "training rows: 'abc' -> 'xyz'")),
        *(({"model_name_or_path": "other"}, "model_name_or_path: 'base' -> 'other'"), ({"bf16": False}, "bf16: None")),
        *(({"lr_scheduler_type": "cosine"}, "lr_scheduler_type: 'linear' -> 'cosine'"),),
        *(({"cutoff_len": 9}, "cutoff_len: 2048 -> 9"), ({"val_size": 0.5}, "val_size: 0.0 -> 0.5")),
    ],
)
def test_what_changes_the_numbers_is_named_alone(keys: dict[str, Any], named: str) -> None:
    digest = str(keys.pop("digest", "abc"))
    found = differences(mathematics(planned()), mathematics(planned(digest=digest, **keys)))
    assert len(found) == 1
    assert found[0].startswith(named)


def test_another_processor_or_method_changes_the_numbers() -> None:
    other = ClusterShape((NodeShape(4),), cpu=WITH_BF16)
    found = differences(mathematics(planned()), mathematics(planned(other)))
    assert [line.partition(":")[0] for line in found] == ["precision.compute", "precision.frozen"]
    found = differences(mathematics(planned()), mathematics(planned(finetuning_type="lora")))
    assert "finetuning_type: 'full' -> 'lora'" in found
    assert "lora_rank: None -> 8" in found


@pytest.mark.parametrize("order", [lambda a, b: (a, b), lambda a, b: (b, a)])
def test_differences_name_keys_of_either_side(order: Callable[[object, object], tuple]) -> None:
    one, two = order({"a": 1, "b": 2}, {"a": 1})
    assert [line.partition(":")[0] for line in differences(one, two)] == ["b"]


# ---- a cluster that others run ---------------------------------------------------------------------------------------

TWO_NODES = ClusterShape((NodeShape(0), NodeShape(2), NodeShape(2)), cpu=PLAIN)
WORKERS: dict[str, Any] = {"resources_per_worker": {"CPU": 1}}


@pytest.mark.parametrize(("strategy", "holds"), [("PACK", 4), ("SPREAD", 4), ("STRICT_PACK", 2), ("STRICT_SPREAD", 2)])
def test_how_workers_are_laid_out_decides_how_many_fit(strategy: str, holds: int) -> None:
    keys = WORKERS | {"placement_strategy": strategy}
    planned(TWO_NODES, ray_num_workers=holds, **keys)
    said = refusal(recipe(ray_num_workers=holds + 1, **keys), TWO_NODES)
    assert f"at most ray_num_workers: {holds} does" in said
    assert ("placement_strategy" in said) == strategy.startswith("STRICT")


def test_a_typo_in_the_placement_strategy_is_refused() -> None:
    with pytest.raises(Refused, match="did you mean placement_strategy: STRICT_SPREAD"):
        recipe(placement_strategy="STRICT_SPRAED")


def test_a_cluster_whose_nodes_may_come_later_is_waited_for() -> None:
    growing = replace(TWO_NODES, may_grow=True)
    assert not any("waits" in notice for notice in planned(growing, ray_num_workers=4, **WORKERS).notices)
    made = planned(growing, ray_num_workers=8, ray_start_timeout=77, **WORKERS)
    assert made.workers.count == 8
    (told,) = [notice for notice in made.notices if "waits" in notice]
    assert "4 CPU" in told
    assert "ray_start_timeout: 77" in told


SINGLE = NodeType("single", NodeShape(cpus=1, labels={SINGLE_WORKER: "true"}), most=3)
PAIR = NodeType("pair", NodeShape(cpus=2), most=2)
AUTOSCALED = ClusterShape(
    at_most([NodeShape(cpus=0)], [SINGLE, PAIR]),
    cpu=Hardware("cpu", bf16=True),
    may_grow=True,
    node_types=(SINGLE, PAIR),
)


def test_what_no_node_type_holds_is_refused_and_the_types_are_named() -> None:
    """Ray itself would wait for such a node for ever."""
    said = refusal(recipe(resources_per_worker={"CPU": 4}), AUTOSCALED)
    assert "1 with 4 CPU for each worker does not fit on the cluster" in said
    assert "its node types are single (1 CPU; at most 3), pair (2 CPU; at most 2)" in said
    assert "at most ray_num_workers: 4 does" in refusal(recipe(ray_num_workers=8, **WORKERS), AUTOSCALED)
    made = planned(AUTOSCALED, ray_num_workers=4, **WORKERS)
    assert not any("waits" in notice for notice in made.notices), "the nodes are not there yet, and will be"


def test_methods_of_one_worker_are_kept_to_the_nodes_that_are_kept_for_them() -> None:

    def labels(cluster: ClusterShape, **keys: object) -> dict[str, str]:
        return planned_workers(recipe(**{**WORKERS, **keys}), cluster).labels

    ratio = {"use_badam": True, "badam_mode": "ratio"}
    assert labels(AUTOSCALED, **ratio) == {SINGLE_WORKER: "true"}
    assert labels(AUTOSCALED, ray_num_workers=2) == {SINGLE_WORKER: "!true"}
    assert labels(AUTOSCALED, ray_num_workers=1) == {}, "goes where there is room"
    assert labels(AUTOSCALED, **ratio, resources_per_worker={"CPU": 2}) == {}, "they are too small"
    assert labels(TWO_NODES, **ratio) == {}


def test_a_gpu_that_cannot_be_asked_is_not_guessed_about() -> None:
    growing = replace(TWO_NODES, may_grow=True)
    assert "write bf16: true or bf16: false" in refusal(recipe(resources_per_worker={"GPU": 1}), growing)
    assert planned(growing, resources_per_worker={"GPU": 1}, bf16=True).precision.compute == "bfloat16"
    assert planned(growing, resources_per_worker={"GPU": 1}, bf16=False).precision.compute == "float32"


def test_two_workers_never_share_a_gpu() -> None:
    halves: dict[str, Any] = {"resources_per_worker": {"GPU": 0.5}}
    assert "NCCL" in refusal(recipe(ray_num_workers=2, **halves), GPU_NODE)
    assert planned(GPU_NODE, ray_num_workers=1, **halves).workers.resources == {"GPU": 0.5}
