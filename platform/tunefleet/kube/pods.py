"""Pods: containers, volumes, probes, resources, and where they may run. Source: `k8s.io/api/core/v1`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from tunefleet.kube.fields import (
    Annotations,
    AtLeastOne,
    Count,
    HttpPath,
    Image,
    LabelName,
    Labels,
    LabelValue,
    MountPath,
    ObjectName,
    Piece,
    Port,
    PortName,
    PortOrName,
    QualifiedName,
    Quantity,
    Requirement,
    ResourceName,
    Selector,
    VariableName,
    quantity,
)
from tunefleet.secret_names import is_secret

MOST_GRACE_SECONDS = 24 * 3600


# ---- environment ----------------------------------------------------------------------------------------------------


class KeyRef(Piece):
    """A key of a Secret or a ConfigMap."""

    name: ObjectName
    key: str = Field(min_length=1, pattern=r"^[-._a-zA-Z0-9]+$")
    optional: bool | None = None


class FieldRef(Piece):
    """A field of the pod itself."""

    fieldPath: str
    apiVersion: str | None = None


class ResourceFieldRef(Piece):
    """A limit or a request of a container."""

    resource: str
    containerName: str | None = None
    divisor: Quantity | None = None


class EnvSource(Piece):
    """Where the value of a variable comes from: exactly one place."""

    secretKeyRef: KeyRef | None = None
    configMapKeyRef: KeyRef | None = None
    fieldRef: FieldRef | None = None
    resourceFieldRef: ResourceFieldRef | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        sources = (self.secretKeyRef, self.configMapKeyRef, self.fieldRef, self.resourceFieldRef)
        if sum(source is not None for source in sources) != 1:
            raise ValueError("valueFrom has exactly one source; write secretKeyRef, configMapKeyRef or fieldRef")
        return self


class EnvVar(Piece):
    """A variable of the environment. Secrets come from a Secret: a manifest is copied and kept."""

    name: VariableName
    value: str | None = None
    valueFrom: EnvSource | None = None

    @model_validator(mode="after")
    def _no_secret_written(self) -> Self:
        if self.value is not None and self.valueFrom is not None:
            raise ValueError(f"{self.name} has both value and valueFrom; keep one of them")
        if self.value and is_secret(self.name):
            raise ValueError(
                f"{self.name} has a secret written in the manifest; write valueFrom: {{secretKeyRef: ...}}"
            )
        return self


class Named(Piece):
    """Another object, by its name."""

    name: ObjectName
    optional: bool | None = None


class EnvFrom(Piece):
    """All keys of a Secret or a ConfigMap as variables."""

    prefix: str | None = None
    secretRef: Named | None = None
    configMapRef: Named | None = None


# ---- containers -----------------------------------------------------------------------------------------------------


class Resources(Piece):
    """What a container is given (requests), and what it may not exceed (limits)."""

    requests: dict[ResourceName, Quantity] | None = None
    limits: dict[ResourceName, Quantity] | None = None

    @model_validator(mode="after")
    def _limits_hold_requests(self) -> Self:
        limits = self.limits or {}
        for name, asked in (self.requests or {}).items():
            if name in limits and quantity(asked) > quantity(limits[name]):
                raise ValueError(f"requests.{name} is {asked}, above its limit of {limits[name]}; raise the limit")
        for name, amount in {**limits, **(self.requests or {})}.items():
            if "/" in name and (self.requests or {}).get(name, amount) != limits.get(name):
                raise ValueError(f"{name} cannot be shared or exceeded; write the same amount under limits")
        return self


class HttpGet(Piece):
    """A probe by HTTP."""

    port: PortOrName
    path: HttpPath | None = None
    host: str | None = None
    scheme: Literal["HTTP", "HTTPS"] | None = None


class Exec(Piece):
    """A command in the container."""

    command: list[str] = Field(min_length=1)


class TcpSocket(Piece):
    """A probe by a connection."""

    port: PortOrName
    host: str | None = None


class Sleep(Piece):
    """A wait before a container is ended."""

    seconds: Count


class Probe(Piece):
    """How a container is asked whether it is well."""

    httpGet: HttpGet | None = None
    exec: Exec | None = None
    tcpSocket: TcpSocket | None = None
    initialDelaySeconds: Count | None = None
    periodSeconds: AtLeastOne | None = None
    timeoutSeconds: AtLeastOne | None = None
    successThreshold: AtLeastOne | None = None
    failureThreshold: AtLeastOne | None = None
    terminationGracePeriodSeconds: AtLeastOne | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if sum(way is not None for way in (self.httpGet, self.exec, self.tcpSocket)) != 1:
            raise ValueError("a probe asks in exactly one way; write httpGet, exec or tcpSocket")
        return self


class Hook(Piece):
    """What is done when a container starts or is about to be ended."""

    exec: Exec | None = None
    httpGet: HttpGet | None = None
    sleep: Sleep | None = None


class Lifecycle(Piece):
    """Hooks of a container."""

    postStart: Hook | None = None
    preStop: Hook | None = None


class Capabilities(Piece):
    """Rights of the kernel."""

    add: list[str] | None = None
    drop: list[str] | None = None


class SeccompProfile(Piece):
    """Which system calls are allowed."""

    type: Literal["RuntimeDefault", "Unconfined", "Localhost"]
    localhostProfile: str | None = None


class ContainerSecurity(Piece):
    """Rights of a container."""

    allowPrivilegeEscalation: bool | None = None
    capabilities: Capabilities | None = None
    privileged: bool | None = None
    readOnlyRootFilesystem: bool | None = None
    runAsGroup: Count | None = None
    runAsNonRoot: bool | None = None
    runAsUser: Count | None = None
    seccompProfile: SeccompProfile | None = None


class VolumeMount(Piece):
    """Where a container sees a volume."""

    name: LabelName
    mountPath: MountPath
    subPath: str | None = None
    readOnly: bool | None = None


class ContainerPort(Piece):
    """A port that a container listens on."""

    containerPort: Port
    name: PortName | None = None
    protocol: Literal["TCP", "UDP", "SCTP"] | None = None


PullPolicy = Literal["Always", "IfNotPresent", "Never"]


class Container(Piece):
    """One container of a pod."""

    name: LabelName
    image: Image | None = None
    imagePullPolicy: PullPolicy | None = None
    command: list[str] | None = None
    args: list[str] | None = None
    workingDir: str | None = None
    env: list[EnvVar] | None = None
    envFrom: list[EnvFrom] | None = None
    ports: list[ContainerPort] | None = None
    resources: Resources | None = None
    volumeMounts: list[VolumeMount] | None = None
    livenessProbe: Probe | None = None
    readinessProbe: Probe | None = None
    startupProbe: Probe | None = None
    lifecycle: Lifecycle | None = None
    securityContext: ContainerSecurity | None = None

    @model_validator(mode="after")
    def _once_each(self) -> Self:
        for what, names in (
            ("env", [one.name for one in self.env or ()]),
            ("volumeMounts", [one.mountPath for one in self.volumeMounts or ()]),
        ):
            twice = next((name for index, name in enumerate(names) if name in names[:index]), None)
            if twice is not None:
                raise ValueError(f"{what} has {twice} twice; keep one of them")
        return self


# ---- volumes --------------------------------------------------------------------------------------------------------


class KeyToPath(Piece):
    """A key as a file."""

    key: str
    path: str
    mode: Count | None = None


class ConfigMapVolume(Piece):
    """A ConfigMap as files."""

    name: ObjectName
    items: list[KeyToPath] | None = None
    defaultMode: Count | None = None
    optional: bool | None = None


class SecretVolume(Piece):
    """A Secret as files."""

    secretName: ObjectName
    items: list[KeyToPath] | None = None
    defaultMode: Count | None = None
    optional: bool | None = None


class EmptyDir(Piece):
    """A folder that lives as long as the pod."""

    medium: Literal["", "Memory"] | None = None
    sizeLimit: Quantity | None = None


class ClaimVolume(Piece):
    """A claim on a volume that outlives the pod."""

    claimName: ObjectName
    readOnly: bool | None = None


class Volume(Piece):
    """A volume of a pod: exactly one kind."""

    name: LabelName
    configMap: ConfigMapVolume | None = None
    secret: SecretVolume | None = None
    emptyDir: EmptyDir | None = None
    persistentVolumeClaim: ClaimVolume | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        kinds = (self.configMap, self.secret, self.emptyDir, self.persistentVolumeClaim)
        if sum(kind is not None for kind in kinds) != 1:
            raise ValueError(
                f"volume {self.name} has exactly one kind; write configMap, secret, emptyDir or persistentVolumeClaim"
            )
        return self


# ---- where a pod may run --------------------------------------------------------------------------------------------


class Toleration(Piece):
    """A taint of nodes that the pod puts up with."""

    key: QualifiedName | None = None
    operator: Literal["Exists", "Equal"] | None = None
    value: LabelValue | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    tolerationSeconds: int | None = None


class NodeTerm(Piece):
    """Conditions on a node, all of which hold."""

    matchExpressions: list[Requirement] | None = None
    matchFields: list[Requirement] | None = None


class NodeSelector(Piece):
    """Conditions on a node, one of which holds."""

    nodeSelectorTerms: list[NodeTerm] = Field(min_length=1)


class PreferredNode(Piece):
    """A node that is liked better."""

    weight: int = Field(ge=1, le=100)
    preference: NodeTerm


class NodeAffinity(Piece):
    """Which nodes are wanted."""

    requiredDuringSchedulingIgnoredDuringExecution: NodeSelector | None = None
    preferredDuringSchedulingIgnoredDuringExecution: list[PreferredNode] | None = None


class PodTerm(Piece):
    """Pods beside which one wants to run, or not."""

    topologyKey: QualifiedName
    labelSelector: Selector | None = None
    namespaces: list[str] | None = None
    namespaceSelector: Selector | None = None


class PreferredPod(Piece):
    """Pods beside which one would rather run, or not."""

    weight: int = Field(ge=1, le=100)
    podAffinityTerm: PodTerm


class PodAffinity(Piece):
    """Pods that are sought, or avoided."""

    requiredDuringSchedulingIgnoredDuringExecution: list[PodTerm] | None = None
    preferredDuringSchedulingIgnoredDuringExecution: list[PreferredPod] | None = None


class Affinity(Piece):
    """Where a pod would run best."""

    nodeAffinity: NodeAffinity | None = None
    podAffinity: PodAffinity | None = None
    podAntiAffinity: PodAffinity | None = None


# ---- the pod --------------------------------------------------------------------------------------------------------


class PodSecurity(Piece):
    """Rights of all containers of a pod."""

    fsGroup: Count | None = None
    fsGroupChangePolicy: Literal["OnRootMismatch", "Always"] | None = None
    runAsGroup: Count | None = None
    runAsNonRoot: bool | None = None
    runAsUser: Count | None = None
    seccompProfile: SeccompProfile | None = None
    supplementalGroups: list[Count] | None = None


RestartPolicy = Literal["Always", "OnFailure", "Never"]


class PodSpec(Piece):
    """What a pod consists of."""

    serviceAccountName: ObjectName | None = None
    automountServiceAccountToken: bool | None = None
    enableServiceLinks: bool | None = None
    restartPolicy: RestartPolicy | None = None
    terminationGracePeriodSeconds: Annotated[int, Field(ge=0, le=MOST_GRACE_SECONDS)] | None = None
    securityContext: PodSecurity | None = None
    imagePullSecrets: list[Named] | None = None
    nodeSelector: Labels | None = None
    tolerations: list[Toleration] | None = None
    affinity: Affinity | None = None
    priorityClassName: ObjectName | None = None
    runtimeClassName: ObjectName | None = None
    schedulerName: str | None = None
    hostNetwork: bool | None = None
    initContainers: list[Container] | None = None
    containers: list[Container] = Field(min_length=1)
    volumes: list[Volume] | None = None

    @model_validator(mode="after")
    def _volumes_are_there(self) -> Self:
        there = [volume.name for volume in self.volumes or ()]
        twice = next((name for index, name in enumerate(there) if name in there[:index]), None)
        if twice is not None:
            raise ValueError(f"volumes has {twice} twice; keep one of them")
        for container in (*self.containers, *(self.initContainers or ())):
            for mount in container.volumeMounts or ():
                if mount.name not in there:
                    raise ValueError(f"container {container.name} mounts the volume {mount.name}; add it to volumes")
        return self


class PodMeta(Piece):
    """Labels of the pods that a template makes."""

    name: ObjectName | None = None
    namespace: LabelName | None = None
    labels: Labels | None = None
    annotations: Annotations | None = None


class PodTemplate(Piece):
    """What pods are made from."""

    metadata: PodMeta | None = None
    spec: PodSpec


def variables(containers: list[Container]) -> Iterator[str]:
    """The names of all variables that the containers set one by one."""
    for container in containers:
        yield from (one.name for one in container.env or ())


def amount(resources: Mapping[str, Quantity] | None, name: str) -> float:
    """A resource's quantity as a number; 0 where it is not written."""
    return quantity((resources or {}).get(name, 0))
