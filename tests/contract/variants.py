"""The cells of the contract test: every registered method and the LoRA family, on four architectures."""

from __future__ import annotations

from tests.training.tiny import ARCHITECTURES

from tunefleet_strategies.badam import BAdam
from tunefleet_strategies.contract import Strategy
from tunefleet_strategies.freeze import Freeze
from tunefleet_strategies.full import Full
from tunefleet_strategies.galore import GaLore
from tunefleet_strategies.lora import Lora

VARIANTS: dict[str, Strategy] = {
    "full": Full(),
    "freeze": Freeze(freeze_trainable_layers=1),
    "lora": Lora(lora_rank=4),
    "lora_dropout": Lora(lora_rank=4, lora_dropout=0.2),
    "dora": Lora(lora_rank=4, use_dora=True),
    "rslora": Lora(lora_rank=4, use_rslora=True, lora_alpha=4),
    "loraplus": Lora(lora_rank=4, loraplus_lr_ratio=4.0),
    "pissa": Lora(lora_rank=4, pissa_init=True, pissa_iter=4),
    "galore": GaLore(galore_rank=2, galore_update_interval=3, galore_scale=1.0),
    "galore_eigh": GaLore(
        galore_rank=2,
        galore_update_interval=2,
        galore_scale=1.0,
        galore_proj_type="reverse_std",
        galore_refresh="eigh",
        galore_stagger=True,
    ),
    "galore_layerwise": GaLore(galore_rank=2, galore_update_interval=3, galore_scale=1.0, galore_layerwise=True),
    # Intervals so short that even a few updates visit every block, and wrap around.
    "badam_layer": BAdam(badam_switch_interval=2, badam_include_embedding=True, badam_include_lm_head=True),
    "badam_ratio": BAdam(
        badam_mode="ratio", badam_switch_interval=2, badam_update_ratio=0.4, badam_mask_mode="scatter"
    ),
}

CELLS = [(variant, architecture) for variant in VARIANTS for architecture in ARCHITECTURES]

ACCUMULATED = [
    (variant, architecture)
    for variant, architecture in CELLS
    if variant != "lora_dropout" and VARIANTS[variant].traits().accumulation
]
"""Cells that must not care how a batch is cut: dropout does, on purpose, and a method may refuse to be asked."""

SHARED = [
    (variant, architecture)
    for variant, architecture in CELLS
    if variant != "lora_dropout" and VARIANTS[variant].traits().max_workers is None
]
"""Cells that one and two workers must agree on, for the same reasons."""

FSDP2 = [
    (variant, architecture)
    for variant, architecture in CELLS
    if "fsdp2" in VARIANTS[variant].traits().shardings
    and variant != "lora_dropout"
    and (architecture == "llama" or variant in ("full", "lora", "dora", "badam_layer"))
]
"""Cells that FSDP2 must agree on with one plain worker."""
