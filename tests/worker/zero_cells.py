"""What test_zero.py trains under ZeRO: methods by name, and which of them at which stage."""

from __future__ import annotations

from typing import Any

Keys = dict[str, Any]

BADAM: Keys = {
    "use_badam": True,
    "badam_switch_interval": 2,
    "badam_include_embedding": True,
    "badam_include_lm_head": True,
}
METHODS: dict[str, Keys] = {
    "full": {},
    "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
    "lora": {"finetuning_type": "lora"},
    "loraplus": {"finetuning_type": "lora", "loraplus_lr_ratio": 4.0},
    "dora": {"finetuning_type": "lora", "use_dora": True},
    "pissa": {"finetuning_type": "lora", "pissa_init": True},
    "pissa_dora": {"finetuning_type": "lora", "pissa_init": True, "use_dora": True},
    "additional": {"finetuning_type": "lora", "additional_target": "lm_head"},
    "recomputed": {"gradient_checkpointing": True},
    "best": {
        "max_steps": 4,
        "learning_rate": 0.03,
        "eval_dataset": "quickstart_heldout",
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
    },
    "badam": BADAM | {"max_steps": 10},
    "badam_random": BADAM | {"badam_switch_mode": "random", "max_steps": 10},
}


def zero(stage: int, **more: object) -> Keys:
    """A stage; so small a threshold that only norms are kept whole."""
    parts = {"stage3_param_persistence_threshold": 100} if stage == 3 else {}
    return {"zero_optimization": {"stage": stage, **parts, **more}}


LOGGED: Keys = {"comms_logger": {"enabled": True, "verbose": False, "prof_all": True}}
"""Lets DeepSpeed say what it sends."""

QUICK = {
    "full_2": ("full", 2),
    "full_3": ("full", 3),
    "lora_3": ("lora", 3),
    "badam_3": ("badam", 3),
}
"""Cells in fp32: method and stage. What they send is counted."""

SLOW = {
    **{
        f"{method}_{stage}": (method, stage)
        for method in ("freeze", "loraplus", "dora", "pissa")
        for stage in (1, 2, 3)
    },
    **{f"lora_{stage}": ("lora", stage) for stage in (0, 1, 2)},
    "full_0": ("full", 0),
    "full_1": ("full", 1),
    "freeze_0": ("freeze", 0),
    **{f"{method}_3": (method, 3) for method in ("pissa_dora", "additional", "recomputed", "best", "badam_random")},
}
"""The rest of them."""

LONG = {"long_full_2": ("full", 2), "long_full_3": ("full", 3), "long_badam_3": ("badam", 3)}
"""As long as the rules of exactness ask for (E2)."""
LONG_KEYS: Keys = {"max_steps": 40, "learning_rate": 1e-3}
"""At the rate of the short cells (3e-3) forty updates take differences of rounding past 1e-5 (BAdam: 3e-5)."""

OTHERS_QUICK = {
    "full_gpt2_2": ("full", "gpt2", 2),
    "full_qwen2_tied_3": ("full", "qwen2_tied", 3),
    "full_qwen3_moe_3": ("full", "qwen3_moe", 3),
}
"""Cells on another architecture than the small Llama: method, architecture and stage."""
OTHERS_SLOW = {
    name: (method, architecture, stage)
    for architecture in ("qwen2_tied", "gpt2", "qwen3_moe")
    for method, stage in (("full", 2), ("full", 3), ("lora", 2), ("lora", 3), ("badam", 3))
    if (name := f"{method}_{architecture}_{stage}") not in OTHERS_QUICK
}
