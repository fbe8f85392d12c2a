"""What a search does not wait for."""

from __future__ import annotations

import subprocess
import sys

import pytest

LOOK = """
import sys
from contextlib import nullcontext
from ray import tune
from ray.tune.tune import air_usage
from tunefleet.search.telemetry import callbacks_uncounted

with callbacks_uncounted() if sys.argv[1] == "uncounted" else nullcontext():
    air_usage.tag_callbacks([tune.Callback()])  # as Ray Tune does, before the first trial
print("mlflow" in sys.modules, "wandb" in sys.modules)
"""


@pytest.mark.parametrize(("how", "loaded"), [("uncounted", "False False"), ("counted", "True True")])
def test_no_tracker_is_loaded_to_count_callbacks(how: str, loaded: str) -> None:
    """The second case is Ray's own way: when it ends, `telemetry.py` has no use any more."""
    done = subprocess.run([sys.executable, "-c", LOOK, how], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == loaded
