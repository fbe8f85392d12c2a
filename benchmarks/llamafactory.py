"""`make bench`: LoRA and full fine-tuning beside LLaMA-Factory 0.9.5, both sides taking turns in one run.

    .venv/bin/python benchmarks/llamafactory.py                       the measurement
    .venv/bin/python benchmarks/llamafactory.py --runs 1 --steps 10   a look whether it works

Prints a table, writes it and every number behind it to benchmarks/results/, and ends with code 1 where at least five
runs show less than BAR times the peer's default useful tokens per second for LoRA.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from beside.environment import make_environment
from beside.judge import held_out_loss, load_weights, movement_ratio
from beside.measure import Run, markdown_table
from beside.report import HEADER, Outcome, facts, summary, table
from beside.sides import Commands, Side, output_folder, run_side, sides
from beside.work import Work, make_work

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
METHODS = ("lora", "full")
BAR = 2.5
RUNS_FOR_A_VERDICT = 5


def measure(method: str, work: Work, commands: Commands, repetitions: int) -> list[Outcome]:
    """Let the sides take turns `repetitions` times, after one trial of each that is not counted."""
    asked = sides(work)
    for side in asked:
        run_side(side, work, method, commands, trial=True)
    runs: dict[str, list[Run]] = {side.name: [] for side in asked}
    for repetition in range(repetitions):
        for side in asked:
            run = run_side(side, work, method, commands, trial=False)
            check_tokens(side, run, work)
            runs[side.name].append(run)
            done = f"{method} {repetition + 1}/{repetitions} {side.name}"
            print(f"{done}: {run.steady_rate:.0f} useful tokens/s, {run.wall_seconds:.1f} s in all", flush=True)
    return judged(method, work, commands, asked, runs)


def check_tokens(side: Side, run: Run, work: Work) -> None:
    """Refuse to compare a side that read other rows than the work has.

    Raises:
        SystemExit: it did.
    """
    if run.tokens != work.tokens and not side.packs:
        raise SystemExit(f"{side.name} trained on {run.tokens:.0f} tokens where the rows have {work.tokens}.")


def judged(
    method: str, work: Work, commands: Commands, asked: Sequence[Side], runs: Mapping[str, Sequence[Run]]
) -> list[Outcome]:
    """Return the outcomes; distances are taken to the result of the first side, the peer at its defaults."""
    start = load_weights(work.adapter if method == "lora" else work.base)
    folders = [output_folder(side, method, commands) / "model" for side in asked]
    first = load_weights(folders[0])
    return [
        Outcome(
            side,
            tuple(runs[side.name]),
            held_out_loss(folder, work),
            movement_ratio(load_weights(folder), first, start),
        )
        for side, folder in zip(asked, folders, strict=True)
    ]


def keep(name: str, text: str, record: dict[str, object]) -> None:
    """Write the table and every number behind it into RESULTS."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text + "\n")
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train beside LLaMA-Factory 0.9.5 and compare speed and results.")
    parser.add_argument("--runs", type=int, default=5, help="repetitions of each side (5)")
    parser.add_argument("--steps", type=int, default=25, help="optimizer steps of 8 rows each, at most 125 (25)")
    parser.add_argument("--method", choices=METHODS, action="append", help="only this method; may be repeated (both)")
    return parser.parse_args()


def main() -> int:
    """Measure, print, write; return 1 where the bar is missed."""
    asked = arguments()
    root = REPOSITORY / ".benchmarks" / "llamafactory"
    peer = make_environment(REPOSITORY / ".venv-llamafactory", REPOSITORY / "benchmarks" / "llamafactory.txt")
    work = make_work(root / "work", asked.steps)
    commands = Commands(Path(sys.executable).with_name("tunefleet"), peer / "llamafactory-cli", root)
    lines: list[list[str]] = []
    record = facts(work, asked.runs)
    reached = True
    for method in asked.method or METHODS:
        outcomes = measure(method, work, commands, asked.runs)
        lines += table(method, work, outcomes)
        record[method] = [asdict(outcome) for outcome in outcomes]
        if method == "lora" and asked.runs >= RUNS_FOR_A_VERDICT:
            reached = outcomes[1].steady >= BAR * outcomes[0].steady
    text = f"{summary(work, asked.runs)}\n\n{markdown_table(HEADER, lines)}"
    print(f"\n{text}")
    keep("llamafactory" if asked.runs >= RUNS_FOR_A_VERDICT else "llamafactory_quick", text, record)
    if not reached:
        print(f"\nLoRA stays below {BAR} times the peer's default useful tokens per second.")
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
