"""A recorded run at real trackers, in a process of its own that may be killed. Run by test_resumed.

Arguments: the record's folder, the trackers, the update behind which the process dies (0: none), whether lines have
arrived by then.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from tunefleet.artifacts.record import Recorder
from tunefleet.artifacts.trackers.mlflow_run import MlflowRun
from tunefleet.artifacts.trackers.tracker import TrackedRun, Tracker
from tunefleet.artifacts.trackers.wandb_run import WandbRun
from tunefleet.storage import place
from tunefleet.training.step import Pace, Step

UPDATES, SAVE_STEPS = 20, 8
CONFIG = {"learning_rate": 1e-3, "lora_target": ["q_proj", "v_proj"], "plan": {"batch": {"global_batch_samples": 16}}}


def update(number: int) -> Step:
    return Step(
        step=number,
        epoch=number / 8,
        loss=1 / 3 + 1 / number,
        learning_rate=1e-4 / number,
        grad_norm=0.1 * number,
        tokens=20,
        target_tokens=11,
        seconds=time.time() % 1,  # differs each time that the update is made
        tokens_per_second=1.0,
        mfu=None,
        stopped=False,
        pace=Pace(20, 0.01, 0.1),
    )


def tracker(name: str, folder: Path) -> Tracker:
    run = TrackedRun("recorded", CONFIG, place(folder), folder)
    return MlflowRun(run, folder.parent) if name == "mlflow" else WandbRun(run)


def main(folder: Path, names: str, dies_at: int, arrived: bool) -> None:
    checkpoint = folder.parent / "checkpoint.json"
    start, state = json.loads(checkpoint.read_text()) if checkpoint.exists() else (0, None)
    trackers = [tracker(name, folder) for name in names.split(",")]
    with Recorder(
        folder, start, logging_steps=1, updates=UPDATES, world_size=1, state=state, tensorboard=False, trackers=trackers
    ) as recorder:
        for number in range(start + 1, UPDATES + 1):
            recorder.step(update(number), workers={"step_seconds": [0.5, 0.6]})
            if number % 5 == 0:
                recorder.evaluation(number, number / 8, 2 / number)
            if number % SAVE_STEPS == 0:
                checkpoint.write_text(json.dumps((number, recorder.state())))
            if number == dies_at:
                while arrived and min(one.reached("train/loss") for one in trackers) < number:
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGKILL)
    said = recorder.complaints()
    assert said == [], said


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4] == "arrived")
