"""`deepspeed:` of a recipe, as a name, a file or a mapping -> the configuration that DeepSpeed is given.

Every "auto" is filled in from the recipe, and every number that contradicts the recipe is refused: one run, one set of
numbers. Files are read on the driver; their content travels in the plan. Nothing here imports DeepSpeed.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from tunefleet.errors import Refused
from tunefleet_strategies.contract import Sharding

Config = dict[str, Any]
"""A DeepSpeed configuration: nested mappings of JSON values."""

AUTO = "auto"

_OFFLOAD: Config = {"device": "cpu", "pin_memory": True}
_ZERO2: Config = {
    "stage": 2,
    "allgather_partitions": True,
    "allgather_bucket_size": 500_000_000,
    "reduce_scatter": True,
    "reduce_bucket_size": 500_000_000,
    "overlap_comm": False,
    "contiguous_gradients": True,
}
_ZERO3: Config = {
    "stage": 3,
    "overlap_comm": False,
    "contiguous_gradients": True,
    "sub_group_size": 1_000_000_000,
    "reduce_bucket_size": AUTO,
    "stage3_prefetch_bucket_size": AUTO,
    "stage3_param_persistence_threshold": AUTO,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
}
NAMED: Mapping[str, Config] = {
    "zero2": {"zero_optimization": _ZERO2},
    "zero3": {"zero_optimization": _ZERO3},
    "zero2_offload": {"zero_optimization": {**_ZERO2, "offload_optimizer": _OFFLOAD}},
    "zero3_offload": {"zero_optimization": {**_ZERO3, "offload_optimizer": _OFFLOAD, "offload_param": _OFFLOAD}},
}
"""The configurations that a recipe can ask for by name."""

_READ = frozenset(
    {
        *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
        *("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "zero_optimization", "bf16", "fp16"),
        *("communication_data_type", "data_types", "comms_config", "comms_logger", "monitor_config", "tensorboard"),
        *("csv_monitor", "wandb", "comet", "steps_per_print", "wall_clock_breakdown", "memory_breakdown"),
        *("dump_state", "flops_profiler"),
    }
)
"""What may stand at the top of a configuration; all of it reaches DeepSpeed."""

_REFUSED: Mapping[str, str] = {
    "optimizer": "the optimizer comes from the method (LoRA+ has a rate for each factor): remove it and write optim, "
    "learning_rate and weight_decay in the recipe",
    "scheduler": "the learning rate follows the recipe: remove it and write lr_scheduler_type and warmup_ratio there",
    "tensor_parallel": "it splits single layers over workers (autotp), which no engine here does: remove it; zero3 "
    "shares the weights out",
    "fp8": "nothing here computes in fp8: remove it and write bf16: true",
    "activation_checkpointing": "it configures DeepSpeed's own checkpointing, which no model here calls: remove it and "
    "write gradient_checkpointing: true",
    "torch_autocast": "the number formats come from the recipe: remove it and write bf16: true",
    "amp": "the number formats come from the recipe: remove it and write bf16: true",
}
"""Blocks that would be half used, each with the reason and the mend."""

_REFUSED_ZERO: Mapping[str, str] = {
    "zenflow": "its updates are late, so they are not those of the recipe: remove it",
    "zero_quantized_weights": "weights that travel in 8 bits are not those of the recipe: remove it",
    "zero_quantized_gradients": "gradients that travel in 4 bits are not summed exactly: remove it",
    "zero_hpz_partition_size": "secondary partitions are not restored by a resume: remove it",
    "mics_shard_size": "its partitions are not those that a checkpoint holds: remove it",
    "cpu_offload": 'it is an old name: remove it and write "offload_optimizer": {"device": "cpu"}',
    "cpu_offload_param": 'it is an old name: remove it and write "offload_param": {"device": "cpu"}',
}
"""The same for `zero_optimization`; what is off (false, 1, -1) may stand there."""


@dataclass(frozen=True)
class Numbers:
    """What of a plan stands in a DeepSpeed configuration too."""

    micro_batch: int
    accumulation: int
    workers: int
    max_grad_norm: float
    compute: str
    """Number format of forward and backward passes, by torch's name."""
    pure: bool
    """Whether what trains has no fp32 master copy."""
    autocast: bool
    """Whether weights stay in fp32 and only passes run in `compute`."""
    hidden_size: int


def read(value: str | Mapping[str, JsonValue], root: Path) -> Config:
    """The configuration that `deepspeed:` means, its "auto" still in it.

    Args:
        value: a name of `NAMED`, the path of a JSON file, or the configuration itself.
        root: the folder that a relative path starts from.

    Raises:
        Refused: no such name or file, or no JSON object in it.
    """
    if not isinstance(value, str):
        return copy.deepcopy(dict(value))
    if value in NAMED:
        return copy.deepcopy(NAMED[value])
    path = (root / Path(value).expanduser()).resolve()
    names = ", ".join(NAMED)
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise Refused(f"deepspeed: {value} is neither a file here nor one of {names}: correct it.") from error
    except (ValueError, RecursionError) as error:
        raise Refused(f"deepspeed: {value} holds no JSON ({str(error)[:160]}): mend the file.") from error
    if not isinstance(config, dict):
        raise Refused(f"deepspeed: {value} holds no JSON object: mend the file, or write one of {names}.")
    return config


def sharding_of(config: Mapping[str, Any]) -> Sharding:
    """The stage of a configuration.

    Raises:
        Refused: it names none, or one that does not exist.
    """
    stages: dict[object, Sharding] = {0: "zero0", 1: "zero1", 2: "zero2", 3: "zero3"}
    zero = config.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if isinstance(stage, bool) or not isinstance(stage, int) or stage not in stages:
        raise Refused(
            f"deepspeed: zero_optimization.stage is {json.dumps(stage)}: write 0, 1, 2 or 3, or deepspeed: zero3."
        )
    return stages[stage]


def fill(config: Mapping[str, Any], numbers: Numbers) -> Config:
    """Fill in every "auto", and what exact sums and exact resumes ask for where the configuration is silent.

    Raises:
        Refused: it asks for what is not run here, contradicts the recipe, or an "auto" stands where nothing is known.
    """
    filled = {key: copy.deepcopy(value) for key, value in config.items() if not key.startswith("_")}
    _refuse(filled)
    for key, number, name in (
        ("train_micro_batch_size_per_gpu", numbers.micro_batch, "per_device_train_batch_size"),
        ("gradient_accumulation_steps", numbers.accumulation, "gradient_accumulation_steps"),
        ("train_batch_size", _global_batch(numbers), "per_device_train_batch_size x accumulation x ray_num_workers"),
        ("gradient_clipping", numbers.max_grad_norm, "max_grad_norm"),
    ):
        _agree(filled, key, number, name)
    _number_formats(filled, numbers)
    _buckets(filled["zero_optimization"], numbers.hidden_size)
    _our_own(filled, numbers)
    _nothing_left(filled, "")
    return filled


def _global_batch(numbers: Numbers) -> int:
    return numbers.micro_batch * numbers.accumulation * numbers.workers


def _refuse(config: Config) -> None:
    for key in config:
        if key in _REFUSED:
            raise Refused(f"deepspeed has a block {key}, but {_REFUSED[key]}.")
        if key not in _READ:
            raise Refused(f"deepspeed: {key} is no key that this version hands on: remove it.")
    zero = config["zero_optimization"]
    _refuse_values_for_blocks(config, zero)
    for key, why in _REFUSED_ZERO.items():
        value = zero.get(key)
        off = value in (None, 1, -1) if not isinstance(value, bool) else not value
        if not off:
            raise Refused(f"deepspeed: zero_optimization.{key} is set, but {why}.")
    for key in ("offload_optimizer", "offload_param"):
        where = (zero.get(key) or {}).get("device", "none")
        if where not in ("cpu", "none"):
            raise Refused(f"deepspeed: {key}.device is {where}, and only cpu is built: write cpu there.")
        ratio = (zero.get(key) or {}).get("ratio", 1.0)
        if ratio != 1.0:
            raise Refused(f"deepspeed: {key}.ratio is {ratio}, but needs DeepSpeed's own optimizer: remove ratio.")
    if config.get("zero_force_ds_cpu_optimizer"):
        raise Refused(
            "deepspeed: zero_force_ds_cpu_optimizer asks for DeepSpeed's own optimizer, but the optimizer comes from "
            "the method: remove it."
        )


def _refuse_values_for_blocks(config: Config, zero: Config) -> None:
    """Raises Refused where `bf16: true` and its like stand for a block of settings."""
    blocks = [(config, "", key, "enabled", AUTO) for key in ("bf16", "fp16")]
    blocks += [(config, "", "data_types", "grad_accum_dtype", "fp32")]
    blocks += [(zero, "zero_optimization.", key, "device", "cpu") for key in ("offload_optimizer", "offload_param")]
    for holder, path, key, setting, example in blocks:
        value = holder.get(key, {})
        if not isinstance(value, dict) and not (value is None and holder is zero):
            raise Refused(
                f"deepspeed: {path}{key} is {json.dumps(value)}, but is a block of settings: write "
                f'{{"{setting}": "{example}"}} there, or remove it.'
            )


def _agree(config: Config, key: str, number: float, name: str) -> None:
    """Let a number of the configuration be that of the recipe.

    Raises:
        Refused: it is another one.
    """
    written = config.get(key, AUTO)
    if written not in (AUTO, number):
        raise Refused(
            f'deepspeed: {key} is {json.dumps(written)}, but {name} is {number:g}: write "auto" in {key}, and the '
            "number in the recipe."
        )
    config[key] = number


def _number_formats(config: Config, numbers: Numbers) -> None:
    """bf16 and fp16 of the configuration: DeepSpeed then holds 16-bit weights beside fp32 masters."""
    for key, name in (("bf16", "bfloat16"), ("fp16", "float16")):
        on = numbers.compute == name
        block = config.setdefault(key, {})
        written = block.get("enabled", AUTO)
        if written not in (AUTO, on):
            mend = f"{key}: {'true' if written else 'false'}"
            raise Refused(
                f"deepspeed: {key}.enabled is {json.dumps(written)}, but the recipe computes in {numbers.compute}: "
                f'write "auto" there, or {mend} in the recipe.'
            )
        block["enabled"] = on and not numbers.autocast
    if numbers.autocast:
        if numbers.compute == "float16":
            raise Refused(
                "fp16: true needs a loss scale that outlasts the turns of what trains, which deepspeed does not keep: "
                "write bf16: true or pure_bf16: true."
            )
        # An empty list: gradients of every module travel in fp32.
        config["torch_autocast"] = {
            "enabled": True,
            "dtype": numbers.compute,
            "lower_precision_safe_modules": [],
        }
    if config["bf16"]["enabled"]:
        config["bf16"]["check_grad_overflow"] = True
    if numbers.pure:
        if (config["zero_optimization"].get("offload_optimizer") or {}).get("device", "none") != "none":
            raise Refused(
                "pure_bf16: true keeps no fp32 master, but deepspeed: offload_optimizer needs one: write bf16: true, "
                "or remove offload_optimizer."
            )
        config["bf16"] |= {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}


def _buckets(zero: Config, hidden_size: int) -> None:
    """The sizes that transformers fills in as well, in entries."""
    sizes = {
        "reduce_bucket_size": hidden_size * hidden_size,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    for key, size in sizes.items():
        if zero.get(key) == AUTO:
            zero[key] = size


def _our_own(config: Config, numbers: Numbers) -> None:
    """What the loop relies on: it says itself when an update is due, and gradients are summed in fp32."""
    config["managed_gradient_accumulation"] = False
    config["zero_allow_untested_optimizer"] = True
    config["zero_force_ds_cpu_optimizer"] = False
    summed = "bf16" if numbers.pure else "fp32"
    if numbers.compute != "float16":
        config.setdefault("communication_data_type", summed)
        config.setdefault("data_types", {}).setdefault("grad_accum_dtype", summed)


def _nothing_left(value: object, path: str) -> None:
    """Raises Refused where an "auto" is left."""
    if value == AUTO:
        raise Refused(f'deepspeed: {path} is "auto", and nothing in the recipe says what that is: write a number.')
    if isinstance(value, dict):
        for key, item in value.items():
            _nothing_left(item, f"{path}.{key}".lstrip("."))
