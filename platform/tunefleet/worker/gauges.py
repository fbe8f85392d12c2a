"""A worker's figures as Ray metrics, which Ray exports to Prometheus from each node (with `ray_` before each name)."""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge

from tunefleet.training.loop import Step

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
    """One worker's end."""

    def __init__(self, run: str, rank: int, node: str) -> None:
        tags = dict(zip(TAGS, (run, str(rank), node), strict=True))
        told = _GAUGES | (_LEADER_GAUGES if rank == 0 else {})
        self._gauges = {name: Gauge(f"tunefleet_{name}", text, TAGS) for name, text in told.items()}
        self._tokens = Counter("tunefleet_tokens", "Tokens that this worker was fed since it started.", TAGS)
        for metric in (*self._gauges.values(), self._tokens):
            metric.set_default_tags(tags)

    def stepped(self, step: Step) -> None:
        """Show an update."""
        self._show("step", step.step)
        self._show("step_seconds", step.seconds)
        self._show("data_wait_seconds", step.pace.data_wait_seconds)
        self._show("tokens_per_second", step.pace.tokens / step.seconds)
        if step.pace.compute_seconds is not None:
            self._show("compute_seconds", step.pace.compute_seconds)
        if step.pace.tokens:
            self._tokens.inc(step.pace.tokens)
        self._show("loss", step.loss)
        self._show("grad_norm", step.grad_norm)
        self._show("learning_rate", step.learning_rate)

    def peak_memory(self, memory_bytes: float) -> None:
        """Show the peak of this worker's memory."""
        self._show("memory_peak_bytes", memory_bytes)

    def evaluated(self, loss: float) -> None:
        """Show an evaluation."""
        self._show("eval_loss", loss)

    def _show(self, name: str, value: float) -> None:
        """Set a gauge, if this worker has it."""
        if name in self._gauges:
            self._gauges[name].set(value)
