"""Runs as jobs of a Ray cluster's job server: sent, followed, listed, stopped. Nothing here joins the cluster."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shlex
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import ray
import requests
from ray._raylet import Config  # type: ignore[attr-defined]  # compiled, and its stub leaves this out
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from ray.util.state import list_nodes
from urllib3.exceptions import MaxRetryError

import tunefleet
import tunefleet_strategies
from tunefleet.errors import Refused, RunFailed, first_line
from tunefleet.launch.off_this_machine import RECIPE_FILE
from tunefleet.launch.parcel import Parcel
from tunefleet.secret_names import is_secret, url_with_user

Client = JobSubmissionClient
"""The line to a job server."""
RUN, STORAGE, DRIVER = "tunefleet_run", "tunefleet_storage", "tunefleet_driver"
"""What a job's metadata says of its run, and of what its own process asks for (JSON)."""
_OVERRIDING = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Ray takes these before the address that it is given."""
_TALKATIVE = ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")
"""Loggers that tell of every package and connection; the two below `ray` have a level of their own."""
_POLL_SECONDS = 0.5
_ANSWER_SECONDS = 10.0
_READY_SECONDS = 60.0
_UNDER_WAY = (JobStatus.PENDING, JobStatus.RUNNING)
STOPPED_CODE = 143


@dataclass(frozen=True)
class Order:
    """A job to be."""

    command: str
    """train or tune."""
    overrides: Sequence[str]
    run_name: str
    storage: str
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that travel, with their values."""
    secrets: Sequence[str] = ()
    """Variables that the cluster itself must have; no value of theirs travels."""
    driver_resources: Mapping[str, float] = field(default_factory=dict)
    """What the job's own process takes; nothing: it sits on the head."""
    brings_code: bool = True
    """Whether this very code travels; else the cluster's image has it."""


@dataclass(frozen=True)
class Sent:
    """A job that the server has taken."""

    job: str
    entrypoint: str


def connect(address: str) -> Client:
    """Open the job server of a cluster.

    Raises:
        Refused: no Ray dashboard answers there, it wants another token, or its Ray is another.
    """
    if url_with_user(address) is not None:  # not repeated: it may hold a password
        raise Refused(
            "--address has a user in it, and Ray's dashboard knows none: write http://HEAD:8265, and put a token into "
            "RAY_AUTH_TOKEN."
        )
    if not _is_url(address):
        raise Refused(
            f"--address {address} is no URL of a dashboard: write one such as http://HEAD:8265 (a host with port 6379 "
            f"is for `tunefleet train --address`)."
        )
    for name in _OVERRIDING:
        os.environ.pop(name, None)
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    _choose_authentication()
    try:
        told = requests.get(f"{address.rstrip('/')}/api/version", timeout=_ANSWER_SECONDS)
        version = None if told.status_code in (401, 403) else str(told.json()["ray_version"])
    except requests.exceptions.Timeout as error:
        raise Refused(
            f"No answer came from {address} for {_ANSWER_SECONDS:g} s: see that it is the head's dashboard (port 8265) "
            f"and that it is reached from here, and try again."
        ) from error
    except requests.exceptions.ConnectionError as error:
        if not isinstance(error.args[0], MaxRetryError) or isinstance(error, requests.exceptions.SSLError):
            raise Refused(_about_no_dashboard(address)) from error  # somebody answers, in another language
        raise Refused(
            f"Nothing answers at {address}: give the address of the head's dashboard (port 8265), and see that it is "
            f"reached from here (`kubectl port-forward`, a tunnel)."
        ) from error
    except (requests.exceptions.RequestException, ValueError, KeyError, TypeError) as error:
        raise Refused(_about_no_dashboard(address)) from error
    if version is not None and version.split(".")[:2] != ray.__version__.split(".")[:2]:
        raise Refused(
            f"The cluster at {address} runs Ray {version} and this machine {ray.__version__}: install ray=={version} "
            f"here, or use an image with Ray {ray.__version__} there."
        )
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise Refused(_about_the_token(address)) from error
    except (RuntimeError, ConnectionError, requests.exceptions.RequestException) as error:
        raise Refused(f"The job server at {address} does not answer as it should ({first_line(error)}).") from error


def _is_url(address: str) -> bool:
    try:
        parts = urlsplit(address)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # as of a port that is no number
        return False


def _about_no_dashboard(address: str) -> str:
    return f"What answers at {address} is no Ray dashboard: give the address of the head's, whose port is 8265."


def _choose_authentication() -> None:
    """Send a token where this machine has one; Ray's own choice depends on what was started here before."""
    if "RAY_AUTH_MODE" in os.environ:
        return
    has_token = (
        bool(os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"))
        or (Path.home() / ".ray" / "auth_token").is_file()
    )
    os.environ["RAY_AUTH_MODE"] = "token" if has_token else "disabled"
    Config.initialize("")  # Ray has read the environment when it was imported


def _about_the_token(address: str) -> str:
    if os.environ["RAY_AUTH_MODE"] == "token":
        return (
            f"The cluster at {address} does not take this machine's token: put the cluster's into RAY_AUTH_TOKEN, or "
            f"its file's path into RAY_AUTH_TOKEN_PATH."
        )
    return (
        f"The cluster at {address} wants a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH "
        f"(on Kubernetes the token is in the Secret of the RayCluster)."
    )


def environment_of(names: Sequence[str]) -> dict[str, str]:
    """The named variables of this machine, to be sent along.

    Raises:
        Refused: one is not set, or is named like a secret, which the dashboard would show.
    """
    found: dict[str, str] = {}
    for name in names:
        if is_secret(name):
            raise Refused(
                f"--env {name} would send a secret, and Ray's dashboard shows what is sent: put it into the "
                f"environment of the cluster's machines, and write --secret {name}."
            )
        if name not in os.environ:
            raise Refused(f"--env {name}: this machine has no such variable; export it, or leave the option out.")
        found[name] = os.environ[name]
    return found


def submit(client: Client, order: Order, parcel: Parcel, recipe: Path) -> Sent:
    """Send a job.

    Raises:
        Refused: a job under way has the same run, or the server does not take it.
    """
    jobs = client.list_jobs()
    _refuse_clash(jobs, order)
    taken = {job.submission_id for job in jobs}
    name = next(name for number in range(1, 10**6) if (name := f"{order.run_name}-{number}") not in taken)
    entrypoint = entrypoint_of(order)
    with tempfile.TemporaryDirectory(prefix="tunefleet-") as scratch:
        folder = Path(scratch) / "job"
        folder.mkdir()
        parcel.pack(recipe, folder)
        environment: dict[str, Any] = {"working_dir": str(folder), "env_vars": dict(order.environment)}
        if order.brings_code:
            environment["py_modules"] = [str(Path(one.__path__[0])) for one in (tunefleet, tunefleet_strategies)]
        job = _taken(client, order, name, entrypoint, environment)
    return Sent(job, entrypoint)


def _taken(client: Client, order: Order, name: str, entrypoint: str, environment: dict[str, Any]) -> str:
    """Hand a job to the server; one that has just started is not ready to take any, and is asked again."""
    others = {key: amount for key, amount in order.driver_resources.items() if key not in ("CPU", "GPU")}
    said = {RUN: order.run_name, STORAGE: order.storage, DRIVER: json.dumps(dict(order.driver_resources))}
    until = time.monotonic() + _READY_SECONDS
    while True:
        try:
            return client.submit_job(
                entrypoint=entrypoint,
                runtime_env=environment,
                submission_id=name,
                metadata=dict(said),
                entrypoint_num_cpus=order.driver_resources.get("CPU"),
                entrypoint_num_gpus=order.driver_resources.get("GPU"),
                entrypoint_resources=others,
            )
        except (RuntimeError, ValueError) as error:
            if "No available agent" not in str(error) or time.monotonic() > until:
                raise Refused(f"The job server does not take the job ({first_line(error)}).") from error
        time.sleep(_POLL_SECONDS)


def entrypoint_of(order: Order) -> str:
    """The shell command that the job is: first it sees that the secrets are there, then it is the command."""
    checks = [
        f'test -n "${name}" || {{ echo "The cluster has no variable {name}: give it to its machines by a Secret." >&2; '
        f"exit 2; }}; "
        for name in order.secrets
    ]
    command = shlex.join(["python", "-m", "tunefleet", order.command, RECIPE_FILE, *order.overrides])
    return f"{''.join(checks)}exec {command}"


def _refuse_clash(jobs: Sequence[JobDetails], order: Order) -> None:
    for job in jobs:
        said = job.metadata or {}
        same = said.get(RUN) == order.run_name and said.get(STORAGE) == order.storage
        if same and job.status in _UNDER_WAY:
            pending = ", which has not started" if job.status == JobStatus.PENDING else ""
            raise Refused(
                f"The run {order.run_name} is under way already, as job {job.submission_id}{pending}: follow it with "
                f"`tunefleet jobs logs {job.submission_id}`, or choose another ray_run_name."
            )


def follow(client: Client, job: str, show: Callable[[str], None], pending_seconds: float, address: str) -> int:
    """Show what a job prints until it ends; its exit code.

    Raises:
        RunFailed: it did not start in time, or the server is gone.
    """
    try:
        _await_start(client, job, pending_seconds, address)
        tail = _Tail(client, job, show)
        while (info := client.get_job_info(job)).status in _UNDER_WAY:
            tail.follow()  # it breaks off where a connection does
            time.sleep(_POLL_SECONDS)
        tail.show_rest()
        return exit_code(info)
    except (requests.exceptions.RequestException, ConnectionError) as error:
        raise RunFailed(
            f"The job server is gone ({first_line(error)}); the job {job} may go on: look again with `tunefleet jobs "
            f"status {job} --address {address}`."
        ) from error


def _await_start(client: Client, job: str, pending_seconds: float, address: str) -> None:
    until = time.monotonic() + pending_seconds
    while (info := client.get_job_info(job)).status == JobStatus.PENDING:
        if time.monotonic() > until:
            raise RunFailed(_why_pending(info, job, pending_seconds, address))
        time.sleep(_POLL_SECONDS)


def _why_pending(info: JobDetails, job: str, seconds: float, address: str) -> str:
    """What a job that does not start asks for, and what the cluster has."""
    wanted: dict[str, float] = json.loads((info.metadata or {}).get(DRIVER, "{}"))
    offers = [node.resources_total or {} for node in list_nodes(address=address) if node.state == "ALIVE"]
    missing = {
        name: amount for name, amount in wanted.items() if all(offer.get(name, 0.0) < amount for offer in offers)
    }
    has = "; ".join(_amounts({k: v for k, v in offer.items() if _counts(k)}) or "nothing" for offer in offers)
    what = f"its process asks for {_amounts(wanted)}" if wanted else "it asks for nothing but a place on the head"
    lack = (
        f"no node has {_amounts(missing)}: give a node such a resource, or ask for another --driver-resource"
        if missing
        else "so it waits for them to be free, or for its environment to be set up"
    )
    return (
        f"The job {job} has not started for {seconds:.0f} s: {what}; the {len(offers)} node(s) have {has}; {lack}. It "
        f"still waits; take it back with `tunefleet jobs stop {job} --address {address}`."
    )


def _counts(name: str) -> bool:
    return not name.startswith("node:") and name not in ("memory", "object_store_memory")


def _amounts(amounts: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in amounts.items())


class _Tail:
    """What a job prints, each line shown once, however often the connection breaks."""

    def __init__(self, client: Client, job: str, show: Callable[[str], None]) -> None:
        self._client, self._job, self._show = client, job, show
        self._shown = 0
        self._error: Exception | None = None

    def follow(self) -> None:
        """Show lines until the connection ends. Off the main thread, where asyncio would take Ctrl-C for itself."""
        thread = threading.Thread(target=self._run, daemon=True, name="logs")
        thread.start()
        while thread.is_alive():
            thread.join(_POLL_SECONDS)
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            asyncio.run(self._lines())
        except Exception as error:  # handed over to the main thread, which raises it
            self._error = error

    def show_rest(self) -> None:
        """Show what is left of a job that has ended: at once, where following would first wait for more to come."""
        *lines, rest = self._client.get_job_logs(self._job).split("\n")
        for number, line in enumerate([*lines, rest] if rest else lines, 1):
            self._tell(number, line)

    async def _lines(self) -> None:
        number, rest = 0, ""
        async for piece in self._client.tail_job_logs(self._job):
            *lines, rest = (rest + piece).split("\n")
            for line in lines:
                number += 1
                self._tell(number, line)
        if rest:
            self._tell(number + 1, rest)

    def _tell(self, number: int, line: str) -> None:
        if number > self._shown:
            self._shown = number
            self._show(line)


def exit_code(info: JobDetails) -> int:
    """The code of a job that has ended: its command's, 143 where it was stopped, 1 where it never ran."""
    if info.status == JobStatus.SUCCEEDED:
        return 0
    if info.status == JobStatus.STOPPED:
        return STOPPED_CODE
    return info.driver_exit_code or 1


@dataclass(frozen=True)
class JobLine:
    """A job as it is listed."""

    job: str
    run: str
    state: str
    started: datetime | None
    ended: datetime | None
    exit_code: int | None
    message: str | None


def listed(client: Client) -> list[JobLine]:
    """The jobs that were submitted, newest first."""
    jobs = [job for job in client.list_jobs() if job.submission_id is not None]
    return [line_of(job) for job in sorted(jobs, key=lambda job: job.start_time or 0, reverse=True)]


def found(client: Client, job: str) -> JobLine:
    """One job.

    Raises:
        Refused: there is none of this name.
    """
    unknown = Refused(f"The cluster knows no job {job or repr(job)}: `tunefleet jobs list` shows those that it has.")
    if not job or "/" in job:  # else the server would be asked for something else
        raise unknown
    try:
        return line_of(client.get_job_info(job))
    except RuntimeError as error:
        raise unknown from error


def line_of(info: JobDetails) -> JobLine:
    """What of a job is shown."""
    return JobLine(
        job=cast(str, info.submission_id),
        run=(info.metadata or {}).get(RUN, ""),
        state=str(info.status.value).lower(),
        started=_time(info.start_time),
        ended=_time(info.end_time),
        exit_code=None if info.status in _UNDER_WAY else exit_code(info),
        message=info.message,
    )


def _time(milliseconds: int | None) -> datetime | None:
    return datetime.fromtimestamp(milliseconds / 1000, UTC) if milliseconds else None
