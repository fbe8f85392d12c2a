"""What the sections derive from their keys, and the name of a run."""

from __future__ import annotations

import pytest

from tunefleet.data.settings import DataSettings
from tunefleet.recipe.owners import SECTIONS
from tunefleet.recipe.problems import RecipeError
from tunefleet.recipe.read import read_flat
from tunefleet.recipe.sections import LONGEST_NAME, RaySettings, RunSettings, slug
from tunefleet.training.settings import TrainingSettings
from tunefleet_strategies import registry

BASE: dict[str, object] = {"model_name_or_path": "base", "dataset": "rows.jsonl", "output_dir": "outputs/first"}


@pytest.mark.parametrize(
    ("output_dir", "name"),
    [
        *(("outputs/first", "outputs-first"), ("saves/llama3-8b/lora/sft/", "saves-llama3-8b-lora-sft")),
        *(
            ("../a b/c", "a-b-c"),
            ("/x/./y", "x-y"),
            ("~/runs/v1.2_b", "runs-v1.2_b"),
            ("..", ""),
            ("/", ""),
            ("größe", "gr-e"),
        ),
    ],
)
def test_a_run_is_named_after_its_folder(output_dir: str, name: str) -> None:
    assert slug(output_dir) == name


def test_long_names_are_cut_and_stay_apart() -> None:
    one, two = slug("a/" * 90 + "x"), slug("a/" * 90 + "y")
    assert one != two
    assert max(len(one), len(two)) <= LONGEST_NAME


def test_a_slug_is_itself_a_legal_run_name() -> None:
    for output_dir in ("outputs/first", "-x", ".hidden/_y", "a/" * 90):
        RaySettings(ray_run_name=slug(output_dir))


def test_a_written_run_name_wins() -> None:
    assert read_flat(BASE).run_name == "outputs-first"
    assert read_flat(BASE | {"ray_run_name": "mine"}).run_name == "mine"


def test_every_key_has_exactly_one_owner_and_is_described() -> None:
    owners = [*SECTIONS.values(), *registry.methods()]
    keys = [key for owner in owners for key in owner.model_fields]
    keys.remove("optimizer_backend")  # the one key that two methods have; it means the same in both
    assert len(keys) == len(set(keys))
    assert not {*keys} & registry.selector_keys()
    assert all(field.description for owner in owners for field in owner.model_fields.values())


def test_a_key_of_two_methods_is_the_same_in_both() -> None:
    both = [method.model_fields.get("optimizer_backend") for method in registry.methods()]
    first, second = ((field.annotation, field.default, field.description) for field in both if field is not None)
    assert first == second


def test_defaults_are_the_documented_ones() -> None:
    flat = read_flat(BASE).flat()
    documented = {
        "stage": "sft",
        "cutoff_len": 2048,
        "val_size": 0.0,
        "dataset_dir": "data",
        "packing": None,
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-5,
        "num_train_epochs": 3.0,
        "max_steps": -1,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "adam_epsilon": 1e-8,
        "seed": 42,
        "logging_steps": 10,
        "save_steps": 500,
        "save_strategy": "steps",
        "eval_strategy": "no",
        "plot_loss": True,
        "report_to": ["tensorboard"],
        "ray_num_workers": 1,
        "placement_strategy": "PACK",
        "max_failures": 3,
        "ray_storage_path": "~/tunefleet",
        "ddp_timeout": 1800,
        "finetuning_type": "lora",
        "bf16": None,
    }
    assert {key: flat[key] for key in documented} == documented


def test_packing_follows_the_stage_unless_written() -> None:
    def packs(**keys: object) -> bool:
        return DataSettings.model_validate({"dataset": "d", **keys}).packs

    assert (packs(), packs(stage="pt"), packs(neat_packing=True)) == (False, True, True)
    assert (packs(packing=True), packs(stage="pt", packing=False)) == (True, False)


def test_rows_to_evaluate_come_from_a_set_or_a_split() -> None:
    assert not DataSettings(dataset=("d",)).has_evaluation
    assert DataSettings(dataset=("d",), eval_dataset=("e",)).has_evaluation
    assert DataSettings(dataset=("d",), val_size=3).has_evaluation


def test_gradient_checkpointing_has_two_switches() -> None:
    assert not TrainingSettings().checkpoints_activations
    assert TrainingSettings(gradient_checkpointing=True).checkpoints_activations
    assert TrainingSettings(disable_gradient_checkpointing=False).checkpoints_activations
    assert not TrainingSettings(disable_gradient_checkpointing=True).checkpoints_activations


def test_derived_numbers() -> None:
    assert (TrainingSettings(seed=3).order_seed, TrainingSettings(seed=3, data_seed=0).order_seed) == (3, 0)
    assert (
        RunSettings(output_dir="o").evaluation_steps,
        RunSettings(output_dir="o", eval_steps=7).evaluation_steps,
    ) == (10, 7)
    assert (RunSettings(output_dir="o").tensorboard, RunSettings(output_dir="o", report_to=("none",)).tensorboard) == (
        True,
        False,
    )
    assert RaySettings(ray_num_workers=(1, 4)).max_workers == 4
    assert RaySettings(ray_num_workers=2).max_workers == 2


def test_ray_init_arguments_may_be_json_text() -> None:
    recipe = read_flat(BASE | {"ray_init_kwargs": '{"num_cpus": 2}'})
    assert recipe.ray.ray_init_kwargs == {"num_cpus": 2}


def test_the_metric_may_be_named_without_its_prefix() -> None:
    assert read_flat(BASE | {"metric_for_best_model": "loss"}).run.metric_for_best_model == "eval_loss"


# ---- no secret gets in -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["ray_storage_path", "resume_from_checkpoint"])
@pytest.mark.parametrize(
    "uri",
    [
        *(
            "s3://AKIA:hunter2@bucket/runs",
            "s3://hunter2@bucket/runs",
            "gs://hunter2@bucket/x",
            "hdfs://bob:hunter2@h/x",
        ),
        *("s3://bucket/runs?access_key=AKIA&secret_key=hunter2", "s3://bucket/runs?region=r&session_token=hunter2"),
        *("gs://bucket/x?hunter2", "hdfs://h:1/x?token=hunter2", "file:///x?password=hunter2"),
    ],
)
def test_a_uri_with_credentials_is_refused_and_not_shown(key: str, uri: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_flat({"model_name_or_path": "m", "dataset": "d", "output_dir": "o", key: uri})
    assert "hunter2" not in str(caught.value)
    assert "AKIA" not in str(caught.value)
    assert "environment" in str(caught.value)


@pytest.mark.parametrize(
    "name", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "HF_TOKEN", "WANDB_API_KEY", "MY_PASSWORD"]
)
def test_a_secret_in_the_workers_environment_is_refused_and_not_shown(name: str) -> None:
    keys: dict[str, object] = {"model_name_or_path": "m", "dataset": "d", "output_dir": "o"}
    with pytest.raises(RecipeError, match=name) as caught:
        read_flat(keys | {"ray_init_kwargs": {"runtime_env": {"env_vars": {name: "hunter2"}}}})
    assert "hunter2" not in str(caught.value)
    read_flat(keys | {"ray_init_kwargs": {"runtime_env": {"env_vars": {"TOKENIZERS_PARALLELISM": "false"}}}})


def test_a_secret_among_the_arguments_of_ray_is_refused_and_not_shown() -> None:
    keys: dict[str, object] = {"model_name_or_path": "m", "dataset": "d", "output_dir": "o"}
    with pytest.raises(RecipeError, match=r"sets _redis_password, a secret.*--secret NAME=SECRET:KEY") as caught:
        read_flat(keys | {"ray_init_kwargs": {"_redis_password": "hunter2"}})
    assert "hunter2" not in str(caught.value)
    read_flat(keys | {"ray_init_kwargs": {"object_store_memory": 10**8, "_temp_dir": "/scratch"}})


def test_several_gpus_of_a_worker_are_whole_ones() -> None:
    keys: dict[str, object] = {"model_name_or_path": "m", "dataset": "d", "output_dir": "o"}
    with pytest.raises(RecipeError, match=r"GPU: 1.5 is a fraction above 1, and Ray gives whole ones there; write 2"):
        read_flat(keys | {"resources_per_worker": {"GPU": 1.5}})
    for gpus in (0, 0.25, 1, 2.0):
        read_flat(keys | {"resources_per_worker": {"GPU": gpus, "CPU": 1.5}})
