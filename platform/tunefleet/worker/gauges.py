"""A worker's figures as Ray metrics, which Ray exports to Prometheus from each node (with `ray_` before each name)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from ray.util.metrics import Counter, Gauge

if TYPE_CHECKING:  # a warm trial's host shows figures, and does not load what trains
    from tunefleet.training.step import Step

TAGS = ("run", "rank", "node")

_GAUGES = {
    "step": "Updates applied.",
    "step_seconds": "Seconds of the last update, waiting for other workers included.",
    "compute_seconds": "Seconds of this worker's own forward and backward passes in the last update.",
    "data_wait_seconds": "Seconds that this worker waited for data in the last update.",
    "tokens_per_second": "Tokens that this worker was fed in the last update / its seconds.",
    "memory_peak_bytes": "The most memory so far: allocated by torch on a GPU, else resident.",
}
"""Of every worker."""
_LEADER_GAUGES = {
    "loss": "Token losses of the last global batch / its target tokens.",
    "eval_loss": "Loss over the held-out rows, the last evaluation.",
    "grad_norm": "Norm of the last global gradient before clipping.",
    "learning_rate": "Learning rate of the last update.",
}
"""Of the run; rank 0 tells them."""


class Gauges:
    """One worker's figures, as they come."""

    def __init__(self, show: Callable[[Mapping[str, float]], None]) -> None:
        """
        Args:
            show: takes figures by their names, `tokens` as those since the last time.
        """
        self._show = show

    def stepped(self, step: Step) -> None:
        """Show an update."""
        pace = step.pace
        figures = {
            "step": step.step,
            "step_seconds": step.seconds,
            "data_wait_seconds": pace.data_wait_seconds,
            "tokens_per_second": pace.tokens / step.seconds,
            "tokens": pace.tokens,
            "loss": step.loss,
            "grad_norm": step.grad_norm,
            "learning_rate": step.learning_rate,
        }
        self._show(figures if pace.compute_seconds is None else figures | {"compute_seconds": pace.compute_seconds})

    def peak_memory(self, memory_bytes: float) -> None:
        """Show the peak of this worker's memory."""
        self._show({"memory_peak_bytes": memory_bytes})

    def evaluated(self, loss: float) -> None:
        """Show an evaluation."""
        self._show({"eval_loss": loss})


class RayMetrics:
    """Where figures go under Ray: this process's metrics."""

    def __init__(self, run: str, rank: int, node: str) -> None:
        tags = dict(zip(TAGS, (run, str(rank), node), strict=True))
        told = _GAUGES | (_LEADER_GAUGES if rank == 0 else {})
        self._gauges = {name: Gauge(f"tunefleet_{name}", text, TAGS) for name, text in told.items()}
        self._tokens = Counter("tunefleet_tokens", "Tokens that this worker was fed since it started.", TAGS)
        for metric in (*self._gauges.values(), self._tokens):
            metric.set_default_tags(tags)

    def show(self, figures: Mapping[str, float]) -> None:
        """Show the figures that this worker has a metric for."""
        for name, value in figures.items():
            if name == "tokens" and value:
                self._tokens.inc(value)
            elif name in self._gauges:
                self._gauges[name].set(value)
