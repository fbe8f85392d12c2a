"""Random recipes that are right, of runs and of searches, as somebody would bring them to a cluster."""

from __future__ import annotations

import random
from typing import Any

from tests.search.illegal import FORMS, legal_space, method_of

MOUNTED: dict[str, object] = {
    "model_name_or_path": "/mnt/tunefleet/base",
    "dataset": "rows",
    "eval_dataset": "held_out",
    "dataset_dir": "/mnt/tunefleet/data",
}
HUB: dict[str, object] = {"model_name_or_path": "org/model", "dataset": "org/rows", "val_size": 0.1}
REQUESTS = (None, {"GPU": 1}, {"CPU": 4}, {"GPU": 1, "CPU": 6}, {"GPU": 0.5, "CPU": 1}, {"CPU": 2, "memory": 8 * 2**30})


def some_recipe(chance: random.Random) -> dict[str, Any]:
    """A recipe whose method, workers, request and places are drawn."""
    keys: dict[str, Any] = dict(chance.choice((MOUNTED, HUB)))
    keys |= {
        "output_dir": f"outputs/{chance.choice(('First_Run', 'x' * 90, '7', 'a.b'))}-{chance.randrange(10**6)}",
        "max_steps": 100,
        "eval_strategy": "steps",
        "eval_steps": 10,
        "resources_per_worker": chance.choice(REQUESTS),
    }
    if chance.random() < 0.4:
        keys["ray_num_workers"] = chance.choice((1, 2, 4))
        keys["resources_per_worker"] = chance.choice((None, {"GPU": 1, "CPU": 4}, {"CPU": 2, "fast_disk": 1}))
        trials = chance.choice(("auto", 1, 3, 12))
        keys["bf16"] = True  # no GPU is there to be asked when the search begins
        return keys | {"tune": {"num_samples": 20, "max_concurrent_trials": trials, "space": legal_space(chance)}}
    form = chance.choice((*FORMS, {"finetuning_type": "full", "use_badam": True, "badam_mode": "ratio"}))
    keys |= form
    shared = (keys["resources_per_worker"] or {}).get("GPU") == 0.5
    if form.get("badam_mode") == "ratio" or shared or method_of(form) == "galore":
        return keys | {"ray_num_workers": 1}
    keys["ray_num_workers"] = chance.choice((1, 2, 8, [1, 4]))
    keys["placement_strategy"] = chance.choice(("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"))
    return keys
