"""The pods of a Ray cluster: a head without CPUs for workers, and workers that leave their node in good order.

Nothing runs as root, nothing may gain rights, and workers have no account of the cluster's. Before a pod is ended, its
hook tells Ray that the node goes away: the run saves a checkpoint and goes on elsewhere without losing a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tunefleet.kube.fields import Quantity
from tunefleet.kube.pods import (
    Capabilities,
    ClaimVolume,
    ConfigMapVolume,
    Container,
    ContainerPort,
    ContainerSecurity,
    EmptyDir,
    EnvSource,
    EnvVar,
    Exec,
    Hook,
    HttpGet,
    KeyRef,
    Lifecycle,
    PodMeta,
    PodSecurity,
    PodSpec,
    PodTemplate,
    Probe,
    Resources,
    SeccompProfile,
    Toleration,
    Volume,
    VolumeMount,
)
from tunefleet.launch.off_this_machine import MOUNT

RECIPE_FOLDER = "/etc/tunefleet"
GRACE_SECONDS = 180
"""From the notice that a pod is ended until it is killed."""
STOP_SECONDS = 150
"""Of these, how long is waited for the last checkpoint."""
GPU = "nvidia.com/gpu"
_USER = 1000
_HEALTH_PORT = 52365
"""Ray's agent on each node; its health is answered without a token."""

_DRIVERS = "(bin/|-m )tunefleet (train|tune) |jobs/(train|tune)[.]py "
"""Command lines of drivers: a pod's own, those of `tunefleet submit`, and those of a clone's scripts."""
LEAVE_HEAD = (
    f"pkill -TERM -f -- '{_DRIVERS}'; "
    f"for second in $(seq {STOP_SECONDS}); do pgrep -f -- '{_DRIVERS}' > /dev/null || break; sleep 1; "
    "done; ray stop || true"
)
"""Ask the drivers to save and stop, and wait for them."""
LEAVE_WORKER = (
    "ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message 'the pod is ended' "
    f"--deadline-remaining-seconds {STOP_SECONDS} || true; "
    f"for second in $(seq {STOP_SECONDS}); do pgrep -f '^ray::RayTrainWorker' > /dev/null || break; sleep 1; "
    "done; ray stop || true"
)
"""Tell Ray that this node goes away, and wait until no worker of a run is on it."""


@dataclass(frozen=True)
class SecretVariable:
    """A variable whose value is in a Secret."""

    name: str
    secret: str
    key: str


@dataclass(frozen=True)
class PodSettings:
    """What all pods of a job have in common."""

    image: str
    labels: Mapping[str, str]
    claim: str | None = None
    secrets: tuple[SecretVariable, ...] = ()
    service_account: str | None = None


def head_pod(
    settings: PodSettings, requests: Mapping[str, Quantity], recipe_map: str | None, *, grows: bool
) -> PodTemplate:
    """The pod of the head, with the recipe in `RECIPE_FOLDER`.

    Args:
        recipe_map: the ConfigMap that holds the recipe; None for a cluster whose jobs bring theirs.
        grows: whether the autoscaler runs beside it, which needs the account that the operator makes for it.
    """
    ports = [ContainerPort(containerPort=port, name=name) for name, port in (("gcs-server", 6379), ("dashboard", 8265))]
    own = [EnvVar(name="RAY_JOB_STOP_WAIT_TIME_S", value=str(STOP_SECONDS))]
    container = _ray_container(settings, "ray-head", requests, LEAVE_HEAD, own).model_copy(update={"ports": ports})
    volumes = []
    if recipe_map is not None:
        volumes = [Volume(name="recipe", configMap=ConfigMapVolume(name=recipe_map))]
        mount = VolumeMount(name="recipe", mountPath=RECIPE_FOLDER, readOnly=True)
        container = container.model_copy(update={"volumeMounts": [*(container.volumeMounts or ()), mount]})
    return _pod(settings, "head", container, volumes, automount=None if grows else False)


def worker_pod(settings: PodSettings, requests: Mapping[str, Quantity]) -> PodTemplate:
    """The pod of workers."""
    tolerations = [Toleration(key=GPU, operator="Exists", effect="NoSchedule")] if GPU in requests else None
    pod = _pod(settings, "worker", _ray_container(settings, "ray-worker", requests, LEAVE_WORKER, []), [])
    return pod.model_copy(update={"spec": pod.spec.model_copy(update={"tolerations": tolerations})})


def submitter_pod(settings: PodSettings) -> PodTemplate:
    """The pod that submits the job and follows its log; the operator gives it its command."""
    container = Container(
        name="ray-job-submitter",
        image=settings.image,
        resources=Resources(requests={"cpu": "200m", "memory": "1Gi"}, limits={"memory": "1Gi"}),
        securityContext=container_security(),
    )
    spec = PodSpec(
        restartPolicy="Never",
        automountServiceAccountToken=False,
        securityContext=pod_security(),
        containers=[container],
    )
    return PodTemplate(metadata=PodMeta(labels=_labels(settings, "submitter")), spec=spec)


def container_security() -> ContainerSecurity:
    """No rights beyond those of an ordinary process."""
    return ContainerSecurity(allowPrivilegeEscalation=False, capabilities=Capabilities(drop=["ALL"]))


def pod_security() -> PodSecurity:
    """Not root; volumes belong to the user's group."""
    return PodSecurity(
        runAsNonRoot=True,
        runAsUser=_USER,
        runAsGroup=_USER,
        fsGroup=_USER,
        fsGroupChangePolicy="OnRootMismatch",
        seccompProfile=SeccompProfile(type="RuntimeDefault"),
    )


def _labels(settings: PodSettings, component: str) -> dict[str, str]:
    return {**settings.labels, "app.kubernetes.io/component": component}


def _ray_container(
    settings: PodSettings, name: str, requests: Mapping[str, Quantity], leave: str, variables: list[EnvVar]
) -> Container:
    """The container of a Ray node; CPUs are asked for and not capped, so that Ray's own processes are not slowed."""
    secrets = [
        EnvVar(name=one.name, valueFrom=EnvSource(secretKeyRef=KeyRef(name=one.secret, key=one.key)))
        for one in settings.secrets
    ]
    plain = EnvVar(name="PYTHONUNBUFFERED", value="1")  # lines of the log arrive as they are written
    home = [EnvVar(name="HF_HOME", value=f"{MOUNT}/hub")] if settings.claim is not None else []
    mounts = [VolumeMount(name="ray-logs", mountPath="/tmp/ray")]
    if settings.claim is not None:
        mounts.append(VolumeMount(name="storage", mountPath=MOUNT))
    health = HttpGet(port=_HEALTH_PORT, path="/api/healthz")
    return Container(
        name=name,
        image=settings.image,
        env=[plain, *variables, *home, *secrets],
        resources=Resources(
            requests=dict(requests),
            limits={name: amount for name, amount in requests.items() if name != "cpu"},
        ),
        volumeMounts=mounts,
        livenessProbe=Probe(
            httpGet=health, initialDelaySeconds=60, periodSeconds=10, timeoutSeconds=5, failureThreshold=30
        ),
        readinessProbe=Probe(
            httpGet=health, initialDelaySeconds=10, periodSeconds=5, timeoutSeconds=5, failureThreshold=10
        ),
        lifecycle=Lifecycle(preStop=Hook(exec=Exec(command=["/bin/bash", "-c", leave]))),
        securityContext=container_security(),
    )


def _pod(
    settings: PodSettings, component: str, container: Container, volumes: list[Volume], automount: bool | None = False
) -> PodTemplate:
    own = [Volume(name="ray-logs", emptyDir=EmptyDir())]
    if settings.claim is not None:
        own.append(Volume(name="storage", persistentVolumeClaim=ClaimVolume(claimName=settings.claim)))
    spec = PodSpec(
        serviceAccountName=settings.service_account,
        automountServiceAccountToken=automount,
        enableServiceLinks=False,
        terminationGracePeriodSeconds=GRACE_SECONDS,
        securityContext=pod_security(),
        containers=[container],
        volumes=[*own, *volumes],
    )
    return PodTemplate(metadata=PodMeta(labels=_labels(settings, component)), spec=spec)
