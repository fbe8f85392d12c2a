"""What a run and its continuation must have in common: everything that decides the numbers."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import JsonValue

from tunefleet.plan import Plan

# Keys that may differ between a run and its continuation: they change no number that is trained.
_FREE_KEYS = {
    *("cache_dir", "dataset_dir", "overwrite_cache", "preprocessing_num_workers", "tokenized_path"),
    *("do_train", "do_eval", "eval_dataset", "per_device_eval_batch_size"),
    *("dataloader_num_workers", "gradient_checkpointing", "disable_gradient_checkpointing"),
}


def mathematics(plan: Plan) -> dict[str, JsonValue]:
    """Everything that decides the numbers of a run, by key: method, data, batch, schedule, seed, dtype."""
    recipe = plan.recipe
    flat = recipe.flat()
    run_keys = set(type(recipe.run).model_fields) | set(type(recipe.ray).model_fields)
    free = run_keys | _FREE_KEYS | recipe.method.free
    kept = {key: value for key, value in flat.items() if key not in free}
    kept["ray_num_workers"] = recipe.ray.max_workers  # an elastic run has the batches of its most
    kept["precision"] = plan.precision.model_dump()
    kept["deepspeed"] = plan.deepspeed  # its content, wherever it was written
    kept["training rows"] = plan.data.train_sha256 if plan.data else None
    return kept


def differences(recorded: Mapping[str, object], now: Mapping[str, object], path: str = "") -> list[str]:
    """One line for each key whose value is not what the record holds; of mappings, for each key inside.

    Args:
        path: what stands before each key.
    """
    lines: list[str] = []
    for key in sorted(set(recorded) | set(now)):
        old, new = recorded.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += differences(old, new, f"{path}{key}.")
        elif old != new:
            lines.append(f"{path}{key}: {_shown(old)} -> {_shown(new)}")
    return lines


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."
