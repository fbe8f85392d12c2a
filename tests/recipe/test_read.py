"""Reading a recipe: every mistake at once, every key with its owner, overrides, round trips."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from tunefleet.errors import Refused
from tunefleet.recipe.problems import Problem, RecipeError
from tunefleet.recipe.read import read_flat, read_recipe
from tunefleet_strategies.badam import BAdam
from tunefleet_strategies.freeze import Freeze
from tunefleet_strategies.full import Full
from tunefleet_strategies.lora import Lora

BASE: dict[str, object] = {"model_name_or_path": "base", "dataset": "rows.jsonl", "output_dir": "outputs/first"}
FULL = BASE | {"finetuning_type": "full"}


def problems(keys: dict[str, object]) -> dict[str, Problem]:
    with pytest.raises(RecipeError) as caught:
        read_flat(keys)
    return {problem.key: problem for problem in caught.value.problems}


def only(keys: dict[str, object]) -> Problem:
    found = problems(keys)
    assert len(found) == 1, found
    return next(iter(found.values()))


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


TWELVE = """
finetuning_type: full
lerning_rate: 1e-4
lora_rank: 8
learning_rate: fast
num_train_epochs: -1
dataset: "a,,b"
optim: adafactor
save_steps: 1.5
bf16: true
fp16: true
quantization_bit: 4
seed: 1
seed: 2
do_eval: true
preprocessing_batch_size: 10
"""


def test_a_dozen_mistakes_are_reported_at_once_one_line_each(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        read_recipe(write(tmp_path, TWELVE), ["oops", "cutoff_len=0"])
    lines = str(caught.value).splitlines()
    assert sorted(problem.key for problem in caught.value.problems) == sorted(
        [
            *("lerning_rate", "lora_rank", "learning_rate", "num_train_epochs", "dataset", "optim", "save_steps"),
            *(
                "bf16",
                "quantization_bit",
                "seed",
                "do_eval",
                "`oops`",
                "cutoff_len",
                "model_name_or_path",
                "output_dir",
            ),
        ]
    )
    assert len(lines) == 15
    assert all("; " in line for line in lines), "a mend in each"
    assert "Input should be" not in str(caught.value)


def test_problems_come_in_the_order_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        read_recipe(write(tmp_path, "seed: x\nzzz: 1\nbf16: 3\n"))
    assert [p.key for p in caught.value.problems] == [
        *("seed", "zzz", "bf16", "model_name_or_path", "dataset", "output_dir"),
    ]


def test_an_error_is_refused_with_exit_code_two_and_survives_pickling() -> None:
    error = RecipeError([Problem("seed", "is odd", "write 2")])
    assert isinstance(error, Refused)
    assert pickle.loads(pickle.dumps(error)).problems == error.problems
    assert str(error) == "seed: is odd; write 2"


def test_the_method_defaults_to_lora() -> None:
    recipe = read_flat(BASE)
    assert isinstance(recipe.method, Lora)
    assert recipe.method.lora_rank == 8


@pytest.mark.parametrize(("name", "method"), [("full", Full), ("freeze", Freeze), ("lora", Lora)])
def test_a_recipe_round_trips_through_its_flat_form(name: str, method: type) -> None:
    recipe = read_flat(
        BASE
        | {"finetuning_type": name, "eval_dataset": ["x", "y"], "learning_rate": 1.1e-7, "ray_num_workers": [1, 3]}
        | {"resources_per_worker": {"CPU": 0.5}, "deepspeed": {"zero": [1, None]}, "resume_from_checkpoint": False}
        | {"report_to": "none", "packing": False, "ray_init_kwargs": {"runtime_env": {"env_vars": {"A": "b"}}}}
    )
    assert type(recipe.method) is method
    again = read_flat(recipe.flat(), written=recipe.written)
    assert again == recipe
    assert again.flat() == recipe.flat()
    assert again.written == recipe.written
    assert read_flat(recipe.flat()) == recipe
    assert {*recipe.flat()} >= {"optim", "finetuning_type", *method.model_fields}


def test_layer_ids_round_trip_though_they_clear_the_count() -> None:
    recipe = read_flat(BASE | {"finetuning_type": "freeze", "freeze_trainable_layer_ids": [3, 7]})
    assert recipe.flat()["freeze_trainable_layers"] is None
    assert read_flat(recipe.flat()) == recipe


def test_recipes_differ_where_a_key_differs() -> None:
    assert read_flat(BASE) != read_flat(BASE | {"seed": 1})
    assert read_flat(BASE) == read_flat(BASE | {"seed": 42})
    assert hash(read_flat(BASE)) == hash(read_flat(BASE | {"seed": 42}))


def test_a_recipe_is_frozen() -> None:
    with pytest.raises(ValidationError):
        read_flat(BASE).training.seed = 1  # type: ignore[misc]


def test_overrides_win_and_null_clears(tmp_path: Path) -> None:
    path = write(tmp_path, "model_name_or_path: m\ndataset: d\noutput_dir: o\nseed: 7\nlora_rank: 4\nmax_steps: 5\n")
    recipe = read_recipe(path, ["learning_rate=1E-3", "seed=null", "lora_target=q_proj,v_proj", "report_to=none"])
    assert recipe.training.learning_rate == 1e-3
    assert recipe.training.seed == 42
    assert isinstance(recipe.method, Lora)
    assert recipe.method.lora_target == ("q_proj", "v_proj")
    assert recipe.run.report_to == ("none",)
    assert recipe.written == {
        *("model_name_or_path", "dataset", "output_dir", "lora_rank", "max_steps"),
        *("learning_rate", "lora_target", "report_to"),
    }


def test_clearing_a_required_key_leaves_it_missing(tmp_path: Path) -> None:
    path = write(tmp_path, "model_name_or_path: m\ndataset: d\noutput_dir: o\n")
    with pytest.raises(RecipeError, match="dataset: is missing"):
        read_recipe(path, ["dataset=null"])


def test_an_unknown_key_is_refused_also_when_it_is_null() -> None:
    assert only(BASE | {"lora_rnk": None}).mend == "did you mean lora_rank (a key of lora)?"


def test_an_override_mends_a_value_that_could_not_be_read(tmp_path: Path) -> None:
    path = write(tmp_path, "model_name_or_path: m\ndataset: d\noutput_dir: o\nseed: !!python/name:os.system\n")
    with pytest.raises(RecipeError, match="seed: has a value that is not plain YAML"):
        read_recipe(path)
    assert read_recipe(path, ["seed=3"]).training.seed == 3


def test_a_missing_file_and_a_bad_override_are_told_together(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        read_recipe(tmp_path / "none.yaml", ["oops"])
    assert len(caught.value.problems) == 2


def test_a_foreign_key_says_whose_it_is_and_how_to_select_that_method() -> None:
    problem = only(FULL | {"lora_rank": 8})
    assert "belongs to lora" in problem.what
    assert "finetuning_type: full" in problem.what
    assert problem.mend == "remove lora_rank, or write finetuning_type: lora"


def test_a_key_of_a_switched_method_says_how_to_switch_it_on() -> None:
    problem = only(FULL | {"galore_rank": 8})
    assert "belongs to galore" in problem.what
    assert "use_galore: true" in problem.mend


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        *(("lerning_rate", "learning_rate"), ("LEARNING-RATE", "learning_rate"), ("lr", "learning_rate")),
        *(("batch_size", "per_device_train_batch_size"), ("galore_rnk", "galore_rank (a key of galore)")),
    ],
)
def test_an_unknown_key_gets_did_you_mean(key: str, meant: str) -> None:
    assert only(FULL | {key: 1}).mend == f"did you mean {meant}?"


def test_a_key_like_no_other_is_refused_without_a_guess() -> None:
    assert "did you mean" not in only(BASE | {"zzzzzz": 1}).mend


def test_galore_with_lora_is_refused_with_the_mend() -> None:
    problem = only(BASE | {"use_galore": True})
    assert "finetuning_type: full" in problem.mend


def test_badam_asks_for_full_tuning_and_stands_alone() -> None:
    assert "write finetuning_type: full" in only(BASE | {"use_badam": True}).mend
    assert "write finetuning_type: full" in only(BASE | {"finetuning_type": "freeze", "use_badam": True}).mend
    both = only(FULL | {"use_badam": True, "use_galore": True})
    assert "choose two methods at once" in both.what
    assert "keep one" in both.mend
    lora = only(FULL | {"use_badam": True, "lora_rank": 4})
    assert (lora.key, "belongs to lora" in lora.what) == ("lora_rank", True)


@pytest.mark.parametrize(
    ("keys", "mended"),
    [
        ({"use_galore": True}, {"finetuning_type": "full"}),
        ({"use_galore": True}, {"use_galore": None}),
        ({"use_badam": True}, {"finetuning_type": "full"}),
        ({"use_badam": True, "finetuning_type": "freeze"}, {"finetuning_type": "full"}),
        ({"use_badam": True, "finetuning_type": "freeze"}, {"use_badam": None}),
        ({"use_badam": True, "use_galore": True, "finetuning_type": "full"}, {"use_badam": None}),
        ({"use_badam": True, "use_galore": True, "finetuning_type": "full"}, {"use_galore": None}),
        ({"use_badam": True, "finetuning_type": "full", "lora_rank": 8}, {"lora_rank": None}),
        ({"use_galore": True, "finetuning_type": "full", "lora_rank": 8}, {"lora_rank": None}),
        ({"use_galore": True, "finetuning_type": "full", "badam_mode": "layer"}, {"badam_mode": None}),
    ],
)
def test_methods_that_do_not_go_together_are_refused_and_the_mend_is_read(
    keys: dict[str, object], mended: dict[str, object]
) -> None:
    problem = only(BASE | keys)
    named = [f"{key}: {value}" if value is not None else key for key, value in mended.items()]
    assert all(name in problem.mend for name in named) or "keep one of them" in problem.mend
    read_flat(BASE | keys | mended)


@pytest.mark.parametrize(
    ("keys", "idle"),
    [
        ({"badam_switch_mode": "random", "badam_start_block": 1}, []),
        ({"badam_update_ratio": 0.1}, ["badam_update_ratio: not used, because badam_mode is layer"]),
        ({"badam_mode": "ratio", "badam_update_ratio": 0.1, "badam_switch_interval": 5}, []),
        ({"badam_mode": "ratio", "badam_start_block": 1}, ["badam_start_block: not used, because badam_mode is ratio"]),
        (
            {"optimizer_backend": "upstream", "badam_verbose": 1},
            ["badam_verbose: not used, because optimizer_backend is upstream, which prints in the worker's own log"],
        ),
    ],
)
def test_a_written_key_of_the_other_mode_is_told(keys: dict[str, object], idle: list[str]) -> None:
    recipe = read_flat(FULL | {"use_badam": True} | keys)
    assert [*recipe.notices] == idle
    assert read_flat(recipe.flat(), written=()).notices == ()


@pytest.mark.parametrize(
    ("keys", "key", "mend"),
    [
        ({"badam_switch_interval": 0}, "badam_switch_interval", "-1 to never switch"),
        ({"badam_switch_interval": 2.5}, "badam_switch_interval", "badam_switch_interval: 50"),
        ({"badam_mode": "layers"}, "badam_mode", "did you mean badam_mode: layer?"),
        ({"badam_verbose": 3}, "badam_verbose", "badam_verbose: 0"),
        ({"optimizer_backend": "upstream", "badam_switch_interval": -1}, "badam_switch_interval", "native"),
    ],
)
def test_wrong_values_of_badam_come_with_their_mend(keys: dict[str, object], key: str, mend: str) -> None:
    problem = only(FULL | {"use_badam": True} | keys)
    assert problem.key == key
    assert mend in problem.mend


def test_null_stands_for_the_documented_interval() -> None:
    method = read_flat(FULL | {"use_badam": True, "badam_switch_interval": None, "badam_switch_mode": None}).method
    assert isinstance(method, BAdam)
    assert (method.badam_switch_interval, method.badam_switch_mode) == (50, "ascending")


def test_values_of_methods_are_checked_even_if_the_method_is_misspelt() -> None:
    found = problems(BASE | {"finetuning_type": "lorra", "lora_rank": 0, "freeze_trainable_layers": 1.5})
    assert {*found} == {"finetuning_type", "lora_rank", "freeze_trainable_layers"}


def test_rules_of_a_method_are_told_beside_its_wrong_values() -> None:
    found = problems(BASE | {"lora_rank": 0, "pissa_convert": True})
    assert {*found} == {"lora_rank", "pissa_convert"}


def test_a_fraction_of_warmup_steps_is_a_ratio() -> None:
    recipe = read_flat(BASE | {"warmup_steps": 0.1})
    assert (recipe.training.warmup_ratio, recipe.training.warmup_steps) == (0.1, 0)
    assert "read as warmup_ratio: 0.1" in recipe.notices[0]
    assert only(BASE | {"warmup_steps": 0.1, "warmup_ratio": 0.2}).key == "warmup_steps"


def test_reading_a_recipe_imports_none_of_the_heavy_packages(tmp_path: Path) -> None:
    """Whoever only reads recipes (`plan`, `schema`, an editor) should not wait for them."""
    path = write(tmp_path, "model_name_or_path: m\ndataset: d\noutput_dir: o\n")
    code = f"""
import sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
from tunefleet.recipe.read import read_recipe
read_recipe(Path({str(path)!r}))
print(sorted({{"ray", "peft", "transformers", "datasets", "deepspeed"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_home_that_this_machine_does_not_know_is_told_for_every_key() -> None:
    with pytest.raises(RecipeError) as caught:
        read_flat({"model_name_or_path": "~nobody-here/m", "dataset": "a", "output_dir": "~nobody-here/out"})
    assert [problem.key for problem in caught.value.problems] == ["model_name_or_path", "output_dir"]
    assert "a user whom this machine does not know" in caught.value.problems[0].what
