"""Manifests are checked field by field; each problem is one sentence that begins with its place."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.kube.samples import Object, cluster_spec, pod, ray_cluster, ray_job

from tunefleet.errors import Refused
from tunefleet.kube.check import KINDS, check_bytes, check_file, check_text
from tunefleet.kube.ray import START_OPTIONS

TOKEN = {"authOptions": {"mode": "token"}}
AUTOSCALED = {"enableInTreeAutoscaling": True}
RULE: Object = {"policy": "DeleteCluster", "condition": {"jobStatus": "SUCCEEDED", "ttlSeconds": 60}}


def found(document: object) -> list[str]:
    return [f"{one.path}: {one.what}" for one in check_text(yaml.safe_dump(document), "f").findings]


def put(document: Object, path: str, value: Any) -> Object:
    """A copy with one field set; `path` is written with dots, numbers for places in lists."""
    spoiled = copy.deepcopy(document)
    holder: Any = spoiled
    *way, last = [int(step) if step.isdigit() else step for step in path.split("/")]
    for step in way:
        holder = holder[step]
    holder[last] = value
    return spoiled


def container(**more: Any) -> Object:
    return put(ray_cluster(), "spec/headGroupSpec/template/spec/containers/0", {"name": "ray", **more})


def test_right_objects_have_no_problem() -> None:
    assert found(ray_cluster()) == []
    assert found(ray_job()) == []
    assert found(ray_job(suspend=True, shutdownAfterJobFinishes=True, ttlSecondsAfterFinished=60)) == []
    assert found(ray_job(deletionStrategy={"deletionRules": [RULE]})) == []


def test_what_is_unusual_and_right_has_no_problem() -> None:
    digest = f"[::1]:5000/a__b/c-d.e@sha256:{'0' * 64}"
    for image in ("ray", "a/b:1.0_x", "registry.example:5000/Team".lower(), "localhost/a", "Reg.io/a:V1", digest):
        assert found(container(image=image)) == [], image
    amounts: Object = {"cpu": 0.5, "ephemeral-storage": "1Gi", "hugepages-2Mi": "4Mi", "nvidia.com/gpu": 1}
    assert found(container(resources={"requests": amounts, "limits": amounts})) == []
    assert found(container(ports=[{"containerPort": 1, "name": "8265-http"}])) == []
    assert found(put(ray_cluster(), "spec/workerGroupSpecs/0/resources", {"CPU": "4", "fast_disk": "1"})) == []


def test_the_options_of_ray_start_are_those_that_ray_has() -> None:
    from ray.scripts.scripts import start

    long = {word.removeprefix("--") for one in start.params for word in one.opts if word.startswith("--")}
    assert long == START_OPTIONS


HEAD = "spec.headGroupSpec.template.spec.containers[0]"
GROUP = "spec.workerGroupSpecs[0]"

WRONG: list[tuple[object, str]] = [
    # fields and types
    (put(ray_cluster(), "spec/idleTimoutSeconds", 5), "spec.idleTimoutSeconds: is no field here"),
    (
        put(ray_cluster(), "spec/workerGroupSpecs/0/maxReplicaz", 5),
        f"{GROUP}.maxReplicaz: is no field here; did you mean maxReplicas?",
    ),
    (put(ray_cluster(), "spec/workerGroupSpecs/0/replicas", "2"), f"{GROUP}.replicas: '2' is not a whole number"),
    (put(ray_cluster(), "spec/workerGroupSpecs/0/replicas", True), f"{GROUP}.replicas: True is not a whole number"),
    (put(ray_cluster(), "metadata/labels", {"a": 1}), "metadata.labels.a: 1 is not text; put it in quotes"),
    (put(ray_cluster(), "metadata/labels", {"a b": "c"}), "metadata.labels.a b: 'a b' is no key of a label"),
    (put(ray_cluster(), "spec/enableInTreeAutoscaling", "yes"), "spec.enableInTreeAutoscaling: 'yes' is not true or"),
    ({"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {"name": "c"}}, "spec: is missing"),
    (put(ray_cluster(), "apiVersion", "ray.io/v1alpha1"), "apiVersion: 'ray.io/v1alpha1' is not ray.io/v1"),
    (put(ray_cluster(), "kind", "RayClustr"), "kind: 'RayClustr' is no kind that is checked here; did you mean RayClu"),
    ([1, 2], ": is no object"),
    # names
    (put(ray_job(), "metadata/name", "j" * 48), "metadata.name: 'jjj"),
    (put(ray_job(), "metadata/name", "7-days"), "metadata.name: '7-days' is no name of a RayJob"),
    (put(ray_job(), "metadata/name", "Upper"), "metadata.name: 'Upper' is no name of a RayJob"),
    (put(ray_cluster(), "metadata/name", "c" * 54), "metadata.name: 'ccc"),
    # containers
    (
        container(env=[{"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}]),
        f"{HEAD}.env[0]: AWS_SECRET_ACCESS_KEY has a se",
    ),
    (container(env=[{"name": "A", "value": 1}]), f"{HEAD}.env[0].value: 1 is not text"),
    (container(env=[{"name": "A", "valueFrom": {}}]), f"{HEAD}.env[0].valueFrom: valueFrom has exactly one source"),
    (container(env=[{"name": "A", "value": "1"}] * 2), f"{HEAD}: env has A twice"),
    (container(resources={"requests": {"cpu": "2"}, "limits": {"cpu": "1"}}), f"{HEAD}.resources: requests.cpu is 2"),
    (container(resources={"requests": {"nvidia.com/gpu": "1"}}), f"{HEAD}.resources: nvidia.com/gpu cannot be shared"),
    (container(resources={"requests": {"cpu": "two"}}), f"{HEAD}.resources.requests.cpu: 'two' is no quantity"),
    (container(livenessProbe={"periodSeconds": 5}), f"{HEAD}.livenessProbe: a probe asks in exactly one way"),
    (container(volumeMounts=[{"name": "v", "mountPath": "/v"}]), "spec.headGroupSpec.template.spec: container ray mou"),
    (
        container(volumeMounts=[{"name": "v", "mountPath": "v"}]),
        f"{HEAD}.volumeMounts[0].mountPath: 'v' is no absolute",
    ),
    (
        container(resources={"requests": {"memroy": "1Gi"}}),
        f"{HEAD}.resources.requests.memroy: 'memroy' is no resou",
    ),
    (container(resources={"limits": {"cpuu": 1}}), f"{HEAD}.resources.limits.cpuu: 'cpuu' is no resource of a contain"),
    (container(resources={"requests": {"cpu": "-1"}}), f"{HEAD}.resources.requests.cpu: -1 is negative"),
    (container(image="My Image"), f"{HEAD}.image: 'My Image' is no image"),
    (container(image="Registry/Team:1"), f"{HEAD}.image: 'Registry/Team:1' is no image"),
    (container(image="a:1:2"), f"{HEAD}.image: 'a:1:2' is no image"),
    (container(image=""), f"{HEAD}.image: '' is no image"),
    (ray_cluster(**AUTOSCALED, autoscalerOptions={"image": "a b"}), "spec.autoscalerOptions.image: 'a b' is no image"),
    (container(ports=[{"containerPort": 1, "name": "8265"}]), f"{HEAD}.ports[0].name: '8265' is no name of a port"),
    (container(ports=[{"containerPort": 1, "name": "a" * 16}]), f"{HEAD}.ports[0].name: 'aaaaaaaaaaaaaaaa' is no name"),
    (container(livenessProbe={"httpGet": {"port": "80"}}), f"{HEAD}.livenessProbe.httpGet.port: '80' is no name of a"),
    (container(livenessProbe={"httpGet": {"port": 0}}), f"{HEAD}.livenessProbe.httpGet.port: 0 is no port"),
    (
        container(livenessProbe={"httpGet": {"port": 80, "path": "healthz"}}),
        f"{HEAD}.livenessProbe.httpGet.path: 'healthz' is no path",
    ),
    # clusters
    (put(ray_cluster(), "spec/workerGroupSpecs/0/resources", {"cpu": "4"}), f"{GROUP}.resources: cpu would be a resou"),
    (put(ray_cluster(), "spec/workerGroupSpecs/0/resources", {"Gpu": "4"}), f"{GROUP}.resources: Gpu would be a resou"),
    (put(ray_cluster(), "spec/workerGroupSpecs/0/resources", {"GPU": "-4"}), f"{GROUP}.resources: GPU is -4, which is"),
    (
        put(ray_cluster(), "spec/workerGroupSpecs/0/rayStartParams", {"num_cpus": "4"}),
        f"{GROUP}.rayStartParams: num_cpus is no option of ray start; did you mean num-cpus?",
    ),
    (put(ray_cluster(), "spec/workerGroupSpecs/0/minReplicas", 3), f"{GROUP}: minReplicas is 3 and maxReplicas 2"),
    (put(ray_cluster(), "spec/workerGroupSpecs/0/replicas", 3), f"{GROUP}: replicas is 3, outside of"),
    (ray_cluster(workerGroupSpecs=cluster_spec()["workerGroupSpecs"] * 2), "spec: two worker groups are named workers"),
    (ray_cluster(**TOKEN, rayVersion="2.51.0"), "spec: authOptions.mode is token, which Ray 2.51.0 does not know"),
    (put(ray_cluster(**TOKEN), "spec/rayVersion", None), "spec: authOptions.mode is token and rayVersion is missing"),
    (
        ray_cluster(**AUTOSCALED, headGroupSpec={"template": pod(restartPolicy="Always")}),
        "spec: headGroupSpec has restartPolicy: Always, and autoscaler v2 wants Never",
    ),
    (ray_cluster(autoscalerOptions={"version": "v2"}), "spec: autoscalerOptions are there and no autoscaler"),
    (
        ray_cluster(headGroupSpec={"template": pod(), "rayStartParams": {"num-cpus": "0"}, "resources": {"CPU": "0"}}),
        "spec.headGroupSpec: num-cpus in rayStartParams and resources both say",
    ),
    (
        ray_cluster(headGroupSpec={"template": pod(), "rayStartParams": {"labels": "a=b"}}),
        "spec.headGroupSpec.rayStartParams: labels are not given to ray start",
    ),
    (ray_cluster(gcsFaultToleranceOptions={"backend": "redis"}), "spec.gcsFaultToleranceOptions: redis has no redisAd"),
    (
        put(ray_cluster(**AUTOSCALED), "metadata/labels", {"kueue.x-k8s.io/queue-name": "q"}),
        ": Kueue admits no cluster that grows, unless",
    ),
    # jobs
    (ray_job(suspend=True), "spec: suspend needs shutdownAfterJobFinishes: true"),
    (ray_job(ttlSecondsAfterFinished=60), "spec: ttlSecondsAfterFinished needs shutdownAfterJobFinishes"),
    (
        ray_job(deletionStrategy={"deletionRules": [RULE]}, shutdownAfterJobFinishes=True),
        "spec: shutdownAfterJobFinishes and deletionStrategy both clean up",
    ),
    (ray_job(deletionStrategy={"deletionRules": []}), "spec.deletionStrategy.deletionRules: is empty"),
    (
        ray_job(deletionStrategy={"deletionRules": [RULE, RULE]}),
        "spec.deletionStrategy: deletionRules has DeleteCluster twice",
    ),
    (
        ray_job(
            deletionStrategy={
                "deletionRules": [
                    RULE,
                    {"policy": "DeleteWorkers", "condition": {**RULE["condition"], "ttlSeconds": 90}},
                ]
            }
        ),
        "spec.deletionStrategy: after SUCCEEDED, DeleteCluster comes at 60 s and DeleteWorkers at 90 s",
    ),
    (
        ray_job(
            deletionStrategy={"deletionRules": [{"policy": "DeleteWorkers", "condition": {"jobStatus": "FAILED"}}]},
            rayClusterSpec=cluster_spec(**AUTOSCALED),
        ),
        "spec: DeleteWorkers does not go with enableInTreeAutoscaling",
    ),
    (
        ray_job(
            deletionStrategy={
                "deletionRules": [
                    {"policy": "DeleteSelf", "condition": {"jobStatus": "FAILED", "jobDeploymentStatus": "Failed"}}
                ]
            }
        ),
        "spec.deletionStrategy.deletionRules[0].condition: a condition has either",
    ),
    (ray_job(clusterSelector={"ray.io/cluster": "c"}), "spec: a job has either rayClusterSpec or clusterSelector"),
    (
        put(ray_job(clusterSelector={"cluster": "c"}), "spec/rayClusterSpec", None),
        "spec: clusterSelector names no cluster",
    ),
    (ray_job(submissionMode="Sidecar"), "spec.submissionMode: 'Sidecar' is not"),
    (
        ray_job(submissionMode="SidecarMode", submitterPodTemplate=pod()),
        "spec: SidecarMode submits from the head; remove submitterPodTemplate",
    ),
    (ray_job(runtimeEnvYAML="workingdir: ."), "spec.runtimeEnvYAML: workingdir is no key of a runtime environment"),
    (ray_job(runtimeEnvYAML="pip: [a]\nuv: [b]"), "spec.runtimeEnvYAML: pip and uv both install packages"),
    (ray_job(preRunningDeadlineSeconds=0), "spec.preRunningDeadlineSeconds: 0 must be at least 1"),
    (ray_job(managedBy="me"), "spec.managedBy: 'me' is not"),
    (
        put(ray_job(), "metadata/labels", {"kueue.x-k8s.io/queue-name": "q"}),
        ": kueue.x-k8s.io/queue-name needs shutdownAfterJobFinishes",
    ),
]


@pytest.mark.parametrize(("document", "sentence"), WRONG, ids=[sentence[:50] for _, sentence in WRONG])
def test_what_is_wrong_is_said_with_its_place(document: object, sentence: str) -> None:
    assert any(one.startswith(sentence) for one in found(document)), found(document)


def test_every_rule_that_is_broken_is_said_at_once() -> None:
    said = found(ray_job(suspend=True, ttlSecondsAfterFinished=5, clusterSelector={"ray.io/cluster": "c"}))
    assert len(said) == 4, said


def test_every_document_of_a_file_is_checked(tmp_path: Path) -> None:
    file = tmp_path / "two.yaml"
    file.write_text("---\n".join(yaml.safe_dump(one) for one in (ray_cluster(), put(ray_job(), "spec/a", 1))))
    checked = check_file(file)
    assert checked.objects == 2
    (finding,) = checked.findings
    assert finding.line() == f"{file}, document 2 (RayJob j), spec.a: is no field here; remove it"


def test_the_items_of_a_list_are_checked_one_by_one() -> None:
    items = [ray_cluster(), put(ray_job(), "spec/a", 1)]
    checked = check_text(yaml.safe_dump({"apiVersion": "v1", "kind": "List", "items": items}), "f")
    assert checked.objects == 2
    (finding,) = checked.findings
    assert finding.line() == "f, document 1, item 2 (RayJob j), spec.a: is no field here; remove it"
    with pytest.raises(Refused, match="f holds no object"):
        check_text(yaml.safe_dump({"apiVersion": "v1", "kind": "List", "items": []}), "f")


def test_a_file_that_is_no_text_is_refused() -> None:
    with pytest.raises(Refused, match=r"^f is not UTF-8 text \(byte 6\): save it as UTF-8.$"):
        check_bytes(b"kind: \xff", "f")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: 1\na: 2\n", "f, line 2: a is written twice (lines 1 and 2)"),
        ("a: [1\n", "f, line 2:"),
        ("", "f holds no object"),
        ("!!python/object:os.system {}\n", "f, line 1:"),
    ],
)
def test_text_that_is_no_manifest_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(Refused) as refused:
        check_text(text, "f")
    assert str(refused.value).startswith(sentence)


def test_every_kind_says_its_own_name() -> None:
    for name, kind in KINDS.items():
        assert kind.model_fields["kind"].default == name
