"""The pages on Kubernetes, and the README: what they tell a reader to do is there and is taken."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from tunefleet import cli
from tunefleet.kube.check import check_text

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "docs" / "kuberay.md", ROOT / "docs" / "kueue.md", ROOT / "README.md"]
PAGES += [ROOT / "docs" / "autoscaled-search.md"]


def commands() -> list[list[str]]:
    """The words of each command in the shell blocks of the pages."""
    blocks = [block for page in PAGES for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)]
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines() if line.strip()]


def test_every_folder_and_file_that_is_applied_is_there() -> None:
    named = [words[words.index(flag) + 1] for words in commands() for flag in ("-k", "-f") if flag in words]
    ours = [name for name in named if name.startswith("k8s/")]
    assert len(ours) >= 5
    assert [name for name in ours if not (ROOT / name).exists()] == []
    folders = {words[words.index("--working-dir") + 1] for words in commands() if "--working-dir" in words} - {"."}
    assert all((ROOT / folder / "recipe.yaml").is_file() for folder in folders)


def test_every_manifest_command_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rendered = 0
    for words in commands():
        if words[:2] != ["tunefleet", "manifest"] or "--check" in words:
            continue
        end = next((index for index, word in enumerate(words) if word in ("|", ">")), len(words))
        train = str(ROOT / "k8s" / "base" / "train" / "recipe.yaml")  # where the page says recipe.yaml
        given = [train if word.endswith("recipe.yaml") else word for word in words[:end]]
        monkeypatch.setattr(sys, "argv", given)
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capfd.readouterr()
        assert caught.value.code in (0, None), err
        assert check_text(out, "m").findings == ()
        rendered += 1
    assert rendered == 5


def test_the_values_that_the_page_names_are_those_of_the_manifests() -> None:
    text = PAGES[0].read_text()
    cluster = yaml.safe_load((ROOT / "k8s" / "base" / "cluster" / "cluster.yaml").read_text())["spec"]
    pod = cluster["headGroupSpec"]["template"]["spec"]
    assert f"killed after {pod['terminationGracePeriodSeconds']} s" in text
    assert f"written against KubeRay 1.7.0 and Ray {cluster['rayVersion']}" in text.replace("\n", " ")
