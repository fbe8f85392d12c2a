"""The base of every model that owns recipe keys."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Frozen keys with one owner. An unknown key is an error, never dropped."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
