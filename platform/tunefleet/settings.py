"""The base of every model that owns recipe keys, and the default that is needed without them."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

DEFAULT_STORAGE = "~/tunefleet"
"""`ray_storage_path` where it is not written."""


class Settings(BaseModel):
    """Frozen keys with one owner. An unknown key is an error, never dropped."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
