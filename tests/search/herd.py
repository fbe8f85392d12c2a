"""A population whose trials are trained in this very process, as their workers would, without Ray."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tests.search.under_tune import search_keys
from tests.worker.alone import Gathered
from tests.worker.under_ray import World

from tunefleet.artifacts.claim import claim_run
from tunefleet.artifacts.folder import RunFolder
from tunefleet.artifacts.metrics import read_metrics
from tunefleet.hardware import Hardware
from tunefleet.launch.runs import open_run
from tunefleet.plan import Plan
from tunefleet.recipe.tune import search_from
from tunefleet.search.book import RUNS, Book, Trial
from tunefleet.search.driven import plan_place
from tunefleet.search.opening import open_space
from tunefleet.search.population import Population
from tunefleet.search.schedulers import Clock, clock
from tunefleet.search.trials import Workshop
from tunefleet.shapes import ClusterShape, NodeShape
from tunefleet.storage import place
from tunefleet.training.determinism import pin
from tunefleet.worker.job import Job
from tunefleet.worker.reporter import Reporter
from tunefleet.worker.run import attempt
from tunefleet.worker.seat import Seat


@dataclass
class Herd:
    """A search whose trials are trained in this process."""

    world: World
    shop: Workshop
    book: Book
    time: Clock

    def population(self) -> Population:
        return Population(self.shop, self.book, self.time, 7, lambda _: None)

    def folder(self, one: Trial) -> RunFolder:
        return RunFolder(self.shop.search.child(RUNS, one.name))

    def plan(self, one: Trial) -> Plan:
        return Plan.model_validate_json(plan_place(self.shop.search, one.name).read_text())

    def train(self, one: Trial, until: int | None) -> dict[str, Any]:
        """Train a trial to a step as its workers would."""
        plan, folder = self.plan(one), self.folder(one)
        open_run(plan, folder)
        job = Job(plan, folder, "a trial", claim_run(folder.claim), until=until)
        pin(plan.workers.threads)
        seat, told = Seat(0, 1, torch.device("cpu")), Gathered()
        return attempt(job, seat, Reporter(job, seat, told), told)

    def losses(self, one: Trial) -> dict[int, float]:
        return {line["step"]: line["loss"] for line in self.lines(one) if "loss" in line}

    def lines(self, one: Trial) -> list[dict[str, Any]]:
        return read_metrics(Path(self.folder(one).record.path) / "metrics.jsonl")


def herd(world: World, space: list[dict[str, Any]], *, real: bool = False, **more: object) -> Herd:
    """A population of which every member stands at step 10.

    Args:
        real: whether they are judged by their losses; else the first one counts as the best, and so on.
    """
    keys = search_keys(
        world, space, tune={"scheduler": "pbt", "perturbation_interval": 10}, **{"logging_steps": 1, **more}
    )
    search = search_from(keys)
    folder = place(world.folder / "runs" / "search")
    cluster = ClusterShape((NodeShape(cpus=2),), cpu=Hardware("cpu", bf16=False))
    shop = Workshop(open_space(search), search.tune, search.keys, cluster, world.folder, folder)
    planned = shop.survey()[0].plan
    timed = clock(search.tune, planned.batch.updates, planned.cadence)
    made = Herd(world, shop, Book(folder), timed)
    for number, point in enumerate(shop.space.points(), 1):
        plan = shop.plan(point)
        one = made.book.add(point, "branch", "method", 1, plan.batch.updates)
        shop.put(one, plan)
        one.until, one.state = 10, "paused"
        ending = made.train(one, 10)
        assert (ending["stopped"], ending["step"]) == (True, 10)
        loss = ending["eval_loss"] if real else float(number)
        one.steps, one.reports = 10, [{"step": 10, "eval_loss": loss}]
    made.book.save()
    return made
