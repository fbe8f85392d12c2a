"""What a person reads before a LoRA run starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunefleet_strategies.lora import Lora

Call = Callable[..., Any]


@pytest.mark.parametrize(
    ("name", "keys", "said"),
    [
        ("llama", {}, []),
        ("moe", {}, []),
        ("llama", {"use_rslora": True}, ["8 / sqrt(4) = 4; lora_alpha is unset"]),
        ("llama", {"use_rslora": True, "lora_alpha": 6}, ["alpha / sqrt(rank) = 6 / sqrt(4) = 3"]),
        ("llama", {"pissa_init": True, "lora_dropout": 0.1}, ["pissa_init with lora_dropout > 0"]),
        ("moe", {"use_dora": True}, ["the 6 fused expert tensors of this model are not adapted"]),
        ("moe", {"lora_dropout": 0.1}, ["the 6 fused expert tensors of this model are not adapted"]),
        ("moe", {"lora_target": "q_proj", "use_dora": True}, []),
    ],
)
@pytest.mark.parametrize("meta", [False, True])
def test_notices(name: str, keys: dict[str, Any], said: list[str], meta: bool, build: Call, attach: Call) -> None:
    settings = Lora.model_validate({"lora_rank": 4, **keys})
    notices = settings.notices(attach(settings, build(name, meta=meta)))
    assert len(notices) == len(said)
    for notice, part in zip(notices, said, strict=True):
        assert part in notice


def test_every_difference_to_a_continued_adapter_is_said(build: Call, attach: Call, tmp_path: Path) -> None:
    first = Lora(lora_rank=4, lora_target=("q_proj", "v_proj"), additional_target=("lm_head",))
    first.export(attach(first, build("llama")), tmp_path, {})
    same = first.model_copy(update={"adapter_name_or_path": (str(tmp_path),)})
    assert same.notices(attach(same, build("llama"))) == []
    other = Lora.model_validate(
        {
            "lora_rank": 8,
            "lora_alpha": 4,
            "lora_dropout": 0.1,
            "use_rslora": True,
            "use_dora": True,
            "adapter_name_or_path": str(tmp_path),
        }
    )
    (notice,) = other.notices(attach(other, build("llama")))
    for part in (
        "lora_rank 8 (adapter: 4)",
        "lora_alpha 4 (adapter: 8)",
        "lora_dropout 0.1 (adapter: 0.0)",
        "use_rslora True (adapter: False)",
        "use_dora True (adapter: False)",
        "lora_target all (adapter: q_proj,v_proj)",
        "additional_target None (adapter: lm_head)",
    ):
        assert part in notice
