"""What `make quickstart` runs: prepare, pre-train, tune, and show what the tuning changed.

    python jobs/quickstart.py

Each step is a command that could be typed, and is printed. What an earlier call has finished is not done again: the
text, the tokenizer and the base model stay in .quickstart/, and an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
WORLD = Path(".quickstart")
SOURCES = ("docstrings.py", "prepare_quickstart.py", "pretrain.yaml")  # what the base model is made from
MADE = ("data", "init", "base", "lora", "runs")
HELDOUT_GOAL = 0.9  # the tuned model's held-out loss, as a part of the base's
ANSWER_TOKENS = 60

console = Console()

Line = Mapping[str, float | None]


@dataclass(frozen=True)
class Result:
    """What the tuning changed. Losses in nats for each answer token."""

    train_before: float
    train_after: float
    heldout_before: float
    heldout_after: float
    tokens_per_second: float
    """Median over the logged steps, all workers together."""
    vocabulary: int

    @property
    def chance(self) -> float:
        """The loss of guessing: ln(vocabulary)."""
        return math.log(self.vocabulary)


def execute(words: Sequence[str], *, quiet: bool = False) -> str:
    """Run a command in the repository's root and return what it printed, or let it print when `quiet` is false.

    Ends this program with the command's exit code if that is not 0.
    """
    console.print(f"[bold]$ {shlex.join(words)}[/]", highlight=False, soft_wrap=True)
    here = Path(sys.executable).parent
    program = here / ("python" if words[0] == "python" else words[0])
    process = subprocess.Popen([str(program), *words[1:]], stdout=subprocess.PIPE if quiet else None, text=True)
    output = ""
    while process.returncode is None:
        try:
            output = process.communicate()[0] or ""
        except KeyboardInterrupt:  # the command was told as well: it saves a checkpoint and ends by itself
            continue
    if process.returncode:
        sys.exit(process.returncode)
    return output


def fingerprint() -> dict[str, str]:
    """What the world depends on: this interpreter's documentation, and the files that make it."""
    digest = hashlib.sha256(b"".join((ROOT / "jobs" / name).read_bytes() for name in SOURCES))
    return {"python": sys.version, "sources": digest.hexdigest()}


def prepare() -> None:
    """Make text, tokenizer and model, unless they are there and still what the sources say."""
    stamp = WORLD / "made_from.json"
    if stamp.is_file() and json.loads(stamp.read_text()) == fingerprint():
        console.print(f"{WORLD}/data and {WORLD}/init are there.", highlight=False)
        return
    for name in MADE:
        shutil.rmtree(WORLD / name, ignore_errors=True)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, which transformers asks for, wonders about it aloud
    execute(["python", "jobs/prepare_quickstart.py"])
    stamp.write_text(json.dumps(fingerprint(), indent=2))


def pretrain() -> None:
    """Train the base model, unless an earlier call did."""
    if (WORLD / "base" / "run.json").is_file():  # written last
        console.print(f"{WORLD}/base is there (remove it to pre-train again).", highlight=False)
        return
    execute(["tunefleet", "train", "jobs/pretrain.yaml", "overwrite_output_dir=true"])


def held_out_example() -> tuple[str, str]:
    """A question from a module that the model has never seen, and its true answer, neither short nor long."""
    rows = [json.loads(line) for line in (WORLD / "data" / "heldout.jsonl").read_text().splitlines()]
    fitting = [row for row in rows if 60 <= len(row["output"]) <= 160] or rows
    row = fitting[len(fitting) // 2]
    return row["instruction"], row["output"]


def ask(folder: Path, question: str) -> str:
    words = ["tunefleet", "generate", str(folder), "--prompt", question]
    printed = execute([*words, "--max-new-tokens", str(ANSWER_TOKENS), "--json"], quiet=True)
    answer: str = json.loads(printed)["answer"]
    return answer.strip()


def read_result(metrics: Sequence[Line], vocabulary: int) -> Result:
    """The result, from the lines of `metrics.jsonl`.

    Raises:
        ValueError: a line of training is missing, or one of evaluation.
    """
    losses = [line["loss"] for line in metrics if line.get("loss") is not None]
    heldout = [line["eval_loss"] for line in metrics if line.get("eval_loss") is not None]
    speeds = [line["tokens_per_second"] for line in metrics if line.get("tokens_per_second") is not None]
    if not losses or not speeds or len(heldout) < 2:
        raise ValueError("metrics.jsonl lacks lines of training or of evaluation")
    return Result(
        train_before=float(losses[0] or 0),
        train_after=statistics.fmean(float(loss or 0) for loss in losses[-3:]),
        heldout_before=float(heldout[0] or 0),
        heldout_after=float(heldout[-1] or 0),
        tokens_per_second=statistics.median(float(speed or 0) for speed in speeds),
        vocabulary=vocabulary,
    )


def result_table(result: Result) -> Table:
    table = Table(title="LoRA tuning of the quickstart's base model", title_justify="left")
    for name in ("", "before", "after", "after / before"):
        table.add_column(name, justify="left" if not name else "right")
    for name, before, after in (
        ("loss on training rows", result.train_before, result.train_after),
        ("loss on held-out modules", result.heldout_before, result.heldout_after),
    ):
        table.add_row(name, f"{before:.3f}", f"{after:.3f}", f"{after / before:.2f}")
    table.add_row("guessing, ln(vocabulary)", f"{result.chance:.3f}", "", "")
    table.add_row("tokens per second", "", f"{result.tokens_per_second:,.0f}", "")
    return table


def show_answers(question: str, before: str, after: str, true: str) -> None:
    table = Table(title="A question from a held-out module", title_justify="left", show_header=False, show_lines=True)
    for name, text in (("question", question), ("base", before), ("tuned", after), ("documentation", true)):
        table.add_row(name, text)
    console.print(table, highlight=False)


def main() -> None:
    os.chdir(ROOT)
    began = time.monotonic()
    prepare()
    pretrain()
    execute(["tunefleet", "train", "jobs/lora_sft.yaml"])
    question, true = held_out_example()
    before, after = ask(WORLD / "base", question), ask(WORLD / "lora", question)

    metrics = [json.loads(line) for line in (WORLD / "lora" / "metrics.jsonl").read_text().splitlines()]
    vocabulary = json.loads((WORLD / "base" / "config.json").read_text())["vocab_size"]
    result = read_result(metrics, vocabulary)
    console.print(result_table(result))
    show_answers(question, before, after, true)
    console.print(f"Plot: {WORLD / 'lora' / 'loss.png'}   adapter: {WORLD / 'lora'}", highlight=False)
    console.print(f"{time.monotonic() - began:.0f} seconds", highlight=False)
    if result.heldout_after > HELDOUT_GOAL * result.heldout_before:
        console.print(f"The held-out loss did not fall to {HELDOUT_GOAL:g} of the base's.", style="red")
        sys.exit(1)


if __name__ == "__main__":
    main()
