"""Private random generators: what a method draws while it trains depends on a key, never on the global random state."""

from __future__ import annotations

import hashlib

import torch


def seed_of(*key: int | str) -> int:
    """A seed of 63 bits from a key such as (seed, "model.embed_tokens.weight"). Other keys give unrelated seeds."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator_of(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own for each key.

    Args:
        device: where it draws. On the CPU, what it draws does not depend on the device that trains.
    """
    return torch.Generator(device).manual_seed(seed_of(*key))
