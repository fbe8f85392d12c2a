"""What relative paths mean in a job whose folder Ray has shipped, and what is said where the quickstart is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tunefleet.launch.job_folder import JOB_CONFIG, is_shipped, kept_folder, lasting, refuse_left_at_home, settled
from tunefleet.recipe.problems import RecipeError

KEYS = {
    "model_name_or_path": ".quickstart/base",
    "dataset_dir": ".quickstart/data",
    "dataset": "rows",
    "output_dir": "out",
    "ray_storage_path": ".quickstart/runs",
}
SHIPPED = json.dumps({"runtime_env": {"working_dir": "gcs://_ray_pkg_0123.zip"}})


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """HOME on the cluster's head."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The job's folder, with a recipe in it."""
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(KEYS))
    return folder


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(JOB_CONFIG, SHIPPED)


def words(root: Path, *overrides: str) -> dict[str, str]:
    found = settled(root / "recipe.yaml", overrides, root).words
    return {key: json.loads(value) for key, _, value in (word.partition("=") for word in found)}


@pytest.mark.parametrize(
    ("working_dir", "answer"),
    [
        ("gcs://_ray_pkg_0123.zip", True),
        ("s3://bucket/job.zip", True),
        ("local:///app", False),
        ("/app", False),
        (None, False),
    ],
)
def test_a_folder_of_the_image_stays(working_dir: str | None, answer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {} if working_dir is None else {"working_dir": working_dir}
    monkeypatch.setenv(JOB_CONFIG, json.dumps({"runtime_env": environment}))
    assert is_shipped() is answer
    monkeypatch.delenv(JOB_CONFIG)
    assert not is_shipped()


def test_what_did_not_travel_is_found_where_runs_are_kept(root: Path, home: Path, shipped: None) -> None:
    for name in ("base", "data"):
        (home / "tunefleet" / ".quickstart" / name).mkdir(parents=True)
    found = settled(root / "recipe.yaml", [], root)
    assert words(root) == {
        "model_name_or_path": f"{home}/tunefleet/.quickstart/base",
        "dataset_dir": f"{home}/tunefleet/.quickstart/data",
        "ray_storage_path": f"{home}/tunefleet/.quickstart/runs",
    }
    assert [notice.partition(":")[0] for notice in found.notices] == list(words(root))


def test_a_storage_that_was_named_holds_the_rest(root: Path, tmp_path: Path, home: Path, shipped: None) -> None:
    for name in ("base", "data"):
        (tmp_path / "shared" / ".quickstart" / name).mkdir(parents=True)
    assert words(root, f"ray_storage_path={tmp_path / 'shared'}") == {
        "model_name_or_path": f"{tmp_path}/shared/.quickstart/base",
        "dataset_dir": f"{tmp_path}/shared/.quickstart/data",
    }


def test_what_travelled_is_taken_as_it_lies(root: Path, home: Path, shipped: None) -> None:
    for folder in (root, home / "tunefleet"):
        for name in ("base", "data"):
            (folder / ".quickstart" / name).mkdir(parents=True)
    assert words(root) == {"ray_storage_path": f"{home}/tunefleet/.quickstart/runs"}
    assert words(root, "ray_storage_path=s3://bucket/runs") == {}
    assert kept_folder("s3://bucket/runs") == home / "tunefleet"


def test_names_on_the_hub_are_left_alone(root: Path, home: Path, shipped: None) -> None:
    hub = ("model_name_or_path=org/model", "dataset_dir=ONLINE", "dataset=org/rows", "ray_storage_path=/mnt/runs")
    assert words(root, *hub) == {}


def test_a_job_without_the_quickstart_is_told_the_command(
    root: Path, tmp_path: Path, home: Path, shipped: None
) -> None:
    with pytest.raises(RecipeError) as refused:
        words(root)
    first, second = str(refused.value).splitlines()
    assert first == (
        f"model_name_or_path: .quickstart/base did not travel with the job (git ignores it) and is not in "
        f"{home}/tunefleet; make it there with `ray job submit --working-dir . -- python jobs/prepare_quickstart.py`"
    )
    assert second.startswith("dataset_dir: .quickstart/data")
    with pytest.raises(RecipeError, match=r"prepare_quickstart\.py --to /mnt/shared/\.quickstart`"):
        words(root, "ray_storage_path=/mnt/shared")


def test_a_laptop_without_the_quickstart_is_told_its_own(root: Path) -> None:
    with pytest.raises(RecipeError, match="make it with `make quickstart`"):
        words(root)
    for name in ("base", "data"):
        (root / ".quickstart" / name).mkdir(parents=True)
    assert words(root) == {}


def test_a_result_in_the_jobs_folder_is_named_where_it_stays(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    assert lasting(root / "out", "s3://b/run/model") == str(root / "out")
    monkeypatch.setenv(JOB_CONFIG, SHIPPED)
    assert lasting(root / "out", "s3://b/run/model") == "s3://b/run/model"
    assert lasting(tmp_path / "shared", "s3://b/run/model") == str(tmp_path / "shared")


def test_a_recipe_that_did_not_travel_is_named(root: Path, shipped: None) -> None:
    refuse_left_at_home(root / "recipe.yaml")
    with pytest.raises(RecipeError, match=r"private\.yaml: is not in the job's folder"):
        refuse_left_at_home(root / "private.yaml")


def test_the_jobs_script_says_it(root: Path, home: Path, repository: Path) -> None:
    done = subprocess.run(
        [sys.executable, repository / "jobs" / "train.py", "recipe.yaml"],
        cwd=root,
        env={**os.environ, JOB_CONFIG: SHIPPED},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "python jobs/prepare_quickstart.py" in done.stderr
