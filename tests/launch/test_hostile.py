"""Hostile and clumsy inputs of `tunefleet submit`: one clear sentence each, exit code 2, and nothing is sent.

The clash with a running job is in test_jobs.py, where one runs.
"""

from __future__ import annotations

import json
import socketserver
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import ray
import yaml

from tunefleet import cli

SECRET = "hunter2"


class Town(BaseHTTPRequestHandler):
    """Services that a wrong address may lead to: a shop, another API, a cluster of long ago, one that wants a token."""

    def do_GET(self) -> None:
        place = self.path.split("/")[1]
        content = {
            "shop": "<html>Welcome</html>",
            "list": '["a", "b"]',
            "tracker": '{"version": "4"}',
            "old": '{"version": "4", "ray_version": "2.9.3", "ray_commit": "x"}',
            "guarded": "Unauthorized: Missing authentication token",
        }[place]
        self.send_response(401 if place == "guarded" else 200)
        self.end_headers()
        self.wfile.write(content.encode())

    def log_message(self, format: str, *args: object) -> None:
        return


class Redis(socketserver.BaseRequestHandler):
    """A service that speaks no HTTP, as Ray's own port 6379 does not."""

    def handle(self) -> None:
        self.request.recv(1024)
        self.request.sendall(b"-ERR unknown command\r\n")


@pytest.fixture(scope="module")
def town() -> Iterator[dict[str, str]]:
    """The address of each service, by its name."""
    with HTTPServer(("127.0.0.1", 0), Town) as web, socketserver.TCPServer(("127.0.0.1", 0), Redis) as other:
        for server in (web, other):
            threading.Thread(target=server.serve_forever, daemon=True).start()
        named = {name: f"http://127.0.0.1:{web.server_port}/{name}" for name in ("shop", "list", "tracker", "old")}
        named["guarded"] = f"http://127.0.0.1:{web.server_port}/guarded"
        yield named | {"redis": f"http://127.0.0.1:{other.server_address[1]}", "nobody": "http://127.0.0.1:9"}
        web.shutdown()
        other.shutdown()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the command is given in; beside it lies what must not travel."""
    folder = tmp_path / "home"
    (folder / "data").mkdir(parents=True)
    (folder / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    (tmp_path / "private.jsonl").write_text('{"instruction": "c", "output": "d"}\n')
    keys = {
        "model_name_or_path": "org/model",
        "dataset": "rows.jsonl",
        "output_dir": "out",
        "ray_storage_path": "/mnt/runs",
    }
    for path in (folder / "recipe.yaml", tmp_path / "recipe.yaml"):
        path.write_text(yaml.safe_dump(keys))
    monkeypatch.chdir(folder)
    return folder


def described(entry: dict[str, object]) -> Callable[[Path], None]:
    """A data set `rows` that `dataset_info.json` describes so."""

    def write(home: Path) -> None:
        (home / "data" / "dataset_info.json").write_text(json.dumps({"rows": entry}))

    return write


def link_out(home: Path) -> None:
    (home / "linked.jsonl").symlink_to(home.parent / "private.jsonl")


def link_recipe(home: Path) -> None:
    (home / "linked.yaml").symlink_to(home.parent / "recipe.yaml")


def scripted(home: Path) -> None:
    (home / "scripted").mkdir()
    (home / "scripted" / "scripted.py").write_text("raise SystemExit('this ran')")


def two_gigabytes(home: Path) -> None:
    with (home / "rows.jsonl").open("r+b") as file:
        file.truncate(2 * 2**30)  # a sparse file: no disk is filled


def with_secret(home: Path) -> None:
    kwargs = {"runtime_env": {"env_vars": {"HF_TOKEN": SECRET}}}
    recipe = home / "recipe.yaml"
    recipe.write_text(recipe.read_text() + yaml.safe_dump({"ray_init_kwargs": kwargs}))


@dataclass(frozen=True)
class Blow:
    """What is given, and what is said to it."""

    name: str
    said: str
    words: tuple[str, ...] = ()
    """Behind `tunefleet submit recipe.yaml`."""
    before: Callable[[Path], None] | None = None
    to: str = "nobody"
    recipe: str = "recipe.yaml"
    mode: str = "disabled"
    """Of authentication: whether this machine has a token."""


BLOWS = [
    Blow("recipe elsewhere", "../recipe.yaml lies outside of", recipe="../recipe.yaml"),
    Blow("recipe linked from elsewhere", "linked.yaml lies outside of", recipe="linked.yaml", before=link_recipe),
    Blow("path with dots", "dataset: ../private.jsonl leads out of", ("dataset=../private.jsonl",)),
    Blow("path through a link", "dataset: linked.jsonl leads out of", ("dataset=linked.jsonl",), link_out),
    Blow(
        "path in a description",
        "`file_name: ../../private.jsonl`",
        ("dataset=rows",),
        described({"file_name": "../../private.jsonl"}),
    ),
    Blow("run name with dots", "ray_run_name: '../../etc'", ("ray_run_name=../../etc",)),
    Blow("loading script", "loading scripts are not run", ("dataset=rows",), described({"script_url": "evil/rows.py"})),
    Blow(
        "trust asked for",
        "unknown key `trust_remote_code`",
        ("dataset=rows",),
        described({"hf_hub_url": "evil/rows", "trust_remote_code": True}),
    ),
    Blow("script in a folder", "`scripted.py` is no data file", ("dataset=scripted",), scripted),
    Blow(
        "two gigabytes", "2048 MiB of local files would travel with the job, the largest rows.jsonl", (), two_gigabytes
    ),
    Blow("no job server", "Nothing answers at http://127.0.0.1:9:"),
    Blow("no URL", "--address 127.0.0.1:6379 is no URL of a dashboard", to="127.0.0.1:6379"),
    Blow("Ray client's URL", "--address ray://127.0.0.1:10001 is no URL", to="ray://127.0.0.1:10001"),
    Blow("a user", "--address has a user in it, and Ray's dashboard knows none", to="http://me:hunter2@head:8265"),
    Blow("no host", "--address http:// is no URL of a dashboard", to="http://"),
    Blow("no port", "--address http://head:82650 is no URL of a dashboard", to="http://head:82650"),
    Blow("no token", "wants a token: set RAY_AUTH_MODE=token", to="guarded"),
    Blow("wrong token", "does not take this machine's token", to="guarded", mode="token"),
    Blow("a shop", "is no Ray dashboard: give the address of the head's", to="shop"),
    Blow("a list", "is no Ray dashboard: give the address of the head's", to="list"),
    Blow("another API", "is no Ray dashboard: give the address of the head's", to="tracker"),
    Blow("no HTTP", "is no Ray dashboard: give the address of the head's", to="redis"),
    Blow("another version", f"runs Ray 2.9.3 and this machine {ray.__version__}: install ray==2.9.3 here", to="old"),
    Blow("secret for the workers", "sets HF_TOKEN, a secret, which does not belong into a recipe", (), with_secret),
    Blow("secret in a URI", "carries credentials", (f"ray_storage_path=s3://key:{SECRET}@bucket/runs",)),
    Blow(
        "secret in a URL of the workers",
        "ray_init_kwargs: has a URL with a user or a password in it (http://...@), and a recipe is copied; leave out",
        (f'ray_init_kwargs={{"runtime_env": {{"env_vars": {{"MLFLOW_TRACKING_URI": "http://u:{SECRET}@h"}}}}}}',),
    ),
    Blow("secret as a key", "secrets do not belong into a recipe", (f"hub_token={SECRET}",)),
    Blow("secret sent along", "--env HF_TOKEN would send a secret", ("--env", "HF_TOKEN")),
    Blow("cluster in the recipe", "ray_address: head:6379 names a cluster", ("ray_address=head:6379",)),
]


@pytest.mark.parametrize("blow", BLOWS, ids=lambda blow: blow.name.replace(" ", "-"))
def test_one_sentence(
    blow: Blow,
    home: Path,
    town: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if blow.before is not None:
        blow.before(home)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("RAY_AUTH_MODE", blow.mode)
    address = town.get(blow.to, blow.to)
    monkeypatch.setattr(sys, "argv", ["tunefleet", "submit", blow.recipe, *blow.words, "--address", address])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    out, err = capfd.readouterr()
    assert caught.value.code == 2
    assert blow.said in err
    assert (out, err.count("\n")) == ("", 1)
    assert err.endswith(".\n") or err.count(";") == 1  # a sentence, or a recipe's problem with its mend
    assert SECRET not in err
