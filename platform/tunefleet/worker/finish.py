"""What a run that went to its end leaves: the model that a user keeps, and the last word of its record."""

from __future__ import annotations

import tempfile
from pathlib import Path

from torch import nn
from transformers import GenerationConfig

from tunefleet.artifacts.claim import Claim
from tunefleet.artifacts.fingerprints import fingerprint
from tunefleet.checkpoints import step_name
from tunefleet.models import causal_lm
from tunefleet.training.checkpoint import fingerprints, load_weights
from tunefleet.worker.build import OpenedData, Trainee
from tunefleet.worker.job import Job
from tunefleet.worker.reporter import Reporter
from tunefleet.worker.seat import Seat


def finish(
    job: Job, seat: Seat, trainee: Trainee, data: OpenedData, reporter: Reporter, claim: Claim
) -> dict[str, str]:
    """Write the model and the result. Returns the fingerprints of the final state. Collective.

    Raises:
        Superseded: another command has taken the run over.
    """
    prints = fingerprints(trainee.state) | {"data": _data_fingerprint(trainee, data)}
    best = reporter.best_step if job.plan.recipe.run.load_best_model_at_end else None
    if best is not None and best != reporter.step:
        reporter.notice(f"The model that is kept is that of step {best}, where eval_loss was lowest.")
        seat.together(lambda: _load_best(job, trainee, best))
    whole = trainee.engine.whole_model()
    seat.together(lambda: _write_model(job, trainee, data, whole, claim) if seat.leads else None)
    reporter.finish(prints)
    return prints


def _data_fingerprint(trainee: Trainee, data: OpenedData) -> str:
    """Which rows, in which order, how far."""
    batches = trainee.batches
    order = {"rows": batches.rows, "global_batch": batches.global_batch, "seed": batches.seed}
    return fingerprint({"train": data.prepared.files["train.arrow"], "updates": batches.updates, **order})


def _load_best(job: Job, trainee: Trainee, step: int) -> None:
    checkpoint = job.folder.checkpoints.child(step_name(step))
    with tempfile.TemporaryDirectory(prefix="tunefleet-") as folder:
        checkpoint.download(Path(folder))
        load_weights(Path(folder), trainee.state)


def _write_model(job: Job, trainee: Trainee, data: OpenedData, model: nn.Module, claim: Claim) -> None:
    with tempfile.TemporaryDirectory(prefix="tunefleet-") as name:
        folder = Path(name)
        _set_stop_tokens(model, data)
        job.plan.recipe.method.export(model, folder, trainee.state.initial)
        if data.prepared.template_jinja:
            data.tokenizer.chat_template = data.prepared.template_jinja
        data.tokenizer.save_pretrained(str(folder))
        claim.check()
        job.folder.model.upload(folder)


def _set_stop_tokens(model: nn.Module, data: OpenedData) -> None:
    """Let generation end where the template ends an answer."""
    base = causal_lm(model)
    if base.generation_config is None:
        base.generation_config = GenerationConfig()
    base.generation_config.eos_token_id = list(data.prepared.stop_token_ids)
