"""Plans, methods, data and findings as rich tables."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Column, Table
from rich.text import Text

from tunefleet.data.prepare import PreparedData
from tunefleet.launch.doctor import Finding
from tunefleet.places import SITES, Line, in_words, marked
from tunefleet.plan import Plan, WorkerPlan
from tunefleet_strategies.contract import Strategy


def plan_table(plan: Plan) -> Table:
    """Every decided number of a run, one a line."""
    table = _two_columns(f"plan of {plan.place.run_name}")
    for name, value in _plan_rows(plan):
        table.add_row(name, Text(value))
    return table


def _plan_rows(plan: Plan) -> list[tuple[str, str]]:
    batch, workers, model = plan.batch, plan.workers, plan.model
    request = ", ".join(f"{amount:g} {name}" for name, amount in workers.resources.items())
    rows = [
        ("method", plan.recipe.method.label()),
        (
            "workers",
            f"{_number(workers)} x ({request}), {workers.placement_strategy}, {workers.threads} thread(s) each",
        ),
        (
            "numbers",
            f"compute {plan.precision.compute}, trains {plan.precision.trainable}, frozen {plan.precision.frozen}",
        ),
        ("shared out by", "nothing" if plan.sharding is None else in_words(plan.sharding)),
        ("model", f"{model.architecture}, {model.parameters:,} parameters"),
        ("trainable", f"{model.trainable_parameters:,} ({model.trainable_parameters / model.parameters:.2%})"),
        ("memory a worker", _memory(plan)),
        (
            "global batch",
            f"{batch.global_batch_samples} samples = {batch.micro_batch_samples} x {batch.accumulation} accumulated x "
            f"{workers.count} worker(s)",
        ),
        ("updates", _or_unknown(batch.updates)),
        ("updates an epoch", _or_unknown(batch.updates_per_epoch)),
        ("warm-up updates", _or_unknown(batch.warmup_updates)),
        ("schedule", plan.recipe.training.lr_scheduler_type),
        ("learning rate", f"{plan.recipe.training.learning_rate:g}"),
        ("logging", f"every {plan.cadence.logging} updates"),
        ("checkpoints", _every(plan.cadence.saving)),
        ("evaluation", _every(plan.cadence.evaluation)),
        ("preemption notices", f"looked for every {plan.cadence.preemption_notices} updates, or sooner"),
        ("resumable", "yes" if plan.resumable else "no"),
        ("run", f"{plan.place.storage_path.rstrip('/')}/{plan.place.run_name}"),
        ("output_dir", plan.place.output_dir),
    ]
    data = plan.data
    if data is not None:
        rows.insert(7, ("training data", f"{data.train_rows:,} rows, {data.train_tokens:,} tokens"))
        rows.insert(8, ("learned tokens", f"{data.train_target_tokens:,} an epoch"))
        rows.insert(9, ("held-out data", f"{data.evaluation_rows:,} rows" if data.evaluation_rows else "none"))
    return rows


def _memory(plan: Plan) -> str:
    parts = {
        "weights": plan.model.weight_bytes,
        "gradients": plan.model.gradient_bytes,
        "optimizer": plan.model.optimizer_bytes,
    }
    listed = ", ".join(f"{name} {size / 2**20:,.1f} MiB" for name, size in parts.items())
    return f"{listed}, and activations"


def _number(workers: WorkerPlan) -> str:
    return f"{workers.least} to {workers.count}" if workers.elastic else str(workers.count)


def _or_unknown(value: int | None) -> str:
    return "known once the data is tokenised" if value is None else f"{value:,}"


def _every(value: int | None) -> str:
    return "never" if value is None else f"every {value} updates"


def data_table(prepared: PreparedData) -> Table:
    """Sizes of the tokenised splits."""
    table = Table("split", "rows", "tokens", "learned tokens")
    for name, split in (("training", prepared.train), ("held-out", prepared.evaluation)):
        if split is not None:
            table.add_row(name, f"{split.rows:,}", f"{split.tokens:,}", f"{split.target_tokens:,}")
    return table


def methods_table(registered: Iterable[type[Strategy]]) -> Table:
    """One line a method: how it is selected, what it is, its keys."""
    table = Table("method", "selected by", "what it does", Column("keys", no_wrap=True))
    for method in registered:
        selector = ", ".join(f"{key}: {str(value).lower()}" for key, value in method.selector.items())
        table.add_row(method.name, selector, Text(method.summary), "\n".join(method.model_fields) or "none")
    return table


def matrix_table(lines: Iterable[Line]) -> tuple[Table, list[str]]:
    """Methods against places, and the numbered sentences that refuse."""
    sentences: dict[str, int] = {}
    lines = list(lines)
    longest = max(len(word) for line in lines for word in f"{line.method} {line.form}".split())
    # Keys must not be cut where a terminal is narrow; the cells beside them are short words that wrap.
    places = [Column(site.label, max_width=max(map(len, ("allowed", *site.label.split())))) for site in SITES]
    table = Table(Column("method", min_width=longest), *places, padding=0)
    for line in lines:
        name = f"{line.method}\n{line.form}" if line.form else line.method
        table.add_row(name, *(marked(cell, sentences) for cell in line.cells))
    return table, [f"({number}) {sentence}" for sentence, number in sentences.items()]


def doctor_table(findings: Iterable[Finding]) -> Table:
    """One line a finding; what is missing in red."""
    table = _two_columns("this machine")
    for finding in findings:
        table.add_row(finding.name, Text(finding.value, style="" if finding.ok else "red"))
    return table


def _two_columns(title: str) -> Table:
    return Table("", "", title=title, show_header=False, title_justify="left")
