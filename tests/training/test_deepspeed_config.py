"""DeepSpeed's configuration: "auto" filled in, contradictions and half-used blocks refused with the mend."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.training.deepspeed_files import AUTOTP, FILES, FP8

from tunefleet.errors import Refused
from tunefleet.training.deepspeed_config import NAMED, Config, Numbers, fill, read, sharding_of
from tunefleet.training.deepspeed_verdict import refuse_unreadable

NUMBERS = Numbers(
    micro_batch=2,
    accumulation=4,
    workers=3,
    max_grad_norm=0.5,
    compute="bfloat16",
    pure=False,
    autocast=False,
    hidden_size=64,
)


def refusal(config: Config, numbers: Numbers = NUMBERS) -> str:
    with pytest.raises(Refused) as caught:
        fill(config, numbers)
    return str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_llama_factorys_files_are_filled(name: str, tmp_path: Path) -> None:
    file = tmp_path / f"{name}.json"
    file.write_text(json.dumps(FILES[name]))
    config = read(f"{name}.json", tmp_path)
    filled = fill(config, NUMBERS)
    assert config == FILES[name], "what was read stays as it is"
    assert '"auto"' not in json.dumps(filled)
    assert (filled["train_batch_size"], filled["train_micro_batch_size_per_gpu"]) == (24, 2)
    assert (filled["gradient_accumulation_steps"], filled["gradient_clipping"]) == (4, 0.5)
    assert (filled["bf16"]["enabled"], filled["fp16"]["enabled"]) == (True, False)
    assert filled["communication_data_type"] == filled["data_types"]["grad_accum_dtype"] == "fp32"
    assert filled["managed_gradient_accumulation"] is False
    assert filled["zero_force_ds_cpu_optimizer"] is False
    assert sharding_of(config) == f"zero{name[4]}"
    zero = filled["zero_optimization"]
    if name.startswith("ds_z3"):
        assert zero["reduce_bucket_size"] == 64 * 64
        assert zero["stage3_prefetch_bucket_size"] == int(0.9 * 64 * 64)
        assert zero["stage3_param_persistence_threshold"] == 640
    else:
        assert zero["reduce_bucket_size"] == 5e8
    assert ("offload_optimizer" in zero) == ("offload" in name)


@pytest.mark.parametrize("name", NAMED)
def test_our_names_are_filled(name: str) -> None:
    filled = fill(read(name, Path()), NUMBERS)
    assert '"auto"' not in json.dumps(filled)
    assert sharding_of(filled) == name[:5]
    assert ("offload_optimizer" in filled["zero_optimization"]) == name.endswith("offload")


@pytest.mark.parametrize(
    ("compute", "pure", "autocast", "bf16", "fp16", "dtype"),
    [
        ("float32", False, False, False, False, "fp32"),
        ("bfloat16", False, False, True, False, "fp32"),
        ("bfloat16", True, False, True, False, "bf16"),
        ("bfloat16", False, True, False, False, "fp32"),
        ("float16", False, False, False, True, None),
    ],
)
def test_number_formats(compute: str, pure: bool, autocast: bool, bf16: bool, fp16: bool, dtype: str | None) -> None:
    filled = fill(FILES["ds_z3_config"], replace(NUMBERS, compute=compute, pure=pure, autocast=autocast))
    assert (filled["bf16"]["enabled"], filled["fp16"]["enabled"]) == (bf16, fp16)
    assert filled.get("communication_data_type") == dtype
    assert ("torch_autocast" in filled) == autocast
    assert filled["bf16"].get("bf16_master_weights_and_grads", False) == pure


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train_micro_batch_size_per_gpu": 4}, ("train_micro_batch_size_per_gpu is 4", "per_device_train_batch_size")),
        ({"gradient_accumulation_steps": 1}, ("gradient_accumulation_steps is 1", "is 4", '"auto"')),
        ({"train_batch_size": 8}, ("train_batch_size is 8", "ray_num_workers is 24")),
        ({"gradient_clipping": 1.0}, ("gradient_clipping is 1.0", "max_grad_norm is 0.5")),
        ({"bf16": {"enabled": False}}, ("bf16.enabled is false", "bfloat16", "bf16: false")),
        ({"fp16": {"enabled": True}}, ("fp16.enabled is true", "bfloat16", "fp16: true")),
        ({"optimizer": {"type": "AdamW"}}, ("optimizer", "LoRA+", "learning_rate")),
        ({"scheduler": {"type": "WarmupLR"}}, ("scheduler", "lr_scheduler_type")),
        ({"activation_checkpointing": {}}, ("activation_checkpointing", "gradient_checkpointing: true")),
        ({"zero_force_ds_cpu_optimizer": True}, ("zero_force_ds_cpu_optimizer", "remove it")),
        ({"elasticity": {"enabled": True}}, ("elasticity", "remove it")),
        ({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}, ("zero_quantized_gradients",)),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}, ("nvme", "write cpu")),
        ({"zero_optimization": {"stage": 3, "stage3_max_live_parameters": "auto"}}, ("max_live_parameters", "number")),
    ],
)
def test_what_contradicts_or_would_be_half_used_is_refused(change: dict[str, Any], said: tuple[str, ...]) -> None:
    sentence = refusal(FILES["ds_z2_config"] | change)
    assert [piece for piece in said if piece not in sentence] == [], sentence


def test_the_same_number_may_be_written_twice() -> None:
    written = FILES["ds_z3_config"] | {"train_micro_batch_size_per_gpu": 2, "bf16": {"enabled": True}}
    assert fill(written, NUMBERS) == fill(FILES["ds_z3_config"], NUMBERS)


def test_autotp_and_fp8_are_refused_by_name() -> None:
    assert "autotp" in refusal(AUTOTP)
    assert "zero3" in refusal(AUTOTP)
    assert "bf16: true" in refusal(FP8)


def test_pure_bf16_needs_masters_on_the_device() -> None:
    sentence = refusal(FILES["ds_z2_offload_config"], replace(NUMBERS, pure=True))
    assert "pure_bf16" in sentence
    assert "offload_optimizer" in sentence


def test_turns_do_not_go_with_a_loss_scale() -> None:
    assert "write bf16: true" in refusal(FILES["ds_z3_config"], replace(NUMBERS, compute="float16", autocast=True))


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "torn.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    for name, said in (("zero4", "zero2, zero3"), ("torn.json", "no JSON"), ("list.json", "no JSON object")):
        with pytest.raises(Refused, match=said):
            read(name, tmp_path)


@pytest.mark.parametrize("zero", [None, {}, {"stage": 4}, {"stage": True}, {"stage": "3"}])
def test_a_stage_is_needed(zero: object) -> None:
    with pytest.raises(Refused, match="write 0, 1, 2 or 3"):
        sharding_of({"zero_optimization": zero})


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"zero_optimization": {"stage": 2}, "bf16": True}, "bf16 is true, but is a block"),
        ({"zero_optimization": {"stage": 2}, "fp16": None}, "fp16 is null, but is a block"),
        ({"zero_optimization": {"stage": 2}, "data_types": "fp32"}, 'data_types is "fp32", but is a block'),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}, 'write {"device": "cpu"} there'),
        ({"zero_optimization": {"stage": 3, "offload_param": [1]}}, "zero_optimization.offload_param is [1]"),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, 'write "offload_optimizer": {"device": "cpu"}'),
    ],
)
def test_a_value_in_the_place_of_a_block_is_refused(config: Config, words: str) -> None:
    assert words in refusal(config)


def test_a_file_that_an_editor_marked_as_utf8_is_read(tmp_path: Path) -> None:
    (tmp_path / "marked.json").write_text(json.dumps(FILES["ds_z2_config"]), encoding="utf-8-sig")
    assert read("marked.json", tmp_path) == FILES["ds_z2_config"]


def test_a_file_that_is_nested_without_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(Refused, match=r"deep\.json holds no JSON"):
        read("deep.json", tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"zero_optimization": {"stage": 3, "overlap_com": True}}, "overlap_com is no key that DeepSpeed knows"),
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": -5}}, "does not take reduce_bucket_size"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"divice": "cpu"}}}, "offload_param.divice is no key"),
        ({"communication_data_type": "fp8"}, "Invalid communication_data_type"),
        ({"data_types": {"grad_accum_dtype": "fp8"}}, "grad_accum_dtype is fp8: write one of fp32"),
        ({"wall_clock_breakdown": "maybe"}, "cannot read the configuration"),
    ],
)
def test_what_deepspeed_would_refuse_is_refused_before_anything_starts(change: Config, words: str) -> None:
    filled = fill({"zero_optimization": {"stage": 3}, **change}, NUMBERS)
    with pytest.raises(Refused) as caught:
        refuse_unreadable(filled)
    assert words in str(caught.value)


def test_deepspeed_takes_every_file_that_we_promise_to_take() -> None:
    for config in (*FILES.values(), *NAMED.values()):
        refuse_unreadable(fill(config, NUMBERS))
