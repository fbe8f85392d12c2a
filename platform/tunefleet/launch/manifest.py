"""A recipe as Kubernetes objects: the recipe in a ConfigMap, a RayJob for exactly what it asks for, a NetworkPolicy.

The job has a cluster of its own, which is gone after it. A job that fails is begun again on a new cluster
(`backoffLimit`) and goes on from the newest checkpoint in storage, since the same command continues an unfinished run.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

import tunefleet
from tunefleet.errors import Refused
from tunefleet.kube.documents import plain, write_documents
from tunefleet.kube.fields import (
    Image,
    LabelName,
    LabelValue,
    ObjectMeta,
    ObjectName,
    Piece,
    Quantity,
    Selector,
    is_dns_1035,
    quantity,
)
from tunefleet.kube.objects import (
    LARGEST_CONFIG_MAP_BYTES,
    ConfigMap,
    Egress,
    Ingress,
    NetworkPolicy,
    NetworkPolicySpec,
    Peer,
    PeerPort,
)
from tunefleet.kube.pods import Resources
from tunefleet.kube.ray import (
    LONGEST_JOB_NAME,
    QUEUE_LABEL,
    AuthOptions,
    AutoscalerOptions,
    ClusterSpec,
    DeletionCondition,
    DeletionRule,
    DeletionStrategy,
    HeadGroup,
    JobMeta,
    JobSpec,
    RayJob,
    SubmitterConfig,
    WorkerGroup,
)
from tunefleet.launch.demand import Demand, GroupDemand
from tunefleet.launch.off_this_machine import RECIPE_FILE, STORAGE, Storage
from tunefleet.launch.pods import (
    GPU,
    RECIPE_FOLDER,
    PodSettings,
    SecretVariable,
    container_security,
    head_pod,
    submitter_pod,
    worker_pod,
)
from tunefleet.shapes import TRIAL_DRIVER

RETRIES = 3
KEPT_SECONDS = 3600
"""How long what failed, or has been queued, is kept to be looked at."""
_DONE_SECONDS = 60
"""How long a cluster that succeeded stays, so that the last lines of the log are read."""
_IDLE_SECONDS = 120
"""After how long without work a pod goes: above the start of a trial, or pods would go between two trials."""
_PRIORITY = 10
"""Of pods for several workers, where both kinds would be filled: those for one worker stay free for such trials."""
_GIB = 2**30
_HEAD_GIB, _DRIVER_GIB = 6.0, 1.5
"""Memory of the head, and of each driver of a trial with Ray's own actors for it (seen: 1.2 to 1.3 GB)."""
_LEAST_GIB, _MOST_GIB = 1, 100 * 1024
"""Of `--memory`: a pod of less cannot start Ray and torch, and no machine has so much."""
_SECRET = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=([a-z0-9](?:[-a-z0-9.]*[a-z0-9])?):([-._a-zA-Z0-9]+)")
_PODS_OWN = frozenset({"PATH", "HOME", "PYTHONPATH", "LD_LIBRARY_PATH", "PYTHONUNBUFFERED", "HF_HOME"})
"""Variables of the image and the pods, which no Secret may replace; besides, all that begin with RAY_ are Ray's."""
_KINDS: Mapping[str, tuple[TypeAdapter[str], ...]] = {
    "--image": (TypeAdapter(Image),),
    "--namespace": (TypeAdapter(LabelName),),
    "--queue": (TypeAdapter(ObjectName), TypeAdapter(LabelValue)),
    "--service-account": (TypeAdapter(ObjectName),),
}


@dataclass(frozen=True)
class ManifestOptions:
    """What a recipe does not say about the cluster that it runs on."""

    image: str
    namespace: str | None = None
    queue: str | None = None
    """A LocalQueue of Kueue, which lets the job start when its quota has room."""
    name: str | None = None
    memory: str | None = None
    """Of a worker's pod; None = 32Gi for each GPU, or 4Gi for each CPU."""
    service_account: str | None = None
    secrets: tuple[SecretVariable, ...] = ()


def default_image() -> str:
    """What `k8s/Dockerfile` is built as."""
    return f"tunefleet:{tunefleet.__version__}"


def secret_variable(text: str) -> SecretVariable:
    """A variable from `NAME=SECRET:KEY`.

    Raises:
        Refused: it is written otherwise, or the pods have the variable themselves.
    """
    found = _SECRET.fullmatch(text)
    if found is None:
        # What was written may be the secret itself, so it is not repeated.
        raise Refused(
            "--secret takes NAME=SECRET:KEY, such as HF_TOKEN=hub:token: the name of a Secret, not its value."
        )
    variable = SecretVariable(*found.groups())
    if variable.name in _PODS_OWN or variable.name.startswith("RAY_"):
        raise Refused(
            f"--secret {variable.name}=...: every pod has {variable.name} of its own, or is given it by Ray: give the "
            "variable another name."
        )
    return variable


def job_name(run_name: str) -> str:
    """The name of a RayJob from that of its run; two long names that begin alike stay apart."""
    name = re.sub(r"[^a-z0-9]+", "-", run_name.lower()).strip("-")
    if not name or not name[0].isalpha():
        name = f"run-{name}".strip("-")
    if name == run_name and len(name) <= LONGEST_JOB_NAME:
        return name
    if len(name) <= LONGEST_JOB_NAME and re.fullmatch(r"[a-z0-9._/-]+", run_name):
        return name
    digest = hashlib.sha256(run_name.encode()).hexdigest()[:6]
    return f"{name[: LONGEST_JOB_NAME - 7].rstrip('-')}-{digest}"


def manifest(demand: Demand, storage: Storage, options: ManifestOptions) -> list[Piece]:
    """The objects of a job.

    Raises:
        Refused: a name or an amount of the options is none.
    """
    _refuse_wrong(options)
    try:
        pieces = _pieces(demand, storage, options)
        # Whatever was changed in a copy is looked at again, as a file would be.
        return [type(piece).model_validate(plain(piece)) for piece in pieces]
    except ValidationError as error:
        raise Refused(
            f"The manifest would not be right, {_first(error)}: correct the option that it comes from."
        ) from error


def _refuse_wrong(options: ManifestOptions) -> None:
    """See that each option is what its field takes.

    Raises:
        Refused: one is not.
    """
    written = {
        "--image": options.image,
        "--namespace": options.namespace,
        "--queue": options.queue,
        "--service-account": options.service_account,
    }
    for option, value in written.items():
        try:
            if value is not None:
                for kind in _KINDS[option]:
                    kind.validate_python(value)
        except ValidationError as error:
            raise Refused(f"{option}: {_first(error)}.") from error
    names = [one.name for one in options.secrets]
    twice = next((name for index, name in enumerate(names) if name in names[:index]), None)
    if twice is not None:
        raise Refused(f"--secret names {twice} twice: keep one of them.")
    if options.memory is not None:
        _refuse_memory(options.memory)


def _refuse_memory(written: str) -> None:
    try:
        amount = quantity(written)
    except ValueError as error:
        raise Refused(f"--memory: {error}.") from error
    if not _LEAST_GIB * _GIB <= amount < _MOST_GIB * _GIB:
        raise Refused(f"--memory {written} is no memory of a pod: write one from 1Gi to below 100Ti, such as 64Gi.")


def _first(error: ValidationError) -> str:
    return error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")


def _pieces(demand: Demand, storage: Storage, options: ManifestOptions) -> list[Piece]:
    name = job_name(demand.run_name) if options.name is None else options.name
    if not is_dns_1035(name, LONGEST_JOB_NAME):
        raise Refused(
            f"--name {name or repr(name)} is no name of a RayJob: begin with a small letter, then small letters, "
            f"digits and dashes, {LONGEST_JOB_NAME} characters at most."
        )
    labels = {"app.kubernetes.io/name": "tunefleet", "app.kubernetes.io/instance": name}
    pods = PodSettings(options.image, labels, storage.claim, options.secrets, options.service_account)
    meta = ObjectMeta(name=name, namespace=options.namespace, labels=labels)
    recipe = ConfigMap(metadata=meta, data={RECIPE_FILE: _small(recipe_text(demand, storage))})
    queued = {} if options.queue is None else {QUEUE_LABEL: options.queue}
    job = RayJob(
        metadata=JobMeta(name=name, namespace=options.namespace, labels={**labels, **queued}),
        spec=_job(demand, pods, name, options),
    )
    return [recipe, network_policy(meta, labels, storage), job]


def _small(recipe: str) -> str:
    size = len(RECIPE_FILE) + len(recipe.encode())
    if size > LARGEST_CONFIG_MAP_BYTES:
        raise Refused(
            f"The recipe is too large: it has {size:,} bytes, and the ConfigMap that brings it to the pods holds "
            f"{LARGEST_CONFIG_MAP_BYTES:,}: shorten its longest keys, or put what they hold into files on storage."
        )
    return recipe


def render(demand: Demand, storage: Storage, options: ManifestOptions, *, explain: bool = False) -> str:
    """The objects of a job as YAML for `kubectl apply -f -`, with the reasons of its numbers as comments.

    Raises:
        Refused: as `manifest`.
    """
    text = write_documents(manifest(demand, storage, options))
    reasons = explained(demand, storage, options) if explain else []
    return "".join(f"# {line}\n" for line in reasons) + text


def recipe_text(demand: Demand, storage: Storage) -> str:
    """The recipe as the pods read it: with the plan's numbers, and for code that is in the image."""
    keys: dict[str, Any] = {key: value for key, value in demand.keys.items() if value is not None}
    init = keys.get("ray_init_kwargs")
    init = dict(init) if isinstance(init, Mapping) else {}
    environment = init.get("runtime_env")
    init["runtime_env"] = {"py_modules": [], **(environment if isinstance(environment, Mapping) else {})}
    keys |= {STORAGE: storage.uri, "ray_init_kwargs": init}
    text = yaml.safe_dump(keys, sort_keys=False, allow_unicode=True, width=120)
    return f"# written by tunefleet manifest {tunefleet.__version__}\n{text}"


def _job(demand: Demand, pods: PodSettings, name: str, options: ManifestOptions) -> JobSpec:
    queued = options.queue is not None
    grows = demand.grows and not queued
    return JobSpec(
        entrypoint=f"tunefleet {demand.command} {RECIPE_FOLDER}/{RECIPE_FILE}",
        backoffLimit=RETRIES,
        submitterConfig=SubmitterConfig(backoffLimit=2),
        submitterPodTemplate=submitter_pod(pods),
        suspend=True if queued else None,
        shutdownAfterJobFinishes=True if queued else None,
        ttlSecondsAfterFinished=KEPT_SECONDS if queued else None,
        deletionStrategy=None if queued else _clean_up(grows),
        rayClusterSpec=ClusterSpec(
            rayVersion=version("ray"),
            authOptions=AuthOptions(mode="token"),
            enableInTreeAutoscaling=True if grows else None,
            autoscalerOptions=_autoscaler() if grows else None,
            headGroupSpec=_head(demand, pods, name, grows=grows),
            workerGroupSpecs=[_group(group, pods, options, grows=grows) for group in demand.groups],
        ),
    )


def _clean_up(grows: bool) -> DeletionStrategy:
    """Free the expensive pods at once, keep the logs of what failed for a while. An autoscaler frees pods itself."""
    rules = [
        DeletionRule(
            policy="DeleteCluster", condition=DeletionCondition(jobStatus="SUCCEEDED", ttlSeconds=_DONE_SECONDS)
        ),
        DeletionRule(policy="DeleteCluster", condition=DeletionCondition(jobStatus="FAILED", ttlSeconds=KEPT_SECONDS)),
        DeletionRule(
            policy="DeleteCluster",
            condition=DeletionCondition(jobDeploymentStatus="Failed", ttlSeconds=KEPT_SECONDS),
        ),
    ]
    if not grows:
        free = DeletionCondition(jobStatus="FAILED", ttlSeconds=0)
        rules.insert(1, DeletionRule(policy="DeleteWorkers", condition=free))
    return DeletionStrategy(deletionRules=rules)


def _autoscaler() -> AutoscalerOptions:
    return AutoscalerOptions(
        version="v2",
        idleTimeoutSeconds=_IDLE_SECONDS,
        upscalingMode="Default",
        resources=Resources(requests={"cpu": "500m", "memory": "1Gi"}, limits={"memory": "1Gi"}),
        securityContext=container_security(),
    )


def _head(demand: Demand, pods: PodSettings, recipe_map: str, *, grows: bool) -> HeadGroup:
    offered = {"CPU": "0"}
    if demand.drivers:
        offered[TRIAL_DRIVER] = str(demand.drivers)
    template = head_pod(pods, _head_requests(demand), recipe_map, grows=grows)
    return HeadGroup(rayStartParams={"dashboard-host": "0.0.0.0"}, resources=offered, template=template)


def _head_requests(demand: Demand) -> dict[str, Quantity]:
    memory = math.ceil(_HEAD_GIB + _DRIVER_GIB * demand.drivers)
    return {"cpu": str(2 + math.ceil(demand.drivers / 4)), "memory": f"{memory}Gi"}


def _group(group: GroupDemand, pods: PodSettings, options: ManifestOptions, *, grows: bool) -> WorkerGroup:
    """A group; where nothing grows, all of its pods are there from the start."""
    others = {name: f"{amount:g}" for name, amount in group.others.items()}
    requests: dict[str, Quantity] = {"cpu": str(group.cpus + 1), "memory": _memory(group, options)}
    if group.gpus:
        requests[GPU] = str(group.gpus)
    fixed = not grows and group.least_pods == 0
    return WorkerGroup(
        groupName=group.name,
        replicas=group.least_pods if grows else group.most_pods,
        minReplicas=group.most_pods if fixed else group.least_pods,
        maxReplicas=group.most_pods,
        priority=_PRIORITY if grows and not group.single else None,
        resources={"CPU": str(group.cpus), **others},
        labels=group.labels or None,
        template=worker_pod(pods, requests),
    )


def _memory(group: GroupDemand, options: ManifestOptions) -> str:
    """Memory of a pod: as the option says, as the recipe asks and a little for Ray, or by what is in the pod."""
    if options.memory is not None:
        return options.memory
    asked = group.request.get("memory", 0.0) * group.workers_per_pod
    if asked:
        return f"{math.ceil(asked / _GIB) + 2}Gi"
    return f"{32 * group.gpus}Gi" if group.gpus else f"{4 * max(1, group.cpus)}Gi"


def network_policy(meta: ObjectMeta, labels: Mapping[str, str], storage: Storage) -> NetworkPolicy:
    """Pods of the job talk to each other, the operator asks the dashboard; out go names, TLS and what storage needs."""
    own = Peer(podSelector=Selector(matchLabels=dict(labels)))
    operator = Peer(
        namespaceSelector=Selector(),
        podSelector=Selector(matchLabels={"app.kubernetes.io/component": "kuberay-operator"}),
    )
    dashboard = [PeerPort(port=8265, protocol="TCP")]
    names = [PeerPort(port=53, protocol="UDP"), PeerPort(port=53, protocol="TCP")]
    outside = [PeerPort(port=port, protocol="TCP") for port in (443, 6443, *storage.ports)]
    return NetworkPolicy(
        metadata=meta,
        spec=NetworkPolicySpec(
            podSelector=Selector(matchLabels=dict(labels)),
            policyTypes=["Ingress", "Egress"],
            ingress=[
                Ingress.model_validate({"from": [own]}),
                Ingress.model_validate({"from": [operator], "ports": dashboard}),
            ],
            egress=[Egress(to=[own]), Egress(ports=names), Egress(ports=outside)],
        ),
    )


def explained(demand: Demand, storage: Storage, options: ManifestOptions) -> list[str]:
    """Why each number is what it is."""
    return [f"{place}: {sentence}" for place, sentence in _reasons(demand, storage, options)]


def _reasons(demand: Demand, storage: Storage, options: ManifestOptions) -> Iterator[tuple[str, str]]:
    yield "recipe", f"{demand.command}, run {demand.run_name}, kept under {storage.uri}"
    for sentence in demand.why:
        yield "job", sentence
    if demand.grows:
        yield "job", _why_replicas(queued=options.queue is not None)
    head = _head_requests(demand)
    seats = f" and {_DRIVER_GIB:g}Gi for each of {demand.drivers} driver(s)" if demand.drivers else ""
    yield "head", f"CPU 0 for Ray, so that nothing trains there; memory {head['memory']}: {_HEAD_GIB:g}Gi{seats}"
    for group in demand.groups:
        for sentence in group.why:
            yield group.name, sentence
        have = f"{group.gpus} GPU(s), {group.cpus + 1} CPU(s), {_memory(group, options)}"
        source = "--memory" if options.memory else "memory from the recipe, or 32Gi for each GPU, 4Gi for each CPU"
        yield group.name, f"a pod has {have} ({source})"
    if options.queue is not None:
        yield "queue", f"suspended until Kueue admits it into {options.queue}; deleted {KEPT_SECONDS} s after its end"
        if demand.grows:
            yield "queue", "Kueue admits a RayJob whole, so all pods are there from the start instead of growing"
    yield "job", f"backoffLimit {RETRIES}: a new cluster goes on from the newest checkpoint in storage"


def _why_replicas(*, queued: bool) -> str:
    most = "all trials at once, of the largest size"
    if queued:
        return f"minReplicas and maxReplicas: {most}; a queued job keeps all of its pods from the start to the end"
    return f"minReplicas 0: without trials there are no workers; maxReplicas: {most}"
