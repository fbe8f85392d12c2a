"""Ray's telemetry, where it takes a person's time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray.air._internal import usage


@contextmanager
def callbacks_uncounted() -> Iterator[None]:
    """Let Ray Tune not count the kinds of callbacks that a search has.

    For that it imports every tracker that is installed, MLflow and Weights & Biases among them: a second before the
    first trial, whether its reports are switched on or not.
    """
    module: Any = usage
    counts = module.tag_callbacks
    module.tag_callbacks = lambda _: False
    try:
        yield
    finally:
        module.tag_callbacks = counts
