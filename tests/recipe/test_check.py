"""Types, choices, ranges and list pieces, in plain words."""

from __future__ import annotations

import pytest

from tunefleet.recipe.problems import RecipeError
from tunefleet.recipe.read import read_flat

BASE: dict[str, object] = {"model_name_or_path": "base", "dataset": "rows.jsonl", "output_dir": "outputs/first"}


def line(key: str, value: object) -> str:
    with pytest.raises(RecipeError) as caught:
        read_flat(BASE | {key: value})
    assert [problem.key for problem in caught.value.problems] == [key]
    text = str(caught.value)
    assert "\n" not in text
    assert "should be" not in text
    assert "pydantic" not in text
    return text


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("seed", True, "true is not a whole number"),
        ("seed", "x", "'x' is not a whole number"),
        ("seed", "42", "'42' is text; write 42 without the quotes"),
        ("seed", 1.5, "1.5 is not a whole number"),
        ("seed", [1], "[1] is not a whole number"),
        ("seed", 2**32, "is too large; write at most 4294967295"),
        ("bf16", 1, "1 is not true or false"),
        ("bf16", "yes please", "is not true or false"),
        ("learning_rate", "1e", "'1e' is not a number"),
        ("learning_rate", False, "false is not a number"),
        ("learning_rate", 0, "0 must be greater than 0"),
        ("max_steps", 1e30, "is too large; write at most 4294967295"),
        ("cutoff_len", 10**24, "is too large; write at most 4294967295"),
        ("learning_rate", float("nan"), "nan is not a number to train with"),
        ("learning_rate", float("inf"), "inf is not a number to train with"),
        ("output_dir", 7, "7 is not text; write '7' with the quotes"),
        ("output_dir", "", "is empty"),
        ("model_name_or_path", True, "true is not text"),
        ("template", {"a": 1}, "is not text"),
        ("lora_rank", 0, "0 must be at least 1; write for example lora_rank: 8"),
        ("lora_dropout", 1.0, "1.0 must be less than 1"),
        ("lora_dropout", -0.1, "-0.1 must be at least 0"),
        ("lora_target", "q_proj,", "has an empty piece"),
        ("lora_target", "all,q_proj", "stands for every name"),
        ("dataset", "a,,b", "has an empty piece"),
        ("dataset", ["a", ""], "has an empty piece"),
        ("dataset", ["a", 3], "piece 2: 3 is not text"),
        ("dataset", [], "is empty"),
        ("dataset", "a,b,a", "names a twice"),
        ("stage", "dpo", "'dpo' is not sft or pt"),
        ("optim", "adamw_bnb_8bit", "did you mean optim: adamw_8bit?"),
        ("lr_scheduler_type", "cosin", "did you mean lr_scheduler_type: cosine?"),
        ("lr_scheduler_type", "cosine_with_min_lr", "is not linear, cosine"),
        ("eval_strategy", "step", "did you mean eval_strategy: steps?"),
        ("save_strategy", "best", "is not no, steps or epoch"),
        ("save_steps", 0.5, "0.5 is not a whole number"),
        ("max_steps", 0, "would train nothing"),
        ("max_steps", -2, "must be at least -1"),
        ("val_size", 10.5, "is neither a fraction nor a count"),
        ("warmup_ratio", 1.1, "must be at most 1"),
        ("report_to", "swanlab", "swanlab is not there yet; write report_to: tensorboard, mlflow, wandb"),
        ("report_to", "none,tensorboard", "none cannot stand beside others"),
        ("report_to", "paper", "paper is no place for metrics"),
        ("metric_for_best_model", "accuracy", "is not eval_loss"),
        ("ray_num_workers", 0, "takes at least one worker"),
        ("ray_num_workers", [4, 1], "is [least, most]"),
        ("ray_num_workers", [1, 2, 3], "is [least, most]"),
        ("ray_num_workers", True, "true is not a whole number or a list"),
        ("ray_num_workers", "two", "is no number of workers"),
        ("resources_per_worker", {"GPU": -1}, "GPU: -1 must be at least 0"),
        ("resources_per_worker", {"GPU": "one"}, "GPU: 'one' is not a number"),
        ("resources_per_worker", {"cpu": 1}, "cpu is no resource of Ray's: write CPU"),
        ("placement_strategy", "PACKED", "did you mean placement_strategy: PACK?"),
        ("ray_init_kwargs", "{", "is text that is not JSON"),
        ("elastic_resize_monitor_interval_s", 5, "5 must be at least 25"),
        ("ray_run_name", "a/b", "has characters or a length"),
        ("deepspeed", 7, "7 is not text or a mapping"),
        ("resume_from_checkpoint", 3, "3 is not true or false or text"),
    ],
)
def test_a_wrong_value_is_told_in_plain_words(key: str, value: object, said: str) -> None:
    assert said in line(key, value)


@pytest.mark.parametrize("value", ["x" * 10_000, ["x" * 500] * 500, {"a": {"b": {"c": ["d" * 900]}}}])
def test_long_values_are_shortened(value: object) -> None:
    assert len(line("seed", value)) < 300


def test_a_line_break_in_a_value_stays_in_its_line() -> None:
    assert "\n" not in line("stage", "a\nb")


def test_a_bare_no_is_the_word_where_that_is_a_choice() -> None:
    recipe = read_flat(BASE | {"eval_strategy": False, "save_strategy": False})
    assert (recipe.run.eval_strategy, recipe.run.save_strategy) == ("no", "no")


def test_a_whole_fraction_is_a_whole_number() -> None:
    steps = read_flat(BASE | {"save_steps": 1e3}).run.save_steps
    assert steps == 1000
    assert isinstance(steps, int)


@pytest.mark.parametrize("value", ["a, b", ["a", "b"], ("a", " b")])
def test_lists_are_text_with_commas_or_yaml_lists(value: object) -> None:
    assert read_flat(BASE | {"dataset": value}).data.dataset == ("a", "b")
