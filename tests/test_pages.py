"""The pages that a stranger follows: their commands are taken, their recipes are read, their links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml
from typer.core import TyperGroup

from tunefleet import cli
from tunefleet.recipe.read import read_flat

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
GUIDES = [ROOT / "docs" / f"{name}.md" for name in ("laptop", "ray-cluster", "kuberay", "kueue", "autoscaled-search")]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """The words of each command, without what a pipe or `>` does with its output."""
    lines = [line for block in blocks(page, "sh") for line in block.splitlines() if line.strip()]
    return [shlex.split(re.split(r" [|>&] ?", line)[0], comments=True) for line in lines]


def parse(words: list[str]) -> None:
    """Let the program read a command line, without doing what it says; what it does not take is an exception."""
    command, rest = typer.main.get_command(cli.app), words[1:]
    while isinstance(command, TyperGroup):
        command, rest = command.commands[rest[0]], rest[1:]
    command.make_context(command.name or "", rest)


@pytest.mark.parametrize("page", [ROOT / "README.md", *GUIDES], ids=lambda page: page.stem)
def test_every_command_is_one(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265")
    ours = [words for words in commands(page) if words[:1] == ["tunefleet"]]
    for words in ours:
        parse(words)
    assert ours
    with pytest.raises(Exception, match="No such option: --not-there"):
        parse([*ours[0], "--not-there"])


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_every_file_of_a_job_is_there(page: Path) -> None:
    for words in commands(page):
        if words[:3] != ["ray", "job", "submit"]:
            continue
        given = [word for word in words if re.fullmatch(r"(jobs|k8s)/\S+", word)]
        assert given or words[-1] == "..."
        assert [word for word in given if not (ROOT / word).exists()] == []


def test_the_recipe_of_the_laptop_is_read() -> None:
    (text,) = blocks(ROOT / "docs" / "laptop.md", "yaml")
    assert read_flat(yaml.safe_load(text)).notices == ()


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


@pytest.mark.parametrize("guide", GUIDES, ids=lambda page: page.stem)
def test_the_readme_leads_to_each_guide(guide: Path) -> None:
    assert f"(docs/{guide.name})" in (ROOT / "README.md").read_text()
