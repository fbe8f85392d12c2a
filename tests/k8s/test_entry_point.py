"""What the pods of a rendered job do, done by hand: the entry point reads the ConfigMap's recipe and trains.

The head is a real one, the job reaches it as the operator's submitter sends it, and the environment is the head
container's; the claim is a folder, at another place than /mnt.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.job_server import Head, job_server

from tunefleet.launch.manifest import ManifestOptions, render
from tunefleet.launch.pods import RECIPE_FOLDER
from tunefleet.search.onto_cluster import demand_of

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

Object = dict[str, Any]


@pytest.fixture
def claim(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the claim is mounted: above everything that the tests make."""
    mounted = tmp_path_factory.getbasetemp()
    for module in ("off_this_machine", "pods"):
        monkeypatch.setattr(f"tunefleet.launch.{module}.MOUNT", str(mounted))
    return mounted


@pytest.fixture
def recipe(tmp_path: Path, claim: Path, quickstart_world: Path, tiny_model: Path) -> Object:
    return {
        "model_name_or_path": str(tiny_model),
        "dataset_dir": str(quickstart_world / "data"),
        "cache_dir": str(quickstart_world / "cache"),
        "dataset": "quickstart_train",
        "output_dir": "outputs/from_a_pod",
        "max_steps": 4,
        "max_samples": 20,
        "cutoff_len": 64,
        "plot_loss": False,
        "report_to": "none",
        "bf16": False,
        "resources_per_worker": {"CPU": 1},
    }


def rendered(path: Path, keys: Mapping[str, Any], claim: str) -> tuple[str, Object]:
    """What `tunefleet manifest` prints for a recipe: the ConfigMap's text and the RayJob."""
    path.write_text(yaml.safe_dump(dict(keys)))
    demand, place = demand_of(path, [], claim, None)
    config_map, _, job = yaml.safe_load_all(render(demand, place, ManifestOptions(image="tunefleet:0")))
    return str(config_map["data"]["recipe.yaml"]), job


def literals(container: Object) -> dict[str, str]:
    """The variables of a container, without those that come from Secrets."""
    return {one["name"]: one["value"] for one in container["env"] if "value" in one}


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with job_server(tmp_path_factory.mktemp("head"), token="t" * 32) as started:
        yield started


def ran(head: Head, folder: Path, text: str, job: Object) -> str:
    """Run a job's entry point by hand; what it printed."""
    folder.mkdir()
    (folder / "recipe.yaml").write_text(text)
    entrypoint = job["spec"]["entrypoint"]
    assert entrypoint.count(RECIPE_FOLDER) == 1
    (container,) = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    variables = literals(container) | {"HF_HUB_OFFLINE": "1"}
    environment = json.dumps({"env_vars": variables})
    ray = str(Path(sys.executable).with_name("ray"))
    submitter = [ray, "job", "submit", "--address", head.url, "--runtime-env-json", environment, "--"]
    done = subprocess.run(
        [*submitter, *shlex.split(entrypoint.replace(RECIPE_FOLDER, str(folder)))],
        env={**os.environ, **head.variables},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_run(head: Head, tmp_path: Path, claim: Path, recipe: Object) -> None:
    text, job = rendered(tmp_path / "written.yaml", recipe, "pvc://models/pods")
    printed = ran(head, tmp_path / "mounted", text, job)
    assert "step 4/4" in printed or "step 4: checkpoint saved" in printed
    run = claim / "pods" / "outputs-from_a_pod"
    assert json.loads((run / "record" / "result.json").read_text())["step"] == 4
    assert (run / "model" / "adapter_model.safetensors").is_file()


def test_a_search(head: Head, tmp_path: Path, claim: Path, recipe: Object) -> None:
    asked = {"eval_dataset": "quickstart_heldout", "eval_strategy": "steps", "eval_steps": 2}
    space = {"search": "grid", "space": {"lora_rank": {"choice": [2, 4]}}}
    text, job = rendered(
        tmp_path / "written.yaml",
        {**recipe, **asked, "output_dir": "outputs/searched_in_a_pod", "tune": space},
        "pvc://models/searches",
    )
    ran(head, tmp_path / "mounted", text, job)
    (book,) = (claim / "searches").glob("*/trials.json")
    assert [trial["state"] for trial in json.loads(book.read_text())["trials"]] == ["finished"] * 2
