"""From a point to its trial: an ordinary recipe on as many workers as its method may have, with the same global batch.

`ray_num_workers` above `tune` is a wish and W of the global batch G. A method that allows fewer workers runs on the
most that it allows; in a branch the key is an order. G is the same for all, so micro-batch and accumulation follow.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from tunefleet.errors import Refused
from tunefleet.plan import WorkerPlan
from tunefleet.recipe.read import read_flat
from tunefleet.recipe.sections import Recipe
from tunefleet.search.space import WISH, Branch
from tunefleet.shapes import ClusterShape, NodeShape

MICRO, ACCUMULATION = "per_device_train_batch_size", "gradient_accumulation_steps"


@dataclass(frozen=True)
class Batch:
    """How a worker takes its share of the global batch."""

    micro: int
    accumulation: int


@dataclass(frozen=True)
class Size:
    """What the workers of a trial take."""

    workers: int
    request: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)
    """Of the machines that they are kept to (`WorkerPlan.labels`)."""
    together: bool = False
    """Whether all of them must be on one machine."""


def size_of(plan: WorkerPlan, workers: int | None = None) -> Size:
    """What a plan's workers take.

    Args:
        workers: instead of as many as the plan has.
    """
    together = plan.placement_strategy == "STRICT_PACK"
    return Size(plan.count if workers is None else workers, plan.resources, plan.labels, together)


def shared_batch(shared: Mapping[str, object], recipe: Recipe) -> tuple[int, int]:
    """The wished number of workers, and the samples of every trial's global batch.

    Args:
        shared: the keys above `tune`.
        recipe: that of any point.

    Raises:
        Refused: the wish is a range.
    """
    wish = shared.get(WISH) or 1
    if not isinstance(wish, int):
        raise Refused(
            f"{WISH}: {wish} asks for elastic workers, and the trials of a search have a fixed number: write one "
            f"number."
        )
    training = recipe.training
    return wish, training.per_device_train_batch_size * training.gradient_accumulation_steps * wish


def trial_keys(branch: Branch, values: Mapping[str, object], shared: Mapping[str, object]) -> dict[str, object]:
    """The keys of a point's recipe with workers, micro-batch and accumulation as they will run.

    Args:
        shared: the keys above `tune`.

    Raises:
        Refused: the recipe rules refuse the point, or the global batch cannot be dealt to its workers.
    """
    recipe = branch.recipe(values)
    traits = recipe.method.traits()
    wish, samples = shared_batch(shared, recipe)
    if branch.orders_workers:
        workers = recipe.ray.max_workers
    else:
        workers = min(wish, traits.max_workers or wish)
    now = Batch(recipe.training.per_device_train_batch_size, recipe.training.gradient_accumulation_steps)
    batch = fitted(samples, workers, now, accumulates=traits.accumulation)
    keys = branch.keys(values)
    chosen = {WISH: workers, MICRO: batch.micro, ACCUMULATION: batch.accumulation}
    return keys if workers == wish and batch == now else keys | chosen


def fitted(samples: int, workers: int, now: Batch, *, accumulates: bool) -> Batch:
    """The micro-batch, at most as large as now, and the accumulation that make up a share of the global batch.

    Where gradients cannot be accumulated the micro-batch grows instead.

    Raises:
        Refused: the shares would be uneven.
    """
    share, left = divmod(samples, workers)
    if left:
        raise Refused(
            f"{WISH}: {workers} cannot share the search's global batch of {samples} samples evenly: write a number of "
            f"workers that divides it."
        )
    if not accumulates:
        return Batch(share, 1)
    micro = next(size for size in range(min(now.micro, share), 0, -1) if share % size == 0)
    return Batch(micro, share // micro)


def trial_recipe(keys: Mapping[str, object], name: str, storage: str) -> Recipe:
    """The recipe of a trial's run: what it leaves is kept beside the other trials."""
    kept = keys.get("save_total_limit") or 1
    own: dict[str, object] = {
        "ray_run_name": name,
        "ray_storage_path": storage,
        "save_total_limit": kept,
        "overwrite_output_dir": None,
        "resume_from_checkpoint": None,
        "plot_loss": False,
    }
    return read_flat({**keys, **own})


def most_at_once(size: Size, cluster: ClusterShape, limit: int) -> int:
    """How many trials of one size the machines hold, as far as a limit."""
    low, high = 0, limit
    while low < high:
        count = (low + high + 1) // 2
        low, high = (count, high) if fit([size] * count, cluster) else (low, count - 1)
    return low


def fit(sizes: Sequence[Size], cluster: ClusterShape) -> bool:
    """Whether trials of these sizes find room side by side: each worker whole on one machine.

    Those come first that may not go everywhere, then the largest; each goes where it leaves the least, as Ray's
    autoscaler starts machines.
    """
    rooms = [_Room(node) for node in cluster.nodes]
    pieces = [(bundle, size.labels) for size in sizes for bundle in _bundles(size)]
    for bundle, labels in sorted(pieces, key=lambda one: (not one[1], -sum(one[0].values()))):
        holding = [room for room in rooms if room.holds(bundle, labels)]
        if not holding:
            return False
        min(holding, key=lambda room: room.left(bundle)).take(bundle)
    return True


def _bundles(size: Size) -> list[dict[str, float]]:
    """What must be whole on one machine."""
    if size.together:
        return [{name: amount * size.workers for name, amount in size.request.items()}]
    return [dict(size.request)] * size.workers


class _Room:
    """What is left of a machine."""

    def __init__(self, node: NodeShape) -> None:
        self._node, self._left = node, node.offered

    def holds(self, bundle: Mapping[str, float], labels: Mapping[str, str]) -> bool:
        has = all(self._left.get(name, 0.0) + 1e-9 >= amount for name, amount in bundle.items() if amount > 0)
        return has and self._node.is_as(labels)

    def left(self, names: Iterable[str]) -> float:
        """The sum of what is left of some resources."""
        return sum(self._left.get(name, 0.0) for name in names)

    def take(self, bundle: Mapping[str, float]) -> None:
        for name, amount in bundle.items():
            self._left[name] = self._left.get(name, 0.0) - amount
