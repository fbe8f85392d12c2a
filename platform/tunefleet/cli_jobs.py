"""`tunefleet submit` and `tunefleet jobs`: runs as jobs of a Ray cluster's job server."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table

from tunefleet.cli_words import AsJson, Overrides, RecipePath, console, errors, print_json, print_plain
from tunefleet.commands.columns import name_column
from tunefleet.errors import Refused

if TYPE_CHECKING:
    from tunefleet.launch.jobs import Client, JobLine
    from tunefleet.recipe.sections import Recipe

jobs = typer.Typer(help="List, follow, look at and stop the jobs of a cluster.", no_args_is_help=True)

Address = Annotated[
    str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="The URL of the head's dashboard: http://HEAD:8265.")
]
PendingSeconds = Annotated[
    float, typer.Option("--pending-timeout", min=0, help="Seconds that a job which is followed may wait for its start.")
]
Job = Annotated[str, typer.Argument(metavar="JOB", help="A job's name, as `tunefleet jobs list` shows it.")]

DETACHED_CODE = 130


def submit(
    recipe: RecipePath,
    overrides: Overrides = None,
    *,
    address: Address,
    tune: Annotated[bool, typer.Option("--tune", help="The recipe has a `tune:` block: search.")] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the job and end with its exit code.")] = True,
    env: Annotated[list[str] | None, typer.Option(help="A variable of this machine that is sent along.")] = None,
    secret: Annotated[
        list[str] | None, typer.Option(help="A variable that the cluster must have itself; it is not sent.")
    ] = None,
    driver_resource: Annotated[
        list[str] | None, typer.Option(metavar="NAME=AMOUNT", help="What the job's own process takes, e.g. CPU=1.")
    ] = None,
    image_has_code: Annotated[
        bool, typer.Option("--image-has-code", help="The cluster's image holds tunefleet: send none.")
    ] = False,
    pending_seconds: PendingSeconds = 300.0,
) -> None:
    """Run a recipe as a job of a cluster, from here: code, recipe and small local data travel."""
    root = Path.cwd()
    from tunefleet.launch.parcel import parcel, refuse_outside

    refuse_outside(recipe, root)
    read = _common(recipe, overrides or [], tune)
    from tunefleet.launch.jobs import Order, connect, environment_of
    from tunefleet.launch.jobs import submit as send

    packed = parcel(read, root)
    order = Order(
        command="tune" if tune else "train",
        overrides=overrides or [],
        run_name=read.run_name,
        storage=read.ray.ray_storage_path,
        environment=environment_of(env or []),
        secrets=[_variable(name) for name in secret or []],
        driver_resources=dict(_amount(text) for text in driver_resource or []),
        brings_code=not image_has_code,
    )
    client = connect(address)
    sent = send(client, order, packed, recipe)
    print_plain(console, f"{sent.job} ({len(packed.files)} local files, {packed.size_bytes / 2**20:.1f} MiB)", "bold")
    if not wait:
        print_plain(console, f"Follow it with: tunefleet jobs logs {sent.job} --address {address}")
        return
    sys.exit(_followed(client, sent.job, address, pending_seconds))


def _common(path: Path, overrides: list[str], tune: bool) -> Recipe:
    """The recipe, or what all trials of a search have in common."""
    from tunefleet.recipe.read import read_recipe
    from tunefleet.recipe.tune import read_search

    if not tune:
        return read_recipe(path, overrides)
    search = read_search(path, overrides)
    from tunefleet.search.opening import open_space

    return open_space(search).common_recipe()


def _variable(name: str) -> str:
    if not name.isidentifier():
        raise Refused(f"--secret {name} is no name of a variable: write one such as HF_TOKEN.")
    return name


def _amount(text: str) -> tuple[str, float]:
    name, _, amount = text.partition("=")
    try:
        number = float(amount)
    except ValueError:
        number = 0.0
    if not name or not 0 < number < math.inf:
        raise Refused(f"--driver-resource {text} is no amount: write one such as CPU=1 or trial_driver=1.")
    return name, number


def _followed(client: Client, job: str, address: str, pending_seconds: float) -> int:
    from tunefleet.launch.jobs import follow

    try:
        return follow(client, job, lambda line: print_plain(console, line), pending_seconds, address)
    except KeyboardInterrupt:
        print_plain(
            errors,
            f"Detached; the job goes on. Come back with `tunefleet jobs logs {job} --address {address}`, stop it with "
            f"`tunefleet jobs stop {job} --address {address}`.",
        )
        return DETACHED_CODE


@jobs.command("list")
def list_jobs(address: Address, as_json: AsJson = False) -> None:
    """List the submitted jobs, newest first."""
    from tunefleet.launch.jobs import connect, listed

    lines = listed(connect(address))
    if as_json:
        print_json([asdict(line) for line in lines])
    elif not lines:
        print_plain(console, "No job was submitted to this cluster.")
    else:
        console.print(_table(lines))


@jobs.command()
def status(job: Job, address: Address, as_json: AsJson = False) -> None:
    """Say how a job is; the exit code is 0 whatever it is."""
    from tunefleet.launch.jobs import connect, found

    line = found(connect(address), job)
    if as_json:
        print_json(asdict(line))
        return
    console.print(_table([line]))
    if line.message:
        print_plain(console, line.message)


@jobs.command()
def logs(job: Job, address: Address, pending_seconds: PendingSeconds = 300.0) -> None:
    """Show what a job prints, from its first line to its end; the exit code is the job's."""
    from tunefleet.launch.jobs import connect, found

    client = connect(address)
    found(client, job)
    sys.exit(_followed(client, job, address, pending_seconds))


@jobs.command()
def stop(job: Job, address: Address) -> None:
    """Ask a job to stop; it saves a checkpoint if the cluster gives it the time (RAY_JOB_STOP_WAIT_TIME_S there)."""
    from tunefleet.launch.jobs import connect, found

    client = connect(address)
    line = found(client, job)
    stops = client.stop_job(job)
    if line.state == "pending":
        print_plain(
            console,
            f"{job} has not started, and Ray stops only what has: it is asked to stop as soon as it starts, and Ray "
            f"gives it up a while after it was sent (RAY_JOB_START_TIMEOUT_SECONDS of the head, 15 minutes). Send a "
            f"corrected recipe under another ray_run_name.",
        )
    elif stops:
        print_plain(console, f"{job} is asked to stop.")
    else:
        print_plain(console, f"{job} has ended already ({line.state}).")


def _table(lines: list[JobLine]) -> Table:
    job = name_column("job", (line.job for line in lines))
    table = Table(job, Column("run", overflow="fold"), "state", "started", "minutes", "exit code")
    for line in lines:
        code = "" if line.exit_code is None else str(line.exit_code)
        table.add_row(line.job, line.run, line.state, _clock(line.started), _minutes(line), code)
    return table


def _clock(time: datetime | None) -> str:
    return "" if time is None else time.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _minutes(line: JobLine) -> str:
    if line.started is None:
        return ""
    end = line.ended or datetime.now(line.started.tzinfo)
    return f"{(end - line.started).total_seconds() / 60:.1f}"
