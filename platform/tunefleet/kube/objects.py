"""The core objects that stand beside a Ray cluster, and Kueue's. Sources: `k8s.io/api`, `kueue.x-k8s.io/v1beta2`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from tunefleet.kube.fields import (
    Count,
    Dns1035Name,
    LabelName,
    Labels,
    ObjectMeta,
    ObjectName,
    Piece,
    Port,
    PortOrName,
    QualifiedName,
    Quantity,
    Selector,
)
from tunefleet.kube.pods import Named, PodTemplate

LARGEST_CONFIG_MAP_BYTES = 1024 * 1024


class ConfigMap(Piece):
    """Small files by name."""

    apiVersion: Literal["v1"] = "v1"
    kind: Literal["ConfigMap"] = "ConfigMap"
    metadata: ObjectMeta
    data: dict[Annotated[str, Field(pattern=r"^[-._a-zA-Z0-9]+$", max_length=253)], str] | None = None
    immutable: bool | None = None

    @model_validator(mode="after")
    def _not_too_large(self) -> Self:
        size = sum(len(key.encode()) + len(text.encode()) for key, text in (self.data or {}).items())
        if size > LARGEST_CONFIG_MAP_BYTES:
            raise ValueError(f"data has {size:,} bytes, above the limit of 1 MiB; put large files on storage")
        return self


class Namespace(Piece):
    """A namespace."""

    apiVersion: Literal["v1"] = "v1"
    kind: Literal["Namespace"] = "Namespace"
    metadata: ObjectMeta


class ServiceAccount(Piece):
    """An identity of pods."""

    apiVersion: Literal["v1"] = "v1"
    kind: Literal["ServiceAccount"] = "ServiceAccount"
    metadata: ObjectMeta
    automountServiceAccountToken: bool | None = None
    imagePullSecrets: list[Named] | None = None


class ClaimSpec(Piece):
    """What storage is claimed."""

    class Resources(Piece):
        """How much."""

        class Amount(Piece):
            """Bytes."""

            storage: Quantity

        requests: Amount

    accessModes: list[Literal["ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"]] = Field(
        min_length=1
    )
    resources: Resources
    storageClassName: str | None = None
    volumeMode: Literal["Filesystem", "Block"] | None = None
    volumeName: str | None = None


class PersistentVolumeClaim(Piece):
    """A claim on storage."""

    apiVersion: Literal["v1"] = "v1"
    kind: Literal["PersistentVolumeClaim"] = "PersistentVolumeClaim"
    metadata: ObjectMeta
    spec: ClaimSpec


class ServicePort(Piece):
    """A port of a service."""

    port: Port
    name: LabelName | None = None
    targetPort: PortOrName | None = None
    protocol: Literal["TCP", "UDP", "SCTP"] | None = None


class ServiceMeta(ObjectMeta):
    """A service's name is a name in DNS."""

    name: Dns1035Name


class ServiceSpec(Piece):
    """What stands behind a service."""

    ports: list[ServicePort] = Field(min_length=1)
    selector: Labels | None = None
    type: Literal["ClusterIP", "NodePort", "LoadBalancer"] | None = None
    clusterIP: str | None = None


class Service(Piece):
    """A name under which pods are reached."""

    apiVersion: Literal["v1"] = "v1"
    kind: Literal["Service"] = "Service"
    metadata: ServiceMeta
    spec: ServiceSpec


class DeploymentStrategy(Piece):
    """How pods are replaced."""

    type: Literal["Recreate", "RollingUpdate"]


class DeploymentSpec(Piece):
    """Pods that are kept running."""

    selector: Selector
    template: PodTemplate
    replicas: Count | None = None
    strategy: DeploymentStrategy | None = None

    @model_validator(mode="after")
    def _selects_its_own(self) -> Self:
        own = (self.template.metadata.labels if self.template.metadata else None) or {}
        for key, value in (self.selector.matchLabels or {}).items():
            if own.get(key) != value:
                raise ValueError(
                    f"selector asks for {key}: {value}, which the pods do not have; add it to their labels"
                )
        return self


class Deployment(Piece):
    """Pods that are kept running."""

    apiVersion: Literal["apps/v1"] = "apps/v1"
    kind: Literal["Deployment"] = "Deployment"
    metadata: ObjectMeta
    spec: DeploymentSpec


# ---- network --------------------------------------------------------------------------------------------------------


class PeerPort(Piece):
    """Ports that are open."""

    port: PortOrName | None = None
    endPort: Port | None = None
    protocol: Literal["TCP", "UDP", "SCTP"] | None = None


class IpBlock(Piece):
    """Addresses."""

    cidr: str = Field(pattern=r"^[0-9a-fA-F.:]+/\d{1,3}$")
    # `except` is a word of Python; nothing that we write needs it.


class Peer(Piece):
    """Who may talk, or be talked to."""

    podSelector: Selector | None = None
    namespaceSelector: Selector | None = None
    ipBlock: IpBlock | None = None

    @model_validator(mode="after")
    def _says_who(self) -> Self:
        by_name = self.podSelector is not None or self.namespaceSelector is not None
        if by_name == (self.ipBlock is not None):
            raise ValueError("a peer is either selectors or an ipBlock; write one of them")
        return self


class Ingress(Piece):
    """Traffic that comes in."""

    peers: list[Peer] | None = Field(None, alias="from")
    ports: list[PeerPort] | None = None


class Egress(Piece):
    """Traffic that goes out."""

    to: list[Peer] | None = None
    ports: list[PeerPort] | None = None


class NetworkPolicySpec(Piece):
    """Which traffic of which pods is allowed; everything else is not."""

    podSelector: Selector
    policyTypes: list[Literal["Ingress", "Egress"]] | None = None
    ingress: list[Ingress] | None = None
    egress: list[Egress] | None = None


class NetworkPolicy(Piece):
    """Which traffic pods may have."""

    apiVersion: Literal["networking.k8s.io/v1"] = "networking.k8s.io/v1"
    kind: Literal["NetworkPolicy"] = "NetworkPolicy"
    metadata: ObjectMeta
    spec: NetworkPolicySpec


# ---- Kueue ----------------------------------------------------------------------------------------------------------


class FlavorSpec(Piece):
    """Which nodes a flavor means."""

    nodeLabels: Labels | None = None


class ResourceFlavor(Piece):
    """A kind of nodes whose capacity is shared out."""

    apiVersion: Literal["kueue.x-k8s.io/v1beta2"] = "kueue.x-k8s.io/v1beta2"
    kind: Literal["ResourceFlavor"] = "ResourceFlavor"
    metadata: ObjectMeta
    spec: FlavorSpec | None = None


class Quota(Piece):
    """How much of a resource may be used."""

    name: QualifiedName
    nominalQuota: Quantity
    borrowingLimit: Quantity | None = None
    lendingLimit: Quantity | None = None


class FlavorQuotas(Piece):
    """Quotas on one flavor."""

    name: ObjectName
    resources: list[Quota] = Field(min_length=1)


class ResourceGroup(Piece):
    """Resources that are counted together, in the same order on each flavor."""

    coveredResources: list[QualifiedName] = Field(min_length=1)
    flavors: list[FlavorQuotas] = Field(min_length=1)

    @model_validator(mode="after")
    def _the_same_resources(self) -> Self:
        for flavor in self.flavors:
            if [one.name for one in flavor.resources] != self.coveredResources:
                raise ValueError(f"flavor {flavor.name} has not the coveredResources in their order; list them alike")
        return self


class Preemption(Piece):
    """Who may be sent away for whom."""

    withinClusterQueue: Literal["Never", "LowerPriority", "LowerOrNewerEqualPriority"] | None = None
    reclaimWithinCohort: Literal["Never", "LowerPriority", "Any"] | None = None


class ClusterQueueSpec(Piece):
    """What jobs of a queue may use together."""

    resourceGroups: list[ResourceGroup]
    namespaceSelector: Selector | None = None
    queueingStrategy: Literal["StrictFIFO", "BestEffortFIFO"] | None = None
    preemption: Preemption | None = None


class ClusterQueue(Piece):
    """A quota for the jobs of several namespaces."""

    apiVersion: Literal["kueue.x-k8s.io/v1beta2"] = "kueue.x-k8s.io/v1beta2"
    kind: Literal["ClusterQueue"] = "ClusterQueue"
    metadata: ObjectMeta
    spec: ClusterQueueSpec


class LocalQueueSpec(Piece):
    """Whose quota a queue uses."""

    clusterQueue: ObjectName


class LocalQueue(Piece):
    """The queue of a namespace, which jobs name."""

    apiVersion: Literal["kueue.x-k8s.io/v1beta2"] = "kueue.x-k8s.io/v1beta2"
    kind: Literal["LocalQueue"] = "LocalQueue"
    metadata: ObjectMeta
    spec: LocalQueueSpec
