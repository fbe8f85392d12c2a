"""Rendered manifests: over every shipped recipe and fifty drawn ones they are right, and say what the plan says."""

from __future__ import annotations

import io
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.kube.samples import Object, with_typo
from tests.launch.autoscaler import node_types, started_for
from tests.launch.recipes import some_recipe

from tunefleet import cli
from tunefleet.errors import Refused
from tunefleet.kube.check import check_document
from tunefleet.kube.documents import plain
from tunefleet.kube.ray import LONGEST_JOB_NAME
from tunefleet.kube.schemas import Schemas
from tunefleet.launch.manifest import ManifestOptions, job_name, manifest, render, secret_variable
from tunefleet.launch.pods import LEAVE_HEAD, LEAVE_WORKER
from tunefleet.recipe.read import read_flat
from tunefleet.recipe.sections import RaySettings
from tunefleet.recipe.tune import search_from
from tunefleet.search.onto_cluster import demand_of
from tunefleet.shapes import SINGLE_WORKER

JOBS = Path(__file__).resolve().parents[2] / "jobs"
SHIPPED = sorted(path for path in JOBS.glob("*.yaml") if path.name != "runtime_env.yaml")
CLAIM = "pvc://tunefleet"
MOVED = ["model_name_or_path=/mnt/tunefleet/base", "dataset_dir=/mnt/tunefleet/data"]
OPTIONS = ManifestOptions(image="registry.example/tunefleet:1", namespace="team-a")
CRDS = os.environ.get("TUNEFLEET_KUBERAY_CRDS")
QUEUED = ManifestOptions(image="registry.example/tunefleet:1", queue="team-a")


def rendered(path: Path, *words: str, storage: str = CLAIM, per_pod: int | None = None, **options: Any) -> list[Object]:
    demand, place = demand_of(path, list(words), storage, per_pod)
    return list(yaml.safe_load_all(render(demand, place, ManifestOptions(**{"image": "i", **options}))))


def written(tmp_path: Path, **keys: Any) -> Path:
    tmp_path.mkdir(exist_ok=True)
    path = tmp_path / "recipe.yaml"
    base = {"model_name_or_path": "org/model", "dataset": "org/rows", "output_dir": "outputs/a", "max_steps": 10}
    path.write_text(yaml.safe_dump({**base, **keys}))
    return path


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> list[list[Object]]:
    """The objects of every shipped recipe and of fifty drawn ones, each plain and queued."""
    folder, chance = tmp_path_factory.mktemp("recipes"), random.Random(6)
    paths = list(SHIPPED)
    for number in range(50):
        paths.append(folder / f"{number}.yaml")
        paths[-1].write_text(yaml.safe_dump(some_recipe(chance)))
    made = []
    for path in paths:
        demand, place = demand_of(path, MOVED if path in SHIPPED else [], CLAIM, None)
        made += [[plain(piece) for piece in manifest(demand, place, options)] for options in (OPTIONS, QUEUED)]
    return made


def test_every_rendered_manifest_is_right(jobs: list[list[Object]]) -> None:
    assert len(jobs) == 2 * (len(SHIPPED) + 50)
    for documents in jobs:
        assert [one["kind"] for one in documents] == ["ConfigMap", "NetworkPolicy", "RayJob"]
        for document in documents:
            assert list(check_document(document, "m")) == []


@pytest.mark.skipif(CRDS is None, reason="TUNEFLEET_KUBERAY_CRDS names no folder with KubeRay's CRD files")
def test_every_rendered_manifest_obeys_the_official_schema(jobs: list[list[Object]]) -> None:
    assert CRDS is not None
    schemas = Schemas(Path(CRDS))
    for _, _, job in jobs:
        assert schemas.problems(job) == []
    print(f"{len(jobs)} RayJobs checked against the official schema")


def test_a_typo_in_any_field_is_found(jobs: list[list[Object]]) -> None:
    chance = random.Random(0)
    for _ in range(300):
        spoiled, wrong = with_typo(chance.choice(chance.choice(jobs)), chance)
        said = list(check_document(spoiled, "m"))
        assert any(wrong in one.path or one.path in ("kind", "apiVersion") for one in said), (wrong, said)


def test_the_recipe_that_travels_is_the_one_that_was_given(jobs: list[list[Object]]) -> None:
    """What is in the ConfigMap is a recipe that the pods can read, with the numbers of the plan."""
    for config_map, _, job in jobs[::2]:
        keys = yaml.safe_load(config_map["data"]["recipe.yaml"])
        assert keys["ray_storage_path"] == "/mnt/tunefleet/runs"
        assert keys["ray_init_kwargs"] == {"runtime_env": {"py_modules": []}}  # the code is in the image
        if "tune" in keys:
            assert search_from(keys).tune.max_concurrent_trials != "auto"
            assert job["spec"]["entrypoint"] == "tunefleet tune /etc/tunefleet/recipe.yaml"
        else:
            assert read_flat(keys).ray.resources_per_worker
            assert job["spec"]["entrypoint"] == "tunefleet train /etc/tunefleet/recipe.yaml"


def test_pods_have_no_rights_and_say_how_they_are(jobs: list[list[Object]]) -> None:
    for _, _, document in jobs:
        job = document["spec"]
        cluster = job["rayClusterSpec"]
        workers = [group["template"] for group in cluster["workerGroupSpecs"]]
        pods = [cluster["headGroupSpec"]["template"], *workers]
        for pod in [*pods, job["submitterPodTemplate"]]:
            assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
            (container,) = pod["spec"]["containers"]
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert {"cpu", "memory"} <= set(container["resources"]["requests"])
        for pod in pods:
            (container,) = pod["spec"]["containers"]
            assert {"livenessProbe", "readinessProbe", "lifecycle"} <= set(container)
            assert pod["spec"]["terminationGracePeriodSeconds"] == 180
        assert all(pod["spec"]["automountServiceAccountToken"] is False for pod in workers)
        head_has_account = "automountServiceAccountToken" not in pods[0]["spec"]
        assert head_has_account == bool(cluster.get("enableInTreeAutoscaling"))
        assert cluster["authOptions"] == {"mode": "token"}


def test_a_run_has_the_pods_of_its_plan(tmp_path: Path) -> None:
    job = rendered(JOBS / "lora_sft.yaml", *MOVED, "resources_per_worker={GPU: 1, CPU: 4}")[2]
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert [group[key] for key in ("groupName", "replicas", "minReplicas", "maxReplicas")] == ["gpu-workers", 2, 2, 2]
    assert group["template"]["spec"]["containers"][0]["resources"]["limits"] == {
        "memory": "32Gi",
        "nvidia.com/gpu": "1",
    }
    types = node_types(job["spec"]["rayClusterSpec"])
    assert types["headgroup"]["resources"]["CPU"] == 0
    assert types["gpu-workers"]["resources"] | {"memory": 0} == {"CPU": 4, "GPU": 1, "memory": 0}
    assert types["gpu-workers"]["min_workers"] == types["gpu-workers"]["max_workers"] == 2
    assert "enableInTreeAutoscaling" not in job["spec"]["rayClusterSpec"]
    assert job["spec"]["backoffLimit"] == 3


@pytest.mark.parametrize(
    ("keys", "per_pod", "shape"),
    [
        ({"ray_num_workers": 8}, None, (8, 8, 8, 1)),
        ({"ray_num_workers": 8}, 4, (2, 2, 2, 4)),
        ({"ray_num_workers": 6}, 4, (2, 2, 2, 4)),
        ({"ray_num_workers": [2, 8]}, 2, (4, 1, 4, 2)),
        ({"ray_num_workers": 4, "placement_strategy": "STRICT_PACK"}, None, (1, 1, 1, 4)),
        ({"ray_num_workers": 1, "resources_per_worker": {"GPU": 0.5, "CPU": 1}}, None, (1, 1, 1, 1)),
        ({"ray_num_workers": 2, "resources_per_worker": {"CPU": 4}}, None, (2, 2, 2, 0)),
    ],
)
def test_workers_become_pods(
    tmp_path: Path, keys: dict[str, Any], per_pod: int | None, shape: tuple[int, int, int, int]
) -> None:
    job = rendered(written(tmp_path, **keys), storage="s3://bucket/runs", per_pod=per_pod)[2]
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    gpus = int(group["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", 0))
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"], gpus) == shape


BADAM = {"finetuning_type": "full", "use_badam": True, "badam_mode": {"choice": ["layer", "ratio"]}}


def search(tmp_path: Path, *space: dict[str, Any], **block: Any) -> Path:
    tune = {"metric": "eval_loss", "num_samples": 20, "space": list(space), **block}
    return written(tmp_path, ray_num_workers=2, val_size=0.1, eval_strategy="steps", bf16=True, tune=tune)


def test_a_search_has_pods_for_trials_of_every_size(tmp_path: Path) -> None:
    path = search(
        tmp_path, {"finetuning_type": "lora", "lora_rank": {"choice": [4, 8]}}, BADAM, max_concurrent_trials=5
    )
    config_map, _, job = rendered(path, storage="s3://bucket/runs")
    types = node_types(job["spec"]["rayClusterSpec"])
    sizes = {name: (one["min_workers"], one["max_workers"]) for name, one in types.items() if name != "headgroup"}
    assert sizes == {"gpu-workers": (0, 10), "gpu-single": (0, 5)}
    assert types["headgroup"]["resources"]["trial_driver"] == 5
    assert job["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"] is True
    assert yaml.safe_load(config_map["data"]["recipe.yaml"])["tune"]["max_concurrent_trials"] == 5


def test_the_recipe_of_a_search_says_what_its_groups_may_grow_to(tmp_path: Path) -> None:
    """Ray's autoscaler reads it from the groups and tells nobody; the search reads it from the recipe."""
    lora = {"finetuning_type": "lora", "lora_rank": {"choice": [4, 8]}}
    request = {"GPU": 1, "CPU": 2, "fast_disk": 1, "memory": 2**30}
    path = search(tmp_path, lora, BADAM, max_concurrent_trials=5)
    config_map, _, job = rendered(path, f"resources_per_worker={request}", storage="s3://bucket/runs", per_pod=2)
    written = RaySettings(ray_node_types=yaml.safe_load(config_map["data"]["recipe.yaml"])["ray_node_types"])
    assert written.ray_node_types is not None
    read = {name: one for name, one in node_types(job["spec"]["rayClusterSpec"]).items() if name != "headgroup"}
    assert set(written.ray_node_types) == set(read) == {"gpu-workers", "gpu-single"}
    for name, one in written.ray_node_types.items():
        known = {key: amount for key, amount in read[name]["resources"].items() if key != "memory"}
        assert (one.resources, one.max_workers, one.labels) == (known, read[name]["max_workers"], read[name]["labels"])
    assert written.ray_node_types["gpu-single"].labels == {SINGLE_WORKER: "true"}


def test_ray_starts_what_the_trials_of_a_search_ask_for(tmp_path: Path) -> None:
    """Trials of one worker get pods for one, also where pods for several workers would hold them."""
    path = search(
        tmp_path, {"finetuning_type": "lora", "lora_rank": {"choice": [4, 8]}}, BADAM, max_concurrent_trials=5
    )
    cluster = rendered(path, storage="s3://bucket/runs", per_pod=2)[2]["spec"]["rayClusterSpec"]
    one = {"GPU": 1.0, "CPU": 1.0}
    assert started_for(cluster, [[one, one]] * 3 + [[one]] * 2) == {"gpu-workers": 3, "gpu-single": 2}
    assert started_for(cluster, [[one, one]] * 5) == {"gpu-workers": 5}


def test_a_search_without_trials_of_one_worker_has_no_group_for_them(tmp_path: Path) -> None:
    path = search(tmp_path, {**BADAM, "badam_mode": "layer", "badam_switch_interval": {"choice": [5, 10]}})
    assert set(node_types(rendered(path, storage="s3://b/r")[2]["spec"]["rayClusterSpec"])) == {
        "headgroup",
        "gpu-workers",
    }


def test_branches_with_requests_of_their_own_have_groups_of_their_own(tmp_path: Path) -> None:
    lora = {"finetuning_type": "lora", "lora_rank": {"choice": [4, 8]}}
    path = search(tmp_path, lora, {**BADAM, "resources_per_worker": {"GPU": 2, "CPU": 8}}, max_concurrent_trials=2)
    types = node_types(rendered(path, storage="s3://b/r")[2]["spec"]["rayClusterSpec"])
    gpus = {name: (one["resources"].get("GPU"), one["max_workers"]) for name, one in types.items()}
    assert gpus == {
        "headgroup": (None, 0),
        "gpu-workers": (1, 4),
        "gpu-workers-2": (2, 4),
        "gpu-single": (2, 2),
    }


def test_a_search_that_would_be_refused_there_is_refused_here(tmp_path: Path) -> None:
    """Its nodes are still to come when it begins, so the number format must be written."""
    lora = {"finetuning_type": "lora", "lora_rank": {"choice": [4, 8]}}
    path = search(tmp_path, lora)
    assert node_types(rendered(path, storage="s3://b/r")[2]["spec"]["rayClusterSpec"])
    with pytest.raises(Refused, match=r"tune.space, lora: can never run: .* write bf16: true or bf16: false"):
        rendered(path, "bf16=null", storage="s3://b/r")
    assert rendered(path, "bf16=null", "resources_per_worker={CPU: 2}", storage="s3://b/r")


def test_a_queued_search_does_not_grow(tmp_path: Path) -> None:
    path = search(tmp_path, {"finetuning_type": "lora", "lora_rank": {"choice": [4, 8]}}, max_concurrent_trials=3)
    spec = rendered(path, storage="s3://b/r", queue="team")[2]["spec"]
    assert spec["suspend"] is spec["shutdownAfterJobFinishes"] is True
    assert "deletionStrategy" not in spec
    assert "enableInTreeAutoscaling" not in spec["rayClusterSpec"]
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == 6


def test_storage_is_mounted_or_reached(tmp_path: Path) -> None:
    path = written(tmp_path)
    mounted = rendered(path, storage="pvc://models/team/runs")
    assert yaml.safe_load(mounted[0]["data"]["recipe.yaml"])["ray_storage_path"] == "/mnt/tunefleet/team/runs"
    spec = mounted[2]["spec"]["rayClusterSpec"]
    for pod in (spec["headGroupSpec"]["template"], spec["workerGroupSpecs"][0]["template"]):
        assert {"name": "storage", "persistentVolumeClaim": {"claimName": "models"}} in pod["spec"]["volumes"]
    store = "s3://bucket/runs?endpoint_override=minio:9000&scheme=http"
    secret = secret_variable("AWS_SECRET_ACCESS_KEY=minio:secret")
    reached = rendered(path, storage=store, secrets=(secret,), service_account="trainer")
    assert {"port": 9000, "protocol": "TCP"} in reached[1]["spec"]["egress"][2]["ports"]
    worker = reached[2]["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]
    assert worker["serviceAccountName"] == "trainer"
    reference = {"secretKeyRef": {"name": "minio", "key": "secret"}}
    assert {"name": "AWS_SECRET_ACCESS_KEY", "valueFrom": reference} in worker["containers"][0]["env"]


@pytest.mark.parametrize(
    ("run", "name"),
    [
        ("outputs-first", "outputs-first"),
        ("Outputs_First", "outputs-first-"),
        ("7", "run-7"),
        ("a.b", "a-b"),
        ("x" * 100, "x" * 40 + "-"),
    ],
)
def test_a_job_is_named_after_its_run(run: str, name: str) -> None:
    made = job_name(run)
    assert made.startswith(name)
    assert len(made) <= LONGEST_JOB_NAME


def test_long_names_that_begin_alike_stay_apart() -> None:
    assert job_name("x" * 60 + "a") != job_name("x" * 60 + "b")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"name": "Mine"}, "--name Mine is no name of a RayJob"),
        ({"name": ""}, "--name '' is no name of a RayJob"),
        ({"memory": "lots"}, "--memory: 'lots' is no quantity"),
        ({"memory": "-4Gi"}, "--memory -4Gi is no memory of a pod"),
        ({"memory": "0"}, "--memory 0 is no memory of a pod"),
        ({"memory": "512Mi"}, "--memory 512Mi is no memory of a pod"),
        ({"memory": "100Ti"}, "--memory 100Ti is no memory of a pod"),
        ({"namespace": "Team A"}, "--namespace: 'Team A' is no name"),
        ({"namespace": ""}, "--namespace: '' is no name"),
        ({"queue": "a b"}, "--queue: 'a b' is no name"),
        ({"queue": ""}, "--queue: '' is no name"),
        ({"queue": "q" * 64}, "--queue: 'q{64}' is no value of a label; write up to 63"),
        ({"service_account": "Me"}, "--service-account: 'Me' is no name"),
        ({"image": ""}, "--image: '' is no image"),
        ({"image": "a b"}, "--image: 'a b' is no image"),
        ({"secrets": [secret_variable("A=s:k"), secret_variable("A=t:k")]}, "--secret names A twice"),
        ({"per_pod": 2}, "--workers-per-pod 2 does not go with ray_num_workers, which is 1 at most: write 1 or less"),
    ],
)
def test_options_that_are_none_are_refused(tmp_path: Path, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Refused, match=sentence):
        rendered(written(tmp_path), storage="s3://b/r", **options)


def test_a_search_fills_its_pods_too(tmp_path: Path) -> None:
    path = search(tmp_path, {"finetuning_type": "lora", "lora_rank": {"choice": [4, 8]}})
    assert rendered(path, storage="s3://b/r", per_pod=2)
    with pytest.raises(Refused, match="--workers-per-pod 3 does not go with ray_num_workers, which is 2 at most"):
        rendered(path, storage="s3://b/r", per_pod=3)


def test_a_recipe_that_no_configmap_holds_is_said_to_be_too_large(tmp_path: Path) -> None:
    path = written(tmp_path, ray_init_kwargs={"namespace": "x" * 2**20})
    with pytest.raises(Refused, match=r"The recipe is too large: it has 1,\d{3},\d{3} bytes"):
        rendered(path, storage="s3://b/r")


@pytest.mark.parametrize("name", ["PATH", "HOME", "PYTHONPATH", "LD_LIBRARY_PATH", "RAY_AUTH_TOKEN", "RAY_ADDRESS"])
def test_a_variable_that_pods_have_themselves_is_no_secret(name: str) -> None:
    with pytest.raises(Refused, match=f"--secret {name}=...: every pod has {name} of its own"):
        secret_variable(f"{name}=s:k")


@pytest.mark.parametrize(("queue", "said"), [(None, "minReplicas 0: without"), ("q", "a queued job keeps all of its")])
def test_the_reason_of_a_searchs_replicas_is_the_right_one(tmp_path: Path, queue: str | None, said: str) -> None:
    path = search(tmp_path, {"finetuning_type": "lora", "lora_rank": {"choice": [4, 8]}})
    demand, place = demand_of(path, [], "s3://b/r", None)
    text = render(demand, place, ManifestOptions("i", queue=queue), explain=True)
    reasons = [line for line in text.splitlines() if line.startswith("#")]
    assert any(said in line for line in reasons)
    assert any("minReplicas 0" in line for line in reasons) == (queue is None)


def test_a_secret_that_was_written_is_not_repeated() -> None:
    with pytest.raises(Refused) as refused:
        secret_variable("HF_TOKEN=hf_abcdef")
    assert "hf_abcdef" not in str(refused.value)


@pytest.mark.parametrize(
    "arguments",
    [
        {"_redis_password": "hunter2"},
        {"runtime_env": {"env_vars": {"DB_PASS": "hunter2"}}},
        {"runtime_env": {"env_vars": {"MLFLOW_TRACKING_URI": "http://u:hunter2@h:5000"}}},
        {"runtime_env": {"pip": ["git+https://hunter2@github.com/x/y"]}},
    ],
)
def test_no_secret_of_a_recipe_reaches_its_manifest(tmp_path: Path, arguments: dict[str, Any]) -> None:
    for path in (written(tmp_path / "run"), search(tmp_path / "search", {"lora_rank": {"choice": [4, 8]}})):
        path.write_text(path.read_text() + yaml.safe_dump({"ray_init_kwargs": arguments}))
        with pytest.raises(Refused, match=r"^ray_init_kwargs.*--secret NAME=SECRET:KEY") as refused:
            rendered(path, storage="s3://b/r")
        assert "hunter2" not in str(refused.value)
    harmless = {"runtime_env": {"env_vars": {"MLFLOW_TRACKING_URI": "http://h:5000"}, "pip": ["git+ssh://git@h/x"]}}
    assert rendered(written(tmp_path, ray_init_kwargs=harmless), storage="s3://b/r")


# ---- the command ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What the command printed, and its exit code."""

    code: int
    out: str
    err: str


Ask = Callable[..., Answer]


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Ask:
    """Gives the command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def give(*words: str | Path) -> Answer:
        monkeypatch.setattr(sys, "argv", ["tunefleet", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return Answer(int(caught.value.code or 0), *capfd.readouterr())

    return give


def test_the_command_prints_what_kubectl_takes(ask: Ask) -> None:
    answer = ask("manifest", JOBS / "lora_sft.yaml", *MOVED, "--storage", CLAIM, "--explain", "--image", "me/it:2")
    assert answer.code == 0, answer.err
    assert answer.out.startswith("# recipe: train, run quickstart-lora, kept under /mnt/tunefleet/runs\n")
    assert "# gpu-workers: replicas 2: ray_num_workers: 2, one on a pod" in answer.out
    documents = list(yaml.safe_load_all(answer.out))
    assert [one["kind"] for one in documents] == ["ConfigMap", "NetworkPolicy", "RayJob"]
    assert documents[2]["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["image"] == (
        "me/it:2"
    )


def test_the_command_checks_a_file(ask: Ask, tmp_path: Path) -> None:
    text = ask("manifest", JOBS / "lora_sft.yaml", *MOVED, "--storage", CLAIM).out
    file = tmp_path / "job.yaml"
    file.write_text(text)
    assert ask("manifest", "--check", file).code == 0
    file.write_text(text.replace("backoffLimit: 3", "backofLimit: 3"))
    answer = ask("manifest", "--check", file)
    assert answer.code == 2
    assert "spec.backofLimit: is no field here; did you mean backoffLimit?" in answer.err


def test_the_command_checks_what_it_is_given_on_standard_input(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    for text, code in (("kind: RayJub\n", 2), (ask("manifest", written(Path()), "--storage", CLAIM).out, 0)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        answer = ask("manifest", "--check", "-")
        assert (answer.code, answer.out.partition(":")[0]) == (code, "standard input")


@pytest.mark.parametrize(
    "words", [("--storage", CLAIM), ("--explain",), ("--memory", "4Gi"), ("--secret", "A=s:k"), ("--queue", "")]
)
def test_what_is_for_rendering_is_refused_beside_a_check(ask: Ask, words: tuple[str, ...]) -> None:
    answer = ask("manifest", "--check", "job.yaml", *words)
    assert (answer.code, answer.err.partition(" ")[0]) == (2, words[0])
    assert answer.err.endswith(f"leave out {words[0]}.\n")


def test_an_empty_image_is_none(ask: Ask) -> None:
    answer = ask("manifest", written(Path()), "--storage", CLAIM, "--image", "")
    assert (answer.code, answer.err.partition(";")[0]) == (2, "--image: '' is no image")


def test_the_command_wants_a_recipe_or_a_file(ask: Ask) -> None:
    answer = ask("manifest")
    assert answer.code == 2
    assert answer.err == "manifest takes a RECIPE, or --check FILE: name one of them.\n"
    assert ask("manifest", JOBS / "lora_sft.yaml", "--check", "job.yaml").err == answer.err
    assert "--crds is for --check FILE" in ask("manifest", JOBS / "lora_sft.yaml", "--crds", "crds").err


# ---- hooks ----------------------------------------------------------------------------------------------------------

ALONE = ["unshare", "-n", "-p", "-m", "-f", "--mount-proc", "--kill-child=KILL"]
"""A hook looks for processes by name, so here it may see none but its own."""
BASH = shutil.which("bash") or "/bin/bash"

DRIVER = """
import signal, sys, time
def stop(*_):
    time.sleep(1.5)
    open("saved", "w").close()
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
open("up", "w").close()
time.sleep(60)
"""


@pytest.fixture
def pod(tmp_path: Path) -> Path:
    """A folder with a `ray` that notes what it is called with, and a driver that takes a while to save and stop."""
    if subprocess.run([*ALONE, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no right to make a namespace of processes")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ray").write_text("#!/bin/bash\nls saved 2>&1 >> calls; echo $* >> calls\n")
    (tmp_path / "jobs").mkdir()
    for driver in ("bin/tunefleet", "tunefleet.py", "jobs/train.py"):
        (tmp_path / driver).write_text(DRIVER)
    (tmp_path / "bin" / "ray").chmod(0o755)
    return tmp_path


def run_in(pod: Path, before: str, hook: str) -> list[str]:
    """What `ray` was called with when a hook ran beside some process."""
    environment = {**os.environ, "PATH": f"{pod / 'bin'}:{os.environ['PATH']}"}
    command = [*ALONE, BASH, "-c", f'{before}; {BASH} -c "$1"', "pod", hook]
    subprocess.run(command, cwd=pod, env=environment, timeout=60, capture_output=True, check=True)
    return (pod / "calls").read_text().splitlines()


@pytest.mark.parametrize(
    "command",
    ["bin/tunefleet train /etc/r.yaml", "-m tunefleet tune recipe.yaml seed=1", "jobs/train.py jobs/lora_sft.yaml"],
)
def test_a_head_that_is_ended_waits_for_its_drivers_to_save(pod: Path, command: str) -> None:
    driver = f"{sys.executable} {command} & while [ ! -e up ]; do sleep 0.1; done"
    assert run_in(pod, driver, LEAVE_HEAD) == ["saved", "stop"]


def test_a_worker_that_is_ended_says_so_and_waits_for_its_run_to_leave(pod: Path) -> None:
    worker = f"{BASH} -c 'exec -a ray::RayTrainWorker.run {BASH} -c \"sleep 2; touch saved\"' & sleep 0.3"
    drained, *rest = [line for line in run_in(pod, worker, LEAVE_WORKER) if "No such file" not in line]
    assert drained.startswith("drain-node --reason DRAIN_NODE_REASON_PREEMPTION")
    assert rest == ["saved", "stop"]


@pytest.mark.parametrize("hook", [LEAVE_HEAD, LEAVE_WORKER], ids=["head", "worker"])
def test_a_pod_without_work_ends_at_once(pod: Path, hook: str) -> None:
    assert run_in(pod, "true", hook)[-1] == "stop"
