"""What a fork server has ready, so that its forks need not load it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.search.warm.in_forks import Folder

from tunefleet.search.warm.forks import ONE_THREAD

# In a process of its own, as it counts the modules of the whole process. It trains where a fork would.
_SCRIPT = """
import json, sys
from pathlib import Path
from tunefleet.plan import Plan
from tunefleet.search.warm.server import load_what_is_loaded_late, make_ready, refuse_threads
from tests.worker.alone import run_alone

plans = [Plan.model_validate(plan) for plan in json.loads(sys.stdin.read())]
load_what_is_loaded_late()
make_ready(plans)
refuse_threads()
late = {}
for plan in plans:
    before = set(sys.modules)
    run_alone(plan.recipe, Path(plan.place.root))
    late[plan.place.run_name] = sorted(set(sys.modules) - before)
print(json.dumps(late))
"""

METHODS: dict[str, dict[str, object]] = {
    "lora": {},
    "full": {"finetuning_type": "full", "lora_dropout": None},
    "galore": {"finetuning_type": "full", "lora_dropout": None, "use_galore": True, "galore_rank": 4},
    "ratio": {"finetuning_type": "full", "lora_dropout": None, "use_badam": True, "badam_mode": "ratio"},
}


@pytest.mark.slow
def test_a_server_has_one_thread_and_leaves_little_to_load(
    tmp_path: Path, tiny_model: Path, quickstart_world: Path, repository: Path
) -> None:
    folder = Folder(tmp_path, tiny_model, quickstart_world)
    plans = [folder.plan(name, **keys).model_dump(mode="json") for name, keys in METHODS.items()]
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT],
        input=json.dumps(plans),
        env={**os.environ, **ONE_THREAD},
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    late: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    assert late.keys() == METHODS.keys()
    for name, modules in late.items():
        assert len(modules) < 30, (name, modules)
