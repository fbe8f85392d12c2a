"""The keys of a recipe that name the base model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tunefleet.settings import Settings


class ModelSettings(Settings):
    """Which base model is tuned and how it is loaded."""

    model_name_or_path: str = Field(
        min_length=1, description="The base model: a local folder, or the name of a model on the hub."
    )
    trust_remote_code: bool = Field(
        False, description="Whether Python code that comes with the model may run. Nothing remote runs without it."
    )
    flash_attn: Literal["auto", "disabled", "sdpa", "fa2"] = Field(
        "auto",
        description="Attention: `auto` takes the fastest exact one, `disabled` plain matrix products, `sdpa` "
        "PyTorch's, `fa2` FlashAttention 2 (a GPU).",
    )
