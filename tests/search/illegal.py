"""Random spaces that break one rule each: whatever else is in them is right."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

Block = dict[str, Any]

BASE: dict[str, object] = {
    "model_name_or_path": "model",
    "dataset": "rows.jsonl",
    "eval_dataset": "held_out.jsonl",
    "eval_strategy": "steps",
    "eval_steps": 10,
    "max_steps": 100,
    "output_dir": "out",
    "ray_num_workers": 2,
}
FORMS: tuple[Block, ...] = (
    {"finetuning_type": "lora"},
    {"finetuning_type": "full"},
    {"finetuning_type": "freeze"},
    {"finetuning_type": "full", "use_galore": True},
    {"finetuning_type": "full", "use_badam": True},
)
OWN: dict[str, Block] = {
    "lora": {"lora_rank": {"choice": [4, 8, 16]}, "use_dora": {"choice": [True, False]}},
    "freeze": {"freeze_trainable_layers": {"randint": [1, 4]}},
    "galore": {"galore_rank": {"choice": [32, 64]}, "galore_update_interval": {"randint": [20, 200]}},
    "badam": {"badam_mode": {"choice": ["layer", "ratio"]}, "badam_switch_interval": {"randint": [10, 100]}},
}
SHARED: Block = {
    "learning_rate": {"loguniform": [1e-5, 1e-3]},
    "weight_decay": {"uniform": [0, 0.1]},
    "adam_beta2": {"choice": [0.98, 0.999]},
    "warmup_ratio": {"quniform": [0, 0.1, 0.02]},
}


def method_of(form: Block) -> str:
    return "galore" if "use_galore" in form else "badam" if "use_badam" in form else str(form["finetuning_type"])


def legal_branch(chance: random.Random, form: Block | None = None) -> Block:
    """A branch that is all right."""
    form = form or chance.choice(FORMS)
    pool = {**OWN.get(method_of(form), {}), **SHARED}
    keys = chance.sample(sorted(pool), chance.randint(1, len(pool)))
    return {**form, **{key: pool[key] for key in keys}}


def legal_space(chance: random.Random) -> list[Block]:
    return [legal_branch(chance) for _ in range(chance.randint(1, 4))]


def _into(chance: random.Random, **keys: object) -> tuple[list[Block], Block]:
    """A legal space with keys laid over one of its branches."""
    space = legal_space(chance)
    space[chance.randrange(len(space))].update(keys)
    return space, {}


def _bad_domain(chance: random.Random) -> tuple[list[Block], Block]:
    low = chance.uniform(0.1, 1.0)
    wrong: Sequence[object] = (
        {"choise": [1e-4]},
        {"choice": []},
        {"choice": 1e-4},
        {"choice": [1e-4, 1e-4]},
        {"choice": [1e-4, None]},
        {"uniform": [low]},
        {"uniform": [low, low / 2]},
        {"uniform": ["a", "b"]},
        {"loguniform": [-low, low]},
        {"loguniform": [0, low]},
        {"randint": [1, 4, 8]},
        {"randint": [0.5, 4]},
        {"quniform": [low, low + 1]},
        {"quniform": [low, low + 1, 7]},
        {"uniform": [low, 1], "choice": [low]},
        {},
        [1e-4, 1e-3],
    )
    return _into(chance, learning_rate=chance.choice(wrong))


def _bad_value(chance: random.Random) -> tuple[list[Block], Block]:
    keys: Sequence[Block] = (
        {"learning_rate": {"choice": [1e-4, -1.0]}},
        {"learning_rate": {"uniform": [-1.0, 1e-3]}},
        {"weight_decay": {"choice": ["much", 0.1]}},
        {"adam_beta1": {"uniform": [0.5, 1.5]}},
        {"lr_scheduler_type": {"choice": ["cosine", "cosinus"]}},
        {"warmup_steps": {"uniform": [0, 10]}},
        {"max_grad_norm": -1},
        {"optim": "adam"},
    )
    return _into(chance, **chance.choice(keys))


def _foreign(chance: random.Random) -> tuple[list[Block], Block]:
    form = chance.choice(FORMS)
    others = sorted(set(OWN) - {method_of(form)})
    key, domain = chance.choice(sorted(OWN[chance.choice(others)].items()))
    return [*legal_space(chance), {**legal_branch(chance, form), key: domain}], {}


def _same_for_all(chance: random.Random) -> tuple[list[Block], Block]:
    keys: Block = {
        "max_steps": {"randint": [10, 100]},
        "per_device_train_batch_size": {"choice": [2, 4]},
        "gradient_accumulation_steps": 2,
        "cutoff_len": {"choice": [64, 128]},
        "dataset": "other.jsonl",
        "output_dir": "elsewhere",
        "model_name_or_path": {"choice": ["a", "b"]},
        "seed": {"randint": [0, 10]},
        "eval_steps": 5,
        "ray_storage_path": "elsewhere",
    }
    key = chance.choice(sorted(keys))
    return _into(chance, **{key: keys[key]})


def _no_key(chance: random.Random) -> tuple[list[Block], Block]:
    return _into(chance, **{chance.choice(["learning_rat", "rank", "lr", "galore_rnak", "zzz"]): {"choice": [1, 2]}})


def _no_method(chance: random.Random) -> tuple[list[Block], Block]:
    wrong: Sequence[Block] = (
        {"finetuning_type": "lora", "use_galore": True},
        {"finetuning_type": "full", "use_galore": True, "use_badam": True},
        {"finetuning_type": "qlora"},
        {"finetuning_type": {"choice": ["lora", "full"]}},
        {"finetuning_type": "full", "use_galore": {"choice": [True, False]}},
    )
    return [*legal_space(chance), {**chance.choice(wrong), "learning_rate": {"choice": [1e-4, 1e-3]}}], {}


def _never_runs(chance: random.Random) -> tuple[list[Block], Block]:
    wrong: Sequence[Block] = (
        {"bf16": True, "fp16": True},
        {"pure_bf16": True, "bf16": False},
        {"pure_bf16": True, "bf16": {"choice": [False]}},
        {"fp16": True, "pure_bf16": True},
    )
    return _into(chance, **chance.choice(wrong))


def _two_things_at_once(chance: random.Random) -> tuple[list[Block], Block]:
    switch: object = chance.choice([True, {"choice": [True, False]}])
    branch = {"finetuning_type": "lora", "lora_rank": {"choice": [4, 8]}, "use_rslora": switch}
    return [*legal_space(chance), branch], {}


def _no_grid(chance: random.Random) -> tuple[list[Block], Block]:
    key = chance.choice(["learning_rate", "weight_decay"])
    branch = {**chance.choice(FORMS), key: SHARED[key]}
    return [branch], {"search": "grid"}


def _no_bohb(chance: random.Random) -> tuple[list[Block], Block]:
    return [legal_branch(chance), legal_branch(chance)], {"search": "bohb", "scheduler": "hyperband"}


def _no_metric(chance: random.Random) -> tuple[list[Block], Block]:
    return legal_space(chance), {"metric": chance.choice(["accuracy", "val_loss", "evalloss"])}


def _no_tournament(chance: random.Random) -> tuple[list[Block], Block]:
    return [legal_branch(chance)], {"tournament": True, "num_samples": chance.randint(1, 9)}


def _no_population(chance: random.Random) -> tuple[list[Block], Block]:
    """A branch whose values cannot change on the way, among others."""
    form = chance.choice(FORMS)
    stays = {**form, "adam_beta2": {"choice": [0.98, 0.999]}}
    changes = {**chance.choice(FORMS), "learning_rate": {"loguniform": [1e-5, 1e-3]}}
    space = [stays, *([changes] * chance.randint(0, 2))]
    chance.shuffle(space)
    return space, {"scheduler": "pbt", "num_samples": 4 * len(space)}


RULES: dict[str, Callable[[random.Random], tuple[list[Block], Block]]] = {
    "domain": _bad_domain,
    "value": _bad_value,
    "foreign": _foreign,
    "same for all": _same_for_all,
    "no key": _no_key,
    "no method": _no_method,
    "never runs": _never_runs,
    "two things": _two_things_at_once,
    "grid": _no_grid,
    "bohb": _no_bohb,
    "metric": _no_metric,
    "tournament": _no_tournament,
    "pbt": _no_population,
}
NAMES: dict[str, str] = {
    "domain": "learning_rate: ",
    "foreign": "belongs to ",
    "same for all": "is the same for every trial",
    "no key": "is no key of a recipe",
    "never runs": "can never run: ",
    "two things": "would search two things at once",
    "grid": "no grid goes through them",
    "bohb": "bohb knows no branches",
    "metric": "is no figure that runs report",
    "tournament": "compares methods, and tune.space has one branch",
    "pbt": "searches nothing that pbt may change on the way",
}
"""Words of the sentence that names a rule."""
