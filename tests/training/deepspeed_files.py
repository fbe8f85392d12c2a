"""LLaMA-Factory's DeepSpeed files, by name and content (its folder examples/deepspeed)."""

from __future__ import annotations

from typing import Any

_CPU = {"device": "cpu", "pin_memory": True}
_FP16 = {"loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2, "min_loss_scale": 1}
_COMMON: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "fp16": {"enabled": "auto", **_FP16},
    "bf16": {"enabled": "auto"},
    "comms_config": {"verbose": False},
    "monitor_config": {"enabled": True, "tag": "DeepSpeedMonitor", "csv_monitor": {"enabled": False}},
}
_UP_TO_2 = {
    "allgather_partitions": True,
    "allgather_bucket_size": 5e8,
    "overlap_comm": False,
    "reduce_scatter": True,
    "reduce_bucket_size": 5e8,
    "contiguous_gradients": True,
    "round_robin_gradients": True,
}
_3 = {
    "stage": 3,
    "overlap_comm": False,
    "contiguous_gradients": True,
    "sub_group_size": 1e9,
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto",
    "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9,
    "stage3_gather_16bit_weights_on_model_save": True,
}

FILES: dict[str, dict[str, Any]] = {
    "ds_z0_config": _COMMON | {"zero_optimization": {"stage": 0, **_UP_TO_2}},
    "ds_z2_config": _COMMON | {"zero_optimization": {"stage": 2, **_UP_TO_2}},
    "ds_z2_offload_config": _COMMON | {"zero_optimization": {"stage": 2, "offload_optimizer": _CPU, **_UP_TO_2}},
    "ds_z3_config": _COMMON | {"zero_optimization": _3},
    "ds_z3_offload_config": _COMMON | {"zero_optimization": {**_3, "offload_optimizer": _CPU, "offload_param": _CPU}},
}

AUTOTP = FILES["ds_z2_config"] | {"_comment": "supported models: ...", "tensor_parallel": {"autotp_size": 2}}
FP8 = FILES["ds_z3_config"] | {"fp8": {"enabled": True}, "gradient_clipping": 0.001}
