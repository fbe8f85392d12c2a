"""Where a worker of Ray Train begins: light to import, so that it can choose how the rest is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunefleet.collecting import collect_as_ever, collect_rarely

if TYPE_CHECKING:
    from tunefleet.worker.job import JobConfig
    from tunefleet.worker.run import Ending


def run_under_ray(config: JobConfig) -> Ending:
    """What Ray Train calls on each of its workers."""
    collect_rarely()
    from tunefleet.worker.job import read_job
    from tunefleet.worker.run import run_worker
    from tunefleet.worker.under_ray import UnderRay

    collect_as_ever()
    return run_worker(read_job(config), UnderRay(config["mailbox"]))
