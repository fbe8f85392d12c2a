"""The repository as a whole: its layout, its packages, its files."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest


def test_the_standard_library_keeps_its_platform_module(repository: Path) -> None:
    code = "import sys; sys.path.insert(0, ''); import platform, uuid; print(platform.system())"
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True)
    assert done.stdout.strip()
    assert not (repository / "platform" / "__init__.py").exists()
    assert not (repository / "platform.py").exists()


def test_tests_are_no_packages(repository: Path) -> None:
    assert list((repository / "tests").rglob("__init__.py")) == []


@pytest.mark.parametrize("package", ["platform/tunefleet", "strategies/tunefleet_strategies"])
def test_every_folder_of_code_is_a_package(repository: Path, package: str) -> None:
    folders = {file.parent for file in (repository / package).rglob("*.py")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def test_constraints_are_exact_and_name_no_place(repository: Path) -> None:
    lines = (repository / "constraints.txt").read_text().split()
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in lines)
    pinned = {re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower() for line in lines}
    assert declared(repository) - {"tunefleet"} <= pinned  # an extra may ask for other extras
    assert "torch==2.13.0" in lines


def declared(repository: Path) -> set[str]:
    """The distributions that pyproject.toml asks for, extras included."""
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    return {re.split(r"[\[><=! ]", line)[0].lower() for line in wanted}


@pytest.fixture(scope="session")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=repository, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_the_two_packages_and_nothing_else(repository: Path, wheel: Path) -> None:
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    roots = {"tunefleet": repository / "platform", "tunefleet_strategies": repository / "strategies"}
    assert {name.partition("/")[0] for name in inside} == set(roots)
    for package, root in roots.items():
        sources = {str(path.relative_to(root)) for path in (root / package).rglob("*.py")}
        assert sources <= inside
        assert f"{package}/py.typed" in inside


def test_the_wheel_carries_version_command_and_license(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    names = {name.partition(".dist-info/")[2]: name for name in archive.namelist() if ".dist-info/" in name}
    assert "Version: 0.1.0" in archive.read(names["METADATA"]).decode()
    assert "tunefleet = tunefleet.__main__:command" in archive.read(names["entry_points.txt"]).decode()
    assert "Apache License" in archive.read(names["licenses/LICENSE"]).decode()


def commands_in(page: Path) -> list[list[str]]:
    """The words of each command in a page's shell blocks."""
    blocks = re.findall(r"```(?:sh|bash|console)\n(.*?)```", page.read_text(), re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line and not line.startswith("#")]


def test_every_make_target_of_the_readme_is_there(repository: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (repository / "Makefile").read_text(), re.MULTILINE))
    named = {words[1] for words in commands_in(repository / "README.md") if words[0] == "make"}
    assert {"quickstart", "test"} <= named <= targets


def test_every_command_of_the_readme_is_there(repository: Path) -> None:
    from tunefleet.cli import app

    known = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    known |= {group.name for group in app.registered_groups if group.name}
    named = {words[1] for words in commands_in(repository / "README.md") if words[0] == "tunefleet"}
    assert {"train", "plan"} <= named <= known


def test_every_file_that_the_readme_names_is_there(repository: Path) -> None:
    text = (repository / "README.md").read_text()
    named = set(re.findall(r"`((?:jobs|docs|platform|strategies|benchmarks)/[\w./-]*)`", text))
    named |= set(re.findall(r"\]\(((?!http)[\w./-]+)\)", text))
    assert named
    assert [name for name in sorted(named) if not (repository / name).exists()] == []


def test_every_make_target_installs_first(repository: Path) -> None:
    makefile = (repository / "Makefile").read_text()
    for target in ("quickstart", "test", "test-slow", "check", "bench"):
        assert re.search(rf"^{target}: \$\(INSTALLED\)", makefile, re.MULTILINE), target


def test_gate_runs_check_and_test(repository: Path) -> None:
    gate = repository / ".ci" / "run"
    assert gate.stat().st_mode & 0o111
    assert re.findall(r"^make .*$", gate.read_text(), re.MULTILINE) == ["make check", "make test"]
