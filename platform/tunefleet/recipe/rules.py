"""Rules between keys of a recipe. Each names both keys and the nearest recipe that would run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tunefleet.recipe.problems import Problem, shown
from tunefleet.recipe.sections import slug


@dataclass(frozen=True)
class Values:
    """Every key whose value is good, as written or by default; keys of methods only if the recipe has that method."""

    values: Mapping[str, object]
    written: frozenset[str]

    def on(self, key: str) -> bool:
        """Whether a switch is on, or a list, text or number says anything."""
        return bool(self.values[key])

    def number(self, key: str) -> float:
        """The value of a key whose owner takes numbers only."""
        value = self.values[key]
        assert isinstance(value, int | float)
        return value

    def text(self, key: str) -> str:
        """The value of a key as it is written."""
        return str(self.values[key])


def _two_formats(v: Values) -> Problem | None:
    rival = "bf16" if v.on("bf16") else "pure_bf16"
    if not (v.on("fp16") and v.on(rival)):
        return None
    what = f"{rival}: true and fp16: true ask for two number formats"
    return Problem(rival, what, f"remove fp16 and keep {rival}: true")


def _half_pure(v: Values) -> Problem | None:
    if not (v.on("pure_bf16") and v.values["bf16"] is False):
        return None
    what = "pure_bf16: true asks for bf16 weights and bf16: false for fp32 ones"
    return Problem("pure_bf16", what, "remove bf16 to keep pure_bf16: true")


def _asks_evaluation(v: Values) -> str | None:
    """The key that asks for an evaluation, as it stands."""
    if v.on("do_eval"):
        return "do_eval: true"
    if v.text("eval_strategy") != "no":
        return f"eval_strategy: {v.text('eval_strategy')}"
    if v.on("eval_on_start"):
        return "eval_on_start: true"
    return "load_best_model_at_end: true" if v.on("load_best_model_at_end") else None


def _nothing_to_evaluate(v: Values) -> Problem | None:
    asked = _asks_evaluation(v)
    if asked is None or v.on("eval_dataset") or v.on("val_size"):
        return None
    what = f"{asked} asks for an evaluation and neither eval_dataset nor val_size gives it rows"
    return Problem(asked.partition(":")[0], what, "write val_size: 0.1, or name an eval_dataset")


def _two_evaluation_sets(v: Values) -> Problem | None:
    if not (v.on("eval_dataset") and v.on("val_size")):
        return None
    return Problem("val_size", "val_size and eval_dataset both give the rows to evaluate on", "keep one of them")


def _best_needs_evaluation(v: Values) -> Problem | None:
    if not v.on("load_best_model_at_end"):
        return None
    evaluated, saved = v.text("eval_strategy"), v.text("save_strategy")
    if evaluated == saved != "no":
        return None
    wanted = saved if saved != "no" else "steps"
    what = f"load_best_model_at_end: true needs every checkpoint evaluated, but eval_strategy is {evaluated} and "
    what += f"save_strategy is {saved}"
    return Problem("load_best_model_at_end", what, f"write eval_strategy: {wanted} and save_strategy: {wanted}")


def _best_needs_multiples(v: Values) -> Problem | None:
    if not v.on("load_best_model_at_end") or not v.text("eval_strategy") == v.text("save_strategy") == "steps":
        return None
    key = "eval_steps" if v.on("eval_steps") else "logging_steps"
    saved, evaluated = int(v.number("save_steps")), int(v.number(key))
    if saved % evaluated == 0:
        return None
    what = f"save_steps: {saved} is no multiple of {key}: {evaluated}, which load_best_model_at_end needs"
    nearest = max(evaluated, round(saved / evaluated) * evaluated)
    return Problem("save_steps", what, f"write save_steps: {nearest}")


def _masks_for_answers(key: str) -> Callable[[Values], Problem | None]:
    def rule(v: Values) -> Problem | None:
        if not v.on(key) or v.text("stage") == "sft":
            return None
        mend = "write packing: true" if key == "neat_packing" else f"remove {key}, or write stage: sft"
        return Problem(key, f"{key}: true is for stage: sft, and this recipe has stage: pt", mend)

    return rule


def _prompt_and_history(v: Values) -> Problem | None:
    if not (v.on("train_on_prompt") and v.on("mask_history")):
        return None
    what = "train_on_prompt: true learns every token and mask_history: true the last answer only"
    return Problem("train_on_prompt", what, "keep one of them")


def _packing_and_not(v: Values) -> Problem | None:
    if not (v.on("neat_packing") and v.values["packing"] is False):
        return None
    return Problem("neat_packing", "neat_packing: true packs and packing: false does not", "remove packing")


def _no_training(v: Values) -> Problem | None:
    if v.on("do_train"):
        return None
    return Problem("do_train", "false leaves nothing to do, because a recipe is a training run", "write do_train: true")


def _checkpointing_and_not(v: Values) -> Problem | None:
    disable = v.values["disable_gradient_checkpointing"]
    enable = v.values["gradient_checkpointing"]
    if disable is None or "gradient_checkpointing" not in v.written or enable is not disable:
        return None
    what = f"gradient_checkpointing: {shown(enable)} and disable_gradient_checkpointing: {shown(disable)} contradict "
    what += "each other"
    return Problem("gradient_checkpointing", what, "remove disable_gradient_checkpointing")


def _adapter_without_base(v: Values) -> Problem | None:
    if not v.on("create_new_adapter") or v.on("adapter_name_or_path"):
        return None
    what = "create_new_adapter: true starts on top of an adapter, and adapter_name_or_path names none"
    return Problem("create_new_adapter", what, "remove create_new_adapter, or name the adapter in adapter_name_or_path")


def _two_shardings(v: Values) -> Problem | None:
    if v.text("sharding") == "none" or v.values["deepspeed"] is None:
        return None
    what = f"sharding: {v.text('sharding')} and deepspeed both share the model out"
    return Problem("sharding", what, "keep one of them")


def _nameless(v: Values) -> Problem | None:
    if v.on("ray_run_name") or slug(v.text("output_dir")):
        return None
    what = f"output_dir: {v.text('output_dir')} gives the run no name, and ray_run_name is not written"
    return Problem("output_dir", what, "write output_dir: outputs/first, or a ray_run_name")


Rule = tuple[tuple[str, ...], Callable[[Values], Problem | None]]

RULES: tuple[Rule, ...] = (
    (("do_train",), _no_training),
    (("bf16", "pure_bf16", "fp16"), _two_formats),
    (("bf16", "pure_bf16"), _half_pure),
    (
        ("do_eval", "eval_strategy", "eval_on_start", "load_best_model_at_end", "eval_dataset", "val_size"),
        _nothing_to_evaluate,
    ),
    (("eval_dataset", "val_size"), _two_evaluation_sets),
    (("load_best_model_at_end", "eval_strategy", "save_strategy"), _best_needs_evaluation),
    (
        ("load_best_model_at_end", "eval_strategy", "save_strategy", "eval_steps", "save_steps", "logging_steps"),
        _best_needs_multiples,
    ),
    (("neat_packing", "stage"), _masks_for_answers("neat_packing")),
    (("train_on_prompt", "stage"), _masks_for_answers("train_on_prompt")),
    (("mask_history", "stage"), _masks_for_answers("mask_history")),
    (("train_on_prompt", "mask_history"), _prompt_and_history),
    (("neat_packing", "packing"), _packing_and_not),
    (("gradient_checkpointing", "disable_gradient_checkpointing"), _checkpointing_and_not),
    (("create_new_adapter", "adapter_name_or_path"), _adapter_without_base),
    (("sharding", "deepspeed"), _two_shardings),
    (("output_dir", "ray_run_name"), _nameless),
)
"""The keys that a rule reads, and the rule. It is passed over where one of them is absent or wrong in itself."""


def problems(v: Values) -> list[Problem]:
    """Every rule that the values break."""
    found = (rule(v) for needs, rule in RULES if v.values.keys() >= set(needs))
    return [problem for problem in found if problem is not None]


def notices(v: Values) -> list[str]:
    """What a person may have meant otherwise. Every key must be good."""
    said: list[str] = []
    if v.on("warmup_ratio") and v.on("warmup_steps"):
        said.append(f"warmup_steps: {v.text('warmup_steps')} wins over warmup_ratio: {v.text('warmup_ratio')}")
    if v.number("max_steps") > 0 and "num_train_epochs" in v.written:
        said.append(f"max_steps: {v.text('max_steps')} wins over num_train_epochs: {v.text('num_train_epochs')}")
    if "eval_steps" in v.written and v.text("eval_strategy") != "steps":
        said.append(f"eval_steps: not used, because eval_strategy is {v.text('eval_strategy')}")
    if "save_steps" in v.written and v.text("save_strategy") != "steps":
        said.append(f"save_steps: not used, because save_strategy is {v.text('save_strategy')}")
    if (v.on("eval_dataset") or v.on("val_size")) and _asks_evaluation(v) is None:
        said.append("eval_dataset or val_size sets rows aside and nothing evaluates them; eval_strategy: steps would")
    if v.text("stage") == "pt" and v.on("template"):
        said.append(f"template: {v.text('template')} is not used, because stage: pt learns plain text")
    if v.values["disable_gradient_checkpointing"] is False and not v.on("gradient_checkpointing"):
        said.append("disable_gradient_checkpointing: false turns gradient checkpointing on; remove it for more speed")
    return said
