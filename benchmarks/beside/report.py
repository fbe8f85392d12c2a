"""The table: a line for each side, with its times, what it trained, and on what, all in the same line."""

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

from beside.commands import THREADS
from beside.environment import LLAMAFACTORY
from beside.measure import WARM_UP_STEPS, Run, spread
from beside.sides import LEARNING_RATE, Side
from beside.work import ROWS, VOCABULARY, Work


@dataclass(frozen=True)
class Outcome:
    """What one side gave for one method."""

    side: Side
    runs: tuple[Run, ...]
    held_out_loss: float  # of the last run's weights
    movement_ratio: float  # distance to the peer's default result / the way that came from the start

    @property
    def steady(self) -> float:
        """Median useful tokens per second once warm."""
        return spread([run.steady_rate for run in self.runs]).median

    @property
    def whole(self) -> float:
        """Median useful tokens per second of the whole command."""
        return spread([run.whole_rate for run in self.runs]).median


HEADER = (
    "method",
    "side",
    "useful tokens/s, warm",
    "useful tokens/s, whole command",
    "seconds, whole command",
    "against the defaults",
    "loss, first > last step",
    "gradient norm, first > last",
    "held-out loss",
    "distance",
    "arithmetic",
    "batch",
    "model",
    "sequence",
    "threads",
)


def table(method: str, work: Work, outcomes: Sequence[Outcome]) -> list[list[str]]:
    """Return one line for each side: times first, then what was trained, then what it was trained on."""
    mean = work.tokens / work.rows
    model = f"Llama {work.parameters / 1e6:.1f}M, V {VOCABULARY}"
    sequence = f"mean {mean:.0f}, longest {work.longest}"
    lines: list[list[str]] = []
    for outcome in outcomes:
        last = outcome.runs[-1]
        steady = f"{outcome.steady / outcomes[0].steady:.2f}x"
        whole = f"{outcome.whole / outcomes[0].whole:.2f}x"
        lines.append(
            [
                method,
                outcome.side.name,
                str(spread([run.steady_rate for run in outcome.runs])),
                str(spread([run.whole_rate for run in outcome.runs])),
                f"{spread([run.wall_seconds for run in outcome.runs]).median:.1f}",
                f"{steady} warm, {whole} whole",
                f"{last.losses[0]:.4f} > {last.losses[-1]:.4f}",
                f"{last.grad_norms[0]:.3f} > {last.grad_norms[-1]:.3f}",
                f"{outcome.held_out_loss:.4f}",
                f"{outcome.movement_ratio:.1e}",
                outcome.side.arithmetic,
                outcome.side.batch,
                model,
                sequence,
                str(THREADS),
            ]
        )
    return lines


def facts(work: Work, repetitions: int) -> dict[str, object]:
    """Return what a reader needs beside the numbers; no folder and no name of a machine."""
    packages = {name: version(name) for name in ("torch", "transformers", "peft", "ray", "tunefleet")}
    return {
        "peer": LLAMAFACTORY,
        "ours": packages,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "threads": THREADS,
        "repetitions": repetitions,
        "rows_visited": work.rows,
        "rows_given": ROWS,
        "tokens": work.tokens,
        "fill_of_padded_batches": round(work.fill, 3),
        "learning_rate": LEARNING_RATE,
        "warm_up_steps_left_out": WARM_UP_STEPS,
    }


def summary(work: Work, repetitions: int) -> str:
    """Return the sentence above the table."""
    return (
        f"{os.cpu_count()} cores, {THREADS} thread a side, median (least-greatest) of {repetitions} runs taking turns; "
        f"{ROWS} alpaca-style rows given, {work.rows} visited in {work.steps} steps, {work.tokens} tokens; "
        f"padded batches would be {work.fill:.0%} full; "
        f"learning rate {LEARNING_RATE}; 'warm' leaves out the first {WARM_UP_STEPS} steps and all that is not a step."
    )
