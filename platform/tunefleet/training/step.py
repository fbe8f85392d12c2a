"""What is known of one optimizer update. Light to import: drivers and Ray's controllers read it, and train nothing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pace:
    """One rank's own share of an update."""

    tokens: int
    """Real tokens that this rank was fed."""
    data_wait_seconds: float
    """Until micro-batches were laid out and on the device."""
    compute_seconds: float | None
    """Forward and backward passes, without what is spent on other ranks; None where that cannot be told apart."""


@dataclass(frozen=True)
class Step:
    """One optimizer update, as all ranks know it but for `seconds`, what follows from them, and `pace`."""

    step: int
    """Its number, from 1."""
    epoch: float
    loss: float
    """Token losses of the global batch / its target tokens."""
    learning_rate: float
    grad_norm: float
    tokens: int
    """Real tokens of the global batch, padding apart."""
    target_tokens: int
    seconds: float
    tokens_per_second: float
    mfu: float | None
    """Model operations done / those that one measured device times the number of workers could do."""
    stopped: bool
    """True on the last step of a run that was asked to stop before its end."""
    pace: Pace
    """Where this rank's time went."""
