"""KubeRay's objects: RayCluster and RayJob, with the rules of their schema and of the operator.

Source: KubeRay 1.7.0, `ray-operator/apis/ray/v1` and `controllers/ray/utils/validation.go`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, Field, model_validator

from tunefleet.kube.fields import (
    AtLeastOne,
    Count,
    Image,
    Labels,
    ObjectMeta,
    ObjectName,
    Piece,
    Quantity,
    is_dns_1035,
    near,
    quantity,
    refuse_all,
)
from tunefleet.kube.pods import (
    ContainerSecurity,
    EnvFrom,
    EnvSource,
    EnvVar,
    PodTemplate,
    PullPolicy,
    Resources,
    VolumeMount,
    variables,
)

LONGEST_CLUSTER_NAME, LONGEST_JOB_NAME = 53, 47
"""Characters of a name: the operator makes the names of pods and services from it."""
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
ELASTIC_ANNOTATION = "kueue.x-k8s.io/elastic-job"
CLUSTER_LABEL = "ray.io/cluster"
"""The key of `clusterSelector`."""
_AUTOSCALER_SWITCH = "RAY_enable_autoscaler_v2"
_FIRST_V2_RAY, _FIRST_TOKEN_RAY, _FIRST_PRIORITY_RAY = (2, 47), (2, 52), (2, 56)
_START_RESOURCES = frozenset({"num-cpus", "num-gpus", "memory", "resources"})
START_OPTIONS = frozenset(
    {
        *("address", "autoscaling-config", "block", "cgroup-path", "dashboard-agent-grpc-port"),
        *("dashboard-agent-listen-port", "dashboard-host", "dashboard-port", "disable-usage-stats"),
        *("enable-object-reconstruction", "enable-resource-isolation", "head", "include-dashboard"),
        *("include-log-monitor", "labels", "labels-file", "log-color", "log-style", "max-worker-port", "memory"),
        *("metrics-export-port", "min-worker-port", "no-monitor", "no-redirect-output", "node-ip-address"),
        *("node-manager-port", "node-name", "num-cpus", "num-gpus", "object-manager-port"),
        *("object-spilling-directory", "object-store-memory", "plasma-directory", "port", "proxy-server-url"),
        *("ray-client-server-port", "ray-debugger-external", "redis-password", "redis-shard-ports", "redis-username"),
        *("resources", "runtime-env-agent-port", "system-config", "system-reserved-cpu", "system-reserved-memory"),
        *("temp-dir", "tracing-startup-hook", "verbose", "worker-port-list"),
    }
)
"""The long options of `ray start` of Ray 2.60, whose names are the keys of `rayStartParams`."""
_RAYS_OWN_RESOURCES = {name.lower(): name for name in ("CPU", "GPU", "TPU", "memory", "object_store_memory")}
_RUNTIME_ENV_KEYS = frozenset(
    {
        *("working_dir", "py_modules", "excludes", "env_vars", "config", "pip", "uv", "conda", "image_uri"),
        *("py_executable", "worker_process_setup_hook", "container", "mpi", "nsight", "rocprof_sys"),
    }
)


def _cluster_name(value: str) -> str:
    if not is_dns_1035(value, LONGEST_CLUSTER_NAME):
        raise ValueError(
            f"{value!r} is no name of a RayCluster; begin with a small letter, then small letters, digits and dashes, "
            f"{LONGEST_CLUSTER_NAME} characters at most"
        )
    return value


def _job_name(value: str) -> str:
    if not is_dns_1035(value, LONGEST_JOB_NAME):
        raise ValueError(
            f"{value!r} is no name of a RayJob; begin with a small letter, then small letters, digits and dashes, "
            f"{LONGEST_JOB_NAME} characters at most"
        )
    return value


def _version(value: str) -> str:
    if not re.fullmatch(r"\d+\.\d+\.\d+\S*", value):
        raise ValueError(f"{value!r} is no version of Ray; write for example 2.60.0")
    return value


def _start_params(value: dict[str, str]) -> dict[str, str]:
    if "labels" in value:
        raise ValueError("labels are not given to ray start; write them under labels of the group")
    for key in value:
        if key not in START_OPTIONS:
            meant = near(key, START_OPTIONS)
            mend = f"did you mean {meant}?" if meant else "remove it"
            raise ValueError(f"{key} is no option of ray start; {mend}")
    return value


def _node_resources(value: dict[str, str]) -> dict[str, str]:
    for name, text in value.items():
        own = _RAYS_OWN_RESOURCES.get(name.lower(), name)
        if name != own:
            raise ValueError(f"{name} would be a resource of your own, which nothing asks for; write {own}")
        if quantity(text) < 0:
            raise ValueError(f"{name} is {text}, which is negative; write an amount of 0 or more")
    return value


RayVersion = Annotated[str, AfterValidator(_version)]
StartParams = Annotated[dict[str, str], AfterValidator(_start_params)]
NodeResources = Annotated[dict[str, str], AfterValidator(_node_resources)]
"""What Ray is told a node has, its own names (CPU, GPU, memory) and custom ones; amounts are texts."""


def _resources_once(params: Mapping[str, str] | None, resources: Mapping[str, str] | None) -> None:
    both = sorted(_START_RESOURCES & (params or {}).keys())
    if both and resources:
        raise ValueError(f"{both[0]} in rayStartParams and resources both say what the node has; keep resources")


class HeadGroup(Piece):
    """The head: Ray's books, the dashboard, the drivers."""

    rayStartParams: StartParams | None = None
    resources: NodeResources | None = None
    labels: Labels | None = None
    serviceType: Literal["ClusterIP", "NodePort", "LoadBalancer"] | None = None
    enableIngress: bool | None = None
    template: PodTemplate

    @model_validator(mode="after")
    def _said_once(self) -> Self:
        _resources_once(self.rayStartParams, self.resources)
        return self


class WorkerGroup(Piece):
    """Alike workers, as many as are wanted."""

    groupName: ObjectName
    replicas: Count | None = None
    minReplicas: Count | None = None
    maxReplicas: Count | None = None
    numOfHosts: AtLeastOne | None = None
    idleTimeoutSeconds: Count | None = None
    priority: int | None = None
    suspend: bool | None = None
    rayStartParams: StartParams | None = None
    resources: NodeResources | None = None
    labels: Labels | None = None
    template: PodTemplate

    @model_validator(mode="after")
    def _least_to_most(self) -> Self:
        _resources_once(self.rayStartParams, self.resources)
        least, most = self.minReplicas or 0, self.maxReplicas
        if most is not None and least > most:
            raise ValueError(f"minReplicas is {least} and maxReplicas {most}; write a maxReplicas of {least} or more")
        if self.replicas is not None and most is not None and not least <= self.replicas <= most:
            raise ValueError(f"replicas is {self.replicas}, outside of minReplicas {least} to maxReplicas {most}")
        return self


class AutoscalerOptions(Piece):
    """The autoscaler, a container beside the head's."""

    version: Literal["v1", "v2"] | None = None
    idleTimeoutSeconds: Count | None = None
    upscalingMode: Literal["Default", "Aggressive", "Conservative"] | None = None
    image: Image | None = None
    imagePullPolicy: PullPolicy | None = None
    resources: Resources | None = None
    env: list[EnvVar] | None = None
    envFrom: list[EnvFrom] | None = None
    securityContext: ContainerSecurity | None = None
    volumeMounts: list[VolumeMount] | None = None


class AuthOptions(Piece):
    """Whether Ray asks for a token."""

    mode: Literal["disabled", "token"] | None = None
    secretName: ObjectName | None = None
    enableK8sTokenAuth: bool | None = None


class Credential(Piece):
    """A user or a password: from a Secret."""

    valueFrom: EnvSource


class FaultToleranceStorage(Piece):
    """The volume of the rocksdb backend (alpha)."""

    claimName: ObjectName | None = None
    storageClassName: str | None = None
    size: Quantity | None = None
    accessModes: list[str] | None = None
    subPath: str | None = None
    deletionPolicy: Literal["DeleteWithCluster", "Retain"] | None = None


class FaultTolerance(Piece):
    """Where the head keeps its books, so that a new one goes on with them."""

    backend: Literal["redis", "rocksdb"] | None = None
    redisAddress: str | None = None
    redisUsername: Credential | None = None
    redisPassword: Credential | None = None
    externalStorageNamespace: str | None = None
    storage: FaultToleranceStorage | None = None

    @model_validator(mode="after")
    def _one_backend(self) -> Self:
        if self.backend == "rocksdb":
            if self.redisAddress is not None:
                raise ValueError("backend: rocksdb uses no redisAddress; remove it, or write backend: redis")
        elif self.redisAddress is None:
            raise ValueError("redis has no redisAddress; write for example redisAddress: redis:6379")
        return self


def _parts(version: str | None) -> tuple[int, ...] | None:
    return None if version is None else tuple(int(part) for part in re.findall(r"\d+", version)[:2])


class ClusterSpec(Piece):
    """A Ray cluster: a head, and groups of workers."""

    rayVersion: RayVersion | None = None
    authOptions: AuthOptions | None = None
    enableInTreeAutoscaling: bool | None = None
    autoscalerOptions: AutoscalerOptions | None = None
    gcsFaultToleranceOptions: FaultTolerance | None = None
    headServiceAnnotations: dict[str, str] | None = None
    managedBy: Literal["ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"] | None = None
    suspend: bool | None = None
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup] | None = None

    @property
    def autoscaler_v2(self) -> bool:
        """Whether Ray's second autoscaler makes the workers; it is the default from Ray 2.47 on."""
        if not self.enableInTreeAutoscaling:
            return False
        written = self.autoscalerOptions.version if self.autoscalerOptions else None
        version = _parts(self.rayVersion)
        return written == "v2" or (written is None and version is not None and version >= _FIRST_V2_RAY)

    @model_validator(mode="after")
    def _rules_of_the_operator(self) -> Self:
        refuse_all((*self._group_problems(), *self._autoscaler_problems(), *self._environment_problems()))
        return self

    def _group_problems(self) -> Iterator[str]:
        names = [group.groupName for group in self.workerGroupSpecs or ()]
        for name in names:
            if names.count(name) > 1:
                yield f"two worker groups are named {name}; give each a groupName of its own"
        version = _parts(self.rayVersion)
        for group in self.workerGroupSpecs or ():
            asks = group.priority or group.idleTimeoutSeconds is not None
            if asks and self.enableInTreeAutoscaling and not self.autoscaler_v2:
                yield f"group {group.groupName} has a priority or idleTimeoutSeconds, which autoscaler v1 does not know"
            if group.priority and version is not None and version < _FIRST_PRIORITY_RAY:
                yield f"group {group.groupName} has a priority, which Ray before 2.56 does not know; remove it"
        if self.authOptions is not None and self.authOptions.mode == "token":
            if version is None:
                yield "authOptions.mode is token and rayVersion is missing; write rayVersion"
            elif version < _FIRST_TOKEN_RAY:
                yield f"authOptions.mode is token, which Ray {self.rayVersion} does not know; it needs Ray 2.52"

    def _autoscaler_problems(self) -> Iterator[str]:
        groups = self.workerGroupSpecs or []
        if self.enableInTreeAutoscaling:
            suspended = next((group.groupName for group in groups if group.suspend), None)
            if suspended is not None:
                yield f"group {suspended} is suspended, which enableInTreeAutoscaling does not allow; remove suspend"
        elif self.autoscalerOptions is not None:
            yield "autoscalerOptions are there and no autoscaler; write enableInTreeAutoscaling: true"
        if not self.autoscaler_v2:
            return
        pods = [("headGroupSpec", self.headGroupSpec.template), *((one.groupName, one.template) for one in groups)]
        for name, template in pods:
            policy = template.spec.restartPolicy
            if policy not in (None, "Never"):
                yield f"{name} has restartPolicy: {policy}, and autoscaler v2 wants Never; remove the line"

    def _environment_problems(self) -> Iterator[str]:
        head = set(variables(self.headGroupSpec.template.spec.containers[:1]))
        if self.gcsFaultToleranceOptions is None and "RAY_REDIS_ADDRESS" in head:
            yield "the head sets RAY_REDIS_ADDRESS; write gcsFaultToleranceOptions instead"
        for name in ("RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME"):
            if self.gcsFaultToleranceOptions is not None and name in head:
                yield f"the head sets {name}, which is said under gcsFaultToleranceOptions; remove the variable"
        if _AUTOSCALER_SWITCH in head and self.autoscalerOptions is not None and self.autoscalerOptions.version:
            yield f"the head sets {_AUTOSCALER_SWITCH} beside autoscalerOptions.version; remove the variable"


class ClusterMeta(ObjectMeta):
    """The operator makes other names from that of a cluster."""

    name: Annotated[str, AfterValidator(_cluster_name)]


class RayCluster(Piece):
    """A Ray cluster that stays until it is deleted."""

    apiVersion: Literal["ray.io/v1"] = "ray.io/v1"
    kind: Literal["RayCluster"] = "RayCluster"
    metadata: ClusterMeta
    spec: ClusterSpec

    @model_validator(mode="after")
    def _queue(self) -> Self:
        labels, annotations = self.metadata.labels or {}, self.metadata.annotations or {}
        queued, elastic = QUEUE_LABEL in labels, annotations.get(ELASTIC_ANNOTATION) == "true"
        if queued and self.spec.enableInTreeAutoscaling and not elastic:
            raise ValueError(
                f"Kueue admits no cluster that grows, unless its annotation {ELASTIC_ANNOTATION} is 'true'; add it"
            )
        return self


# ---- RayJob ---------------------------------------------------------------------------------------------------------

DeletionPolicy = Literal["DeleteWorkers", "DeleteCluster", "DeleteSelf", "DeleteNone"]
_DELETION_ORDER: Sequence[DeletionPolicy] = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")


class DeletionCondition(Piece):
    """After what something is deleted."""

    jobStatus: Literal["SUCCEEDED", "FAILED"] | None = None
    jobDeploymentStatus: Literal["Failed"] | None = None
    ttlSeconds: Count | None = None

    @model_validator(mode="after")
    def _one_status(self) -> Self:
        if (self.jobStatus is None) == (self.jobDeploymentStatus is None):
            raise ValueError("a condition has either jobStatus or jobDeploymentStatus; write one of them")
        return self


class DeletionRule(Piece):
    """What is deleted after the job."""

    policy: DeletionPolicy
    condition: DeletionCondition


class DeletionStrategy(Piece):
    """What is deleted when. The older form, onSuccess and onFailure, is not written any more."""

    deletionRules: list[DeletionRule] = Field(min_length=1)

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        times: dict[str | None, dict[DeletionPolicy, int]] = {}
        for rule in self.deletionRules:
            status: str | None = rule.condition.jobStatus or rule.condition.jobDeploymentStatus
            own = times.setdefault(status, {})
            if rule.policy in own:
                raise ValueError(f"deletionRules has {rule.policy} twice for {status}; keep one of them")
            own[rule.policy] = rule.condition.ttlSeconds or 0
        for status, own in times.items():
            for earlier, later in pairwise([policy for policy in _DELETION_ORDER if policy in own]):
                if own[later] < own[earlier]:
                    raise ValueError(
                        f"after {status}, {later} comes at {own[later]} s and {earlier} at {own[earlier]} s; write a "
                        f"ttlSeconds of {own[earlier]} or more"
                    )
        return self


class SubmitterConfig(Piece):
    """The Kubernetes Job that submits the Ray job."""

    backoffLimit: Count | None = None


def _runtime_env(value: str) -> str:
    try:
        read: Any = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError("is no YAML; write the runtime environment as a mapping") from error
    if not isinstance(read, dict):
        raise ValueError("is no mapping; write for example working_dir: local:///app")  # noqa: TRY004  pydantic's
    unknown = sorted(str(key) for key in read if key not in _RUNTIME_ENV_KEYS)
    if unknown:
        raise ValueError(f"{unknown[0]} is no key of a runtime environment; correct or remove it")
    for packages in ("pip", "uv", "conda"):
        others = [other for other in ("pip", "uv", "conda") if other != packages and read.get(other)]
        if read.get(packages) and others:
            raise ValueError(f"{packages} and {others[0]} both install packages; keep one of them")
    return value


class JobSpec(Piece):
    """A job, and the cluster that it runs on."""

    entrypoint: str = Field(min_length=1)
    runtimeEnvYAML: Annotated[str, AfterValidator(_runtime_env)] | None = None
    jobId: str | None = None
    metadata: dict[str, str] | None = None
    entrypointNumCpus: Annotated[float, Field(ge=0)] | None = None
    entrypointNumGpus: Annotated[float, Field(ge=0)] | None = None
    entrypointResources: str | None = None
    submissionMode: Literal["K8sJobMode", "HTTPMode", "SidecarMode"] | None = None
    submitterConfig: SubmitterConfig | None = None
    backoffLimit: Count | None = None
    activeDeadlineSeconds: AtLeastOne | None = None
    preRunningDeadlineSeconds: AtLeastOne | None = None
    suspend: bool | None = None
    managedBy: Literal["ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"] | None = None
    shutdownAfterJobFinishes: bool | None = None
    ttlSecondsAfterFinished: Count | None = None
    deletionStrategy: DeletionStrategy | None = None
    clusterSelector: dict[str, str] | None = None
    submitterPodTemplate: PodTemplate | None = None
    rayClusterSpec: ClusterSpec | None = None

    @model_validator(mode="after")
    def _rules_of_the_operator(self) -> Self:
        refuse_all((*self._place_problems(), *self._clean_up_problems(), *self._submission_problems()))
        return self

    def _place_problems(self) -> Iterator[str]:
        if (self.rayClusterSpec is None) == (self.clusterSelector is None):
            yield "a job has either rayClusterSpec or clusterSelector; write one of them"
        if self.clusterSelector is not None and not self.clusterSelector.get(CLUSTER_LABEL):
            yield f"clusterSelector names no cluster; write {CLUSTER_LABEL}: and its name"

    def _clean_up_problems(self) -> Iterator[str]:
        shuts_down = bool(self.shutdownAfterJobFinishes)
        if self.suspend and not shuts_down:
            yield "suspend needs shutdownAfterJobFinishes: true; add it"
        if self.suspend and self.clusterSelector is not None:
            yield "suspend does not go with clusterSelector; write rayClusterSpec"
        if self.ttlSecondsAfterFinished and not shuts_down:
            yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes: true; add it"
        if self.deletionStrategy is None:
            return
        if shuts_down:
            yield "shutdownAfterJobFinishes and deletionStrategy both clean up; keep one of them"
        policies = [rule.policy for rule in self.deletionStrategy.deletionRules]
        grows = self.rayClusterSpec is not None and self.rayClusterSpec.enableInTreeAutoscaling
        if grows and "DeleteWorkers" in policies:
            yield "DeleteWorkers does not go with enableInTreeAutoscaling; write DeleteCluster"
        if self.clusterSelector is not None and {"DeleteWorkers", "DeleteCluster"} & set(policies):
            yield "a job on another's cluster (clusterSelector) cannot delete it; write DeleteSelf"

    def _submission_problems(self) -> Iterator[str]:
        if self.submissionMode != "SidecarMode":
            return
        if self.submitterPodTemplate is not None or self.submitterConfig is not None:
            yield "SidecarMode submits from the head; remove submitterPodTemplate and submitterConfig"
        if self.clusterSelector is not None:
            yield "SidecarMode does not go with clusterSelector; write submissionMode: K8sJobMode"
        head = None if self.rayClusterSpec is None else self.rayClusterSpec.headGroupSpec.template.spec.restartPolicy
        if head not in (None, "Never"):
            yield f"SidecarMode wants restartPolicy: Never for the head, and it is {head}; remove the line"


class JobMeta(ObjectMeta):
    """The operator makes the cluster's name, among others, from that of a job."""

    name: Annotated[str, AfterValidator(_job_name)]


class RayJob(Piece):
    """A job with a cluster of its own, or on one that is there."""

    apiVersion: Literal["ray.io/v1"] = "ray.io/v1"
    kind: Literal["RayJob"] = "RayJob"
    metadata: JobMeta
    spec: JobSpec

    @model_validator(mode="after")
    def _queue(self) -> Self:
        if QUEUE_LABEL not in (self.metadata.labels or {}):
            return self
        if not self.spec.shutdownAfterJobFinishes:
            raise ValueError(
                f"{QUEUE_LABEL} needs shutdownAfterJobFinishes: true, so that the quota comes back; add it"
            )
        if self.spec.clusterSelector is not None:
            raise ValueError("Kueue admits a job with its cluster; write rayClusterSpec instead of clusterSelector")
        return self
