"""What one attempt does, in this process: evaluate, save, stop, go on, keep the best, leave a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.worker.alone import Finished, Gathered, run_alone
from tests.worker.under_ray import METHODS
from transformers import AutoModelForCausalLM, AutoTokenizer

from tunefleet.artifacts.claim import claim_run
from tunefleet.artifacts.folder import RunFolder
from tunefleet.artifacts.metrics import TIMING_FIELDS, Line, read_metrics
from tunefleet.artifacts.record import read_attempts
from tunefleet.errors import Refused, RunFailed
from tunefleet.launch.cluster import local_shape
from tunefleet.launch.draft import draft
from tunefleet.plan import Plan
from tunefleet.recipe.read import read_flat
from tunefleet.storage import place
from tunefleet.worker.build import open_data
from tunefleet.worker.events import Evaluated, Logged, Noticed, Saved, Started, Stepped
from tunefleet.worker.job import Job
from tunefleet.worker.run import is_due, run_worker
from tunefleet.worker.seat import Seat

Run = Callable[..., Finished]


@pytest.fixture
def keys(job: dict[str, object]) -> dict[str, object]:
    return job | {
        "finetuning_type": "lora",
        "eval_dataset": "quickstart_heldout",
        "max_samples": 40,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "max_steps": 6,
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "logging_steps": 1,
        "bf16": False,
    }


@pytest.fixture
def run(keys: dict[str, object], tmp_path: Path) -> Run:
    def start(stop_at: int | None = None, **more: object) -> Finished:
        return run_alone(read_flat({**keys, **more}), tmp_path, stop_at)

    return start


def part(finished: Finished, *names: str) -> Path:
    return Path(finished.folder.root.child(*names).uri)


def lines(finished: Finished) -> list[Line]:
    """The record's lines without what the clock says."""
    found = read_metrics(part(finished, "record", "metrics.jsonl"))
    return [{key: value for key, value in line.items() if key not in TIMING_FIELDS} for line in found]


def evaluated(finished: Finished) -> list[float | None]:
    return [line["step"] for line in lines(finished) if "eval_loss" in line]


def checkpoints(finished: Finished) -> list[str]:
    return sorted(path.name for path in part(finished, "checkpoints").iterdir())


def result(finished: Finished) -> dict[str, object]:
    read: dict[str, object] = json.loads(part(finished, "record", "result.json").read_text())
    return read


@pytest.mark.parametrize(("step", "every", "due"), [(4, 2, True), (5, 2, False), (5, None, False), (5, 1, True)])
def test_what_is_due(step: int, every: int | None, due: bool) -> None:
    assert is_due(step, every) == due


def test_events_come_in_the_order_in_which_things_happen(run: Run) -> None:
    finished = run(max_steps=2, eval_on_start=True)
    kinds = [type(event) for event in finished.told.events if not isinstance(event, Noticed)]
    assert kinds == [Started, Evaluated, Stepped, Logged, Stepped, Logged, Evaluated, Saved]
    assert not finished.ending["stopped"]


def test_checkpoints_are_thinned_out_and_handed_over(run: Run) -> None:
    finished = run(save_total_limit=1)
    assert finished.told.checkpoints == ["step_00000002", "step_00000004", "step_00000006"]
    assert checkpoints(finished) == ["step_00000006"]


def test_a_run_that_ends_between_two_saves_is_saved_and_evaluated_at_its_end(run: Run) -> None:
    finished = run(max_steps=5, save_steps=4, eval_steps=4)
    assert finished.told.checkpoints == ["step_00000004", "step_00000005"]
    assert evaluated(finished) == [4, 5]


def test_epochs_are_saved_and_evaluated(run: Run) -> None:
    finished = run(max_steps=-1, num_train_epochs=2, save_strategy="epoch", eval_strategy="epoch", max_samples=8)
    assert finished.told.checkpoints == ["step_00000002", "step_00000004"]
    assert evaluated(finished) == [2, 4]


def test_do_eval_evaluates_once_at_the_end(run: Run) -> None:
    assert evaluated(run(eval_strategy="no", do_eval=True, save_strategy="no")) == [6]


ALONE = [name for name, keys in METHODS.items() if not {"sharding", "deepspeed"} & keys.keys()]
"""Methods on the plain engine; the others need a process group, which their own tests have."""


@pytest.mark.parametrize("method", ALONE)
def test_stopped_and_continued_is_as_if_nothing_had_happened(run: Run, method: str) -> None:
    twin = run(ray_run_name="twin", **METHODS[method])
    stopped = run(stop_at=2, **METHODS[method])
    assert stopped.ending["stopped"]
    assert stopped.told.checkpoints == ["step_00000002", "step_00000003"]
    assert not part(stopped, "record", "result.json").exists()
    continued = run(**METHODS[method])
    assert continued.notices == ("The run out goes on from step 3.",)
    assert continued.ending["executed_steps"] == 3
    assert lines(continued) == lines(twin)
    assert result(continued)["fingerprints"] == result(twin)["fingerprints"]
    assert [attempt["reason"] for attempt in read_attempts(part(continued, "record"))] == ["stopped", "finished"]


def test_a_damaged_checkpoint_is_passed_over_with_a_notice(run: Run) -> None:
    twin = run(ray_run_name="twin")
    stopped = run(stop_at=4)
    torn = part(stopped, "checkpoints", "step_00000005", "weights.safetensors")
    content = bytearray(torn.read_bytes())
    content[-1] ^= 1  # the size stays, only the hash tells
    torn.write_bytes(content)
    continued = run()
    told = [event.text for event in continued.told.events if isinstance(event, Noticed)]
    assert any("step_00000005 is skipped" in text for text in told)
    assert continued.ending["executed_steps"] == 2
    assert lines(continued) == lines(twin)


def test_a_run_may_begin_at_another_runs_checkpoint(run: Run) -> None:
    other = run(ray_run_name="other", stop_at=2)
    began = run(resume_from_checkpoint=str(part(other, "checkpoints", "step_00000003")))
    assert began.ending["executed_steps"] == 3
    assert [line["step"] for line in lines(began) if "loss" in line] == [4, 5, 6]


def test_a_run_may_go_another_way_from_its_own_checkpoint(run: Run) -> None:
    finished = run(save_total_limit=5)
    again = run(resume_from_checkpoint=str(part(finished, "checkpoints", "step_00000004")), overwrite_output_dir=True)
    assert again.ending["executed_steps"] == 2
    assert [line["step"] for line in lines(again) if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_an_attempt_that_died_before_its_first_checkpoint_leaves_no_line_behind(run: Run) -> None:
    stopped = run(stop_at=2, eval_on_start=True)
    shutil.rmtree(part(stopped, "checkpoints"))
    again = run(eval_on_start=True)
    assert evaluated(again) == [0, 2, 4, 6]
    assert not any("lost" in event.text for event in again.told.events if isinstance(event, Noticed))


def test_the_best_model_is_the_one_that_is_kept(run: Run) -> None:
    # A rate that rises all the way: better at first, much worse in the end.
    rising = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 6, "learning_rate": 0.3}
    finished = run(
        finetuning_type="full", load_best_model_at_end=True, save_total_limit=1, save_steps=1, eval_steps=1, **rising
    )
    losses = {int(line["step"] or 0): line["eval_loss"] or 0.0 for line in lines(finished) if "eval_loss" in line}
    best = min(losses, key=lambda step: losses[step])
    assert best < 6
    assert result(finished)["best_step"] == best
    assert checkpoints(finished) == [f"step_{best:08d}", "step_00000006"]
    kept = load_file(part(finished, "model", "model.safetensors"))
    saved = load_file(part(finished, "checkpoints", f"step_{best:08d}", "weights.safetensors"))
    assert kept
    assert all(torch.equal(tensor, saved[name]) for name, tensor in kept.items())


def test_save_only_model_leaves_nothing_to_resume_from(run: Run) -> None:
    stopped = run(save_only_model=True, stop_at=2)
    assert not part(stopped, "checkpoints", "step_00000002", "optimizer.pt").exists()
    again = run(save_only_model=True)
    assert again.ending["executed_steps"] == 6
    assert "begins anew" in again.notices[0]


def test_the_model_that_is_left_says_where_answers_end(run: Run, tiny_model: Path) -> None:
    finished = run(finetuning_type="full", max_steps=1, template="chatml")
    folder = part(finished, "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = AutoModelForCausalLM.from_pretrained(folder).generation_config
    assert tokenizer.convert_ids_to_tokens(config.eos_token_id) == ["<|im_end|>"]
    assert "<|im_start|>" in tokenizer.chat_template


def test_the_record_says_what_the_run_was_made_from(run: Run, keys: dict[str, object]) -> None:
    record = json.loads((part(run(max_steps=1), "record", "record.json")).read_text())
    assert record["recipe"]["learning_rate"] == keys["learning_rate"]
    assert record["plan"]["batch"]["global_batch_samples"] == 4
    assert record["hashes"].keys() == {"base", "train.arrow", "evaluation.arrow"}


def test_rows_that_changed_since_the_plan_are_noticed(keys: dict[str, object], tmp_path: Path) -> None:
    recipe = read_flat(keys)
    plan = draft(recipe, local_shape(recipe.ray), tmp_path)
    assert plan.data is not None
    assert open_data(plan).train.rows == plan.data.train_rows
    with pytest.raises(RunFailed, match="not those of the plan"):
        open_data(plan.model_copy(update={"data": plan.data.model_copy(update={"train_sha256": "another"})}))


def test_a_loss_that_explodes_ends_the_run_with_a_sentence(run: Run) -> None:
    with pytest.raises(RunFailed, match=r"not finite.*lower learning_rate"):
        run(finetuning_type="full", learning_rate=1e30, max_grad_norm=0)


def test_a_checkpoint_of_another_model_is_refused(run: Run) -> None:
    other = run(ray_run_name="other", stop_at=2, lora_rank=4)
    with pytest.raises(Refused, match="does not belong to this run"):
        run(resume_from_checkpoint=str(part(other, "checkpoints", "step_00000003")))


class Around:
    """One worker's surroundings, where nobody is."""

    def take_seat(self, plan: Plan) -> Seat:
        return Seat(0, 1, torch.device("cpu"))

    def post(self, seat: Seat) -> Gathered:
        return Gathered()

    def gauges(self, job: Job, seat: Seat) -> None:
        return None

    def listen(self) -> None:
        """Nobody sends a signal."""


def test_an_attempt_that_could_leave_no_note_of_its_end_is_the_last(keys: dict[str, object], tmp_path: Path) -> None:
    """Raising would have Ray start the next one, which would know nothing of this one: for ever at max_failures: -1."""
    recipe = read_flat(keys)
    plan = draft(recipe, local_shape(recipe.ray), tmp_path)
    folder = RunFolder(place(tmp_path / "run"))
    job = Job(plan, folder, "tunefleet train recipe.yaml", claim_run(folder.claim))
    (tmp_path / "run" / "record").write_text("a file in place of the folder")
    ending = run_worker(job, Around())
    assert ending["failed"]
    assert f"The run's folder {tmp_path / 'run'} cannot be written to ([Errno 20] Not a directory" in ending["why"]
