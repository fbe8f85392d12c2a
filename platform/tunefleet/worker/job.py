"""What the driver hands to every worker."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from tunefleet.artifacts.folder import RunFolder
from tunefleet.plan import Plan
from tunefleet.storage import place


class JobConfig(TypedDict):
    """A job on its way to the workers."""

    plan: str
    """A `Plan` as JSON."""
    run: str
    """Where the run's folder is: a path or a URI."""
    mailbox: Any
    """The handle of the mailbox's actor."""
    command: str
    """What repeats the run."""
    mark: str
    """Of the command, in the run's claim."""
    until: int | None
    """The step after which the workers save and leave, for a run that goes on later; None = the run's end."""


@dataclass(frozen=True)
class Job:
    """One run, as a worker knows it."""

    plan: Plan
    folder: RunFolder
    command: str
    mark: str
    shared: Path | None = None
    """A folder of this node where warm trials leave for each other what they begin from (`shared.py`)."""
    until: int | None = None


def read_job(config: JobConfig) -> Job:
    """Open what the driver packed."""
    plan = Plan.model_validate_json(config["plan"])
    return Job(plan, RunFolder(place(config["run"])), config["command"], config["mark"], until=config["until"])
