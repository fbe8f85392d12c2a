"""What processes load that only drive a run: there are two of them for each trial, and they train nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

IMPORTS = "import sys, {module}; print(*sys.modules)"


@pytest.mark.parametrize(
    "module",
    [
        pytest.param("tunefleet.launch.placement", id="Ray's controller, for what it tells the driver"),
        pytest.param("tunefleet.search.trial", id="the driver of a trial"),
        pytest.param("tunefleet.search.warm.host", id="the host of warm trials"),
    ],
)
def test_a_process_that_only_drives_does_not_load_what_trains(module: str) -> None:
    words = [sys.executable, "-c", IMPORTS.format(module=module)]
    loaded = subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()
    assert module in loaded
    assert not {"transformers", "peft", "tunefleet.training.loop"} & set(loaded)
