"""What lies in k8s/: every overlay is built by kustomize itself and is right, and says what the docs promise."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.kube.samples import Object, with_typo
from tests.launch.autoscaler import node_types, started_for

from tunefleet.kube.check import check_document
from tunefleet.kube.documents import plain
from tunefleet.kube.schemas import Schemas
from tunefleet.launch.manifest import ManifestOptions, manifest
from tunefleet.launch.pods import GPU, PodSettings, head_pod, worker_pod
from tunefleet.recipe.read import read_recipe
from tunefleet.recipe.tune import read_search
from tunefleet.search.onto_cluster import demand_of
from tunefleet.search.opening import open_space

K8S = Path(__file__).resolve().parents[2] / "k8s"
OVERLAYS = sorted(path.parent.name for path in K8S.glob("overlays/*/kustomization.yaml"))
CRDS = os.environ.get("TUNEFLEET_KUBERAY_CRDS")
KUBECTL = shutil.which("kubectl", path=str(Path(sys.executable).parent)) or shutil.which("kubectl")

pytestmark = pytest.mark.skipif(KUBECTL is None, reason="no kubectl, whose kustomize builds the overlays")


def built(folder: Path) -> list[Object]:
    """The objects that kustomize makes of a folder."""
    assert KUBECTL is not None
    done = subprocess.run([KUBECTL, "kustomize", str(folder)], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@pytest.fixture(scope="module")
def overlays() -> dict[str, list[Object]]:
    """The objects of every overlay, and of the quota."""
    return {name: built(K8S / "overlays" / name) for name in OVERLAYS} | {"kueue": built(K8S / "kueue")}


def of_kind(documents: list[Object], kind: str) -> Object:
    (found,) = [one for one in documents if one["kind"] == kind]
    return found


def cluster_of(documents: list[Object]) -> Object:
    """The cluster in an overlay, a job's or one that stays."""
    kinds = {one["kind"]: one for one in documents}
    spec: Object = kinds["RayCluster"]["spec"] if "RayCluster" in kinds else kinds["RayJob"]["spec"]["rayClusterSpec"]
    return spec


def test_the_promised_overlays_are_there() -> None:
    product = itertools.product(("cluster", "search", "train"), ("pvc", "s3"), ("", "-queued"))
    assert sorted([*(f"{a}-{b}{c}" for a, b, c in product), "cluster-s3-fault-tolerant"]) == OVERLAYS


def test_every_overlay_is_right(overlays: dict[str, list[Object]]) -> None:
    for name, documents in overlays.items():
        for document in documents:
            assert list(check_document(document, name)) == []


@pytest.mark.skipif(CRDS is None, reason="TUNEFLEET_KUBERAY_CRDS names no folder with KubeRay's CRD files")
def test_every_overlay_obeys_the_official_schema(overlays: dict[str, list[Object]]) -> None:
    assert CRDS is not None
    schemas = Schemas(Path(CRDS))
    found = [schemas.problems(document) for documents in overlays.values() for document in documents]
    checked = [problems for problems in found if problems is not None]
    assert len(checked) == len(OVERLAYS)
    assert all(problems == [] for problems in checked)
    print(f"{len(checked)} RayJobs and RayClusters checked against the official schema, of {len(found)} objects")


def test_a_typo_in_any_field_is_found(overlays: dict[str, list[Object]]) -> None:
    chance = random.Random(1)
    documents = [document for found in overlays.values() for document in found]
    for _ in range(200):
        spoiled, wrong = with_typo(chance.choice(documents), chance)
        said = list(check_document(spoiled, "o"))
        assert any(wrong in one.path or one.path in ("kind", "apiVersion") for one in said), (wrong, said)


@pytest.mark.parametrize("parts", list(itertools.product(("train", "search", "cluster"), ("pvc", "s3"), (True, False))))
def test_components_work_together(parts: tuple[str, str, bool], tmp_path: Path) -> None:
    """Whatever is put together, also what no overlay is for: the queue and fault tolerance in either order."""
    base, storage, queue_first = parts
    more = ["queue", "gcs-fault-tolerance"] if base == "cluster" else ["queue"]
    components = [f"storage-{storage}", *(more if queue_first else more[::-1])]
    shutil.copytree(K8S, tmp_path / "k8s")
    folder = tmp_path / "k8s" / "mine"
    folder.mkdir()
    text = {
        "resources": [f"../base/{base}"],
        "components": [f"../components/{name}" for name in (components if queue_first else components[::-1])],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(text))
    documents = built(folder)
    for document in documents:
        assert list(check_document(document, "mine")) == []


def test_the_jobs_are_those_that_the_command_prints() -> None:
    for kind in ("train", "search"):
        demand, place = demand_of(K8S / "base" / kind / "recipe.yaml", [], "s3://tunefleet/runs", None)
        printed = manifest(demand, place, ManifestOptions("tunefleet", name=f"tunefleet-{kind}"))[2]
        assert yaml.safe_load((K8S / "base" / kind / "job.yaml").read_text()) == plain(printed)


def test_the_search_knows_what_its_groups_may_grow_to() -> None:
    """The recipe that lies beside the job says what the command would write into it."""
    path = K8S / "base" / "search" / "recipe.yaml"
    demand, _ = demand_of(path, [], "s3://tunefleet/runs", None)
    assert yaml.safe_load(path.read_text())["ray_node_types"] == demand.keys["ray_node_types"]


def test_the_clusters_pods_are_those_that_the_command_prints() -> None:
    spec = yaml.safe_load((K8S / "base" / "cluster" / "cluster.yaml").read_text())["spec"]
    labels = {"app.kubernetes.io/name": "tunefleet", "app.kubernetes.io/instance": "tunefleet"}
    settings = PodSettings("tunefleet", labels)
    head = head_pod(settings, {"cpu": "6", "memory": "30Gi"}, None, grows=True)
    assert spec["headGroupSpec"]["template"] == plain(head)
    for group, gpus, cpus, memory in zip(
        spec["workerGroupSpecs"], (4, 4, 1), (25, 25, 7), ("192Gi", "192Gi", "48Gi"), strict=True
    ):
        pod = plain(worker_pod(settings, {"cpu": str(cpus), "memory": memory, GPU: str(gpus)}))
        if group["groupName"] == "gpu-spot":
            assert group["template"]["spec"].pop("nodeSelector") == {"tunefleet.io/pool": "spot"}
            pod["spec"]["tolerations"] += [{"key": "tunefleet.io/spot", "operator": "Exists", "effect": "NoSchedule"}]
        assert group["template"] == pod


def test_the_recipes_can_be_read() -> None:
    assert read_recipe(K8S / "base" / "train" / "recipe.yaml").notices == ()
    names = [one.name for one in open_space(read_search(K8S / "base" / "search" / "recipe.yaml")).branches]
    assert names == ["lora", "galore", "badam"]


# ---- what the overlays say ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in OVERLAYS if not name.startswith("cluster")])
def test_a_job_is_plain_or_queued_and_knows_its_storage(overlays: dict[str, list[Object]], name: str) -> None:
    job = of_kind(overlays[name], "RayJob")
    spec, queued = job["spec"], name.endswith("queued")
    assert job["metadata"]["namespace"] == "tunefleet"
    assert ("deletionStrategy" in spec) is not queued
    assert spec.get("suspend", False) is spec.get("shutdownAfterJobFinishes", False) is queued
    assert ("kueue.x-k8s.io/queue-name" in job["metadata"]["labels"]) is queued
    storage = "/mnt/tunefleet/runs" if "-pvc" in name else "s3://tunefleet/runs"
    assert spec["entrypoint"].endswith(f"/etc/tunefleet/recipe.yaml ray_storage_path={storage}")
    cluster = spec["rayClusterSpec"]
    grows = name.startswith("search") and not queued
    assert bool(cluster.get("enableInTreeAutoscaling")) is grows
    for group in cluster["workerGroupSpecs"]:
        assert group["replicas"] == (0 if grows else group["maxReplicas"])
        assert group["minReplicas"] == group["replicas"]


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_pod_reaches_the_storage_and_no_secret_is_written(overlays: dict[str, list[Object]], name: str) -> None:
    spec = cluster_of(overlays[name])
    pods = [spec["headGroupSpec"]["template"], *(group["template"] for group in spec["workerGroupSpecs"])]
    for pod in pods:
        (container,) = pod["spec"]["containers"]
        mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
        names = {one["name"]: one for one in container["env"]}
        assert ("/mnt/tunefleet" in mounts) is ("-pvc" in name)
        assert ("AWS_SECRET_ACCESS_KEY" in names) is ("-s3" in name)
        for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            assert "value" not in names.get(variable, {})
        assert container["image"] == "tunefleet:0.1.0"
    assert all(pod["spec"]["automountServiceAccountToken"] is False for pod in pods[1:])
    assert spec["authOptions"]["mode"] == "token"


def test_a_queued_cluster_grows_in_slices(overlays: dict[str, list[Object]]) -> None:
    cluster = of_kind(overlays["cluster-s3-queued"], "RayCluster")
    assert cluster["metadata"]["annotations"] == {"kueue.x-k8s.io/elastic-job": "true"}
    assert cluster["spec"]["enableInTreeAutoscaling"] is True
    queue = of_kind(overlays["cluster-s3-queued"], "LocalQueue")
    assert queue["spec"]["clusterQueue"] == of_kind(overlays["kueue"], "ClusterQueue")["metadata"]["name"]


def test_the_books_survive_the_head(overlays: dict[str, list[Object]]) -> None:
    documents = overlays["cluster-s3-fault-tolerant"]
    options = of_kind(documents, "RayCluster")["spec"]["gcsFaultToleranceOptions"]
    service = of_kind(documents, "Service")
    assert options["redisAddress"] == f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    labels = of_kind(documents, "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()


# ---- what Ray's autoscaler makes of the cluster ---------------------------------------------------------------------

ONE = {"GPU": 1.0, "CPU": 6.0}


def test_the_autoscaler_reads_the_cluster_as_it_is_meant(overlays: dict[str, list[Object]]) -> None:
    types = node_types(cluster_of(overlays["cluster-pvc"]))
    assert {name: (one["resources"]["CPU"], one["resources"].get("GPU")) for name, one in types.items()} == {
        "headgroup": (0, None),
        "gpu": (24, 4),
        "gpu-spot": (24, 4),
        "gpu-single": (6, 1),
    }
    assert types["headgroup"]["resources"]["trial_driver"] == 16


@pytest.mark.parametrize(
    ("groups", "started"),
    [
        ([[ONE]], {"gpu-single": 1}),
        ([[ONE]] * 3, {"gpu-single": 3}),
        ([[ONE] * 4], {"gpu-spot": 1}),
        ([[ONE] * 4] * 6, {"gpu-spot": 4, "gpu": 2}),
        ([[{"GPU": 4.0, "CPU": 24.0}], [ONE]], {"gpu-spot": 1, "gpu-single": 1}),
    ],
    ids=["one worker", "three trials of one", "four workers", "more than spot has", "both"],
)
def test_the_autoscaler_starts_the_nodes_that_fit(
    overlays: dict[str, list[Object]], groups: list[list[dict[str, Any]]], started: dict[str, int]
) -> None:
    assert started_for(cluster_of(overlays["cluster-pvc"]), groups) == started


# ---- the image ------------------------------------------------------------------------------------------------------


def test_the_image_runs_as_nobody_and_holds_no_secret() -> None:
    lines = (K8S / "Dockerfile").read_text().splitlines()
    words = [line.split() for line in lines if line and not line.startswith("#")]
    assert ["USER", "1000:1000"] in words
    assert all(line[1].endswith("-slim") for line in words if line[0] == "FROM")
    assert not any(line[0] in ("ENV", "ARG") and ("TOKEN" in line[1] or "SECRET" in line[1]) for line in words)
    ignored = (K8S / "Dockerfile.dockerignore").read_text().splitlines()
    kept = {line[1:] for line in ignored if line.startswith("!")}
    copied = {name for line in words if line[0] == "COPY" and "--from" not in line[1] for name in line[1:-1]}
    assert "*" in ignored
    assert copied == kept
    assert all((K8S.parent / name).exists() for name in kept)
