"""Every number of a run, as it was decided before anything started. `planning` decides; workers are told."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, PlainSerializer

from tunefleet.data.batches import BatchSchedule
from tunefleet.errors import Refused
from tunefleet.recipe.read import read_flat
from tunefleet.recipe.sections import Recipe
from tunefleet.settings import Settings
from tunefleet_strategies.contract import Precision, Sharding


class WorkerPlan(Settings):
    """How many workers, how large, and where."""

    count: int
    """As many as the global batch counts; of an elastic run the most."""
    least: int
    device: Literal["cpu", "cuda"]
    resources: dict[str, float]
    placement_strategy: str
    labels: dict[str, str] = Field(default_factory=dict)
    """Of the nodes that they may be placed on; `!x` = another value than x, or none."""
    threads: int

    @property
    def elastic(self) -> bool:
        """Whether fewer workers than `count` may run."""
        return self.least < self.count


class PrecisionPlan(Settings):
    """Which number format holds what, by torch's names."""

    compute: str
    trainable: str
    frozen: str

    def resolved(self) -> Precision:
        """The same as torch dtypes."""
        import torch

        formats = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        return Precision(formats[self.compute], formats[self.trainable], formats[self.frozen])


class BatchPlan(Settings):
    """Samples and updates. An update is one optimizer step on one global batch."""

    micro_batch_samples: int
    accumulation: int
    global_batch_samples: int
    updates: int | None
    updates_per_epoch: int | None
    warmup_updates: int | None


class CadencePlan(Settings):
    """After how many updates something happens; None = never."""

    logging: int
    saving: int | None
    evaluation: int | None
    evaluates_at_start: bool
    evaluates_at_end: bool
    preemption_notices: int
    """The longest way between two looks, which are barriers; slow updates have a look more often."""


class ModelPlan(Settings):
    """Figures of the model with the method attached."""

    architecture: str
    parameters: int
    trainable_parameters: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int


class DataPlan(Settings):
    """Figures of the tokenised data."""

    train_rows: int
    train_tokens: int
    train_target_tokens: int
    evaluation_rows: int | None
    train_sha256: str
    """Hash of the training rows as tokens."""
    bad_rows: int


class PlacePlan(Settings):
    """Where a run lives. The folder of a run is storage_path/run_name."""

    run_name: str
    storage_path: str
    output_dir: str
    root: str
    """Absolute folder that relative paths of the recipe are relative to."""


class Plan(Settings):
    """All decisions of one run. Travels to the workers as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), arbitrary_types_allowed=True)

    recipe: Annotated[
        Recipe,
        PlainSerializer(lambda recipe: recipe.flat(), return_type=dict[str, Any]),
        # Nothing counts as written: rules on what a person wrote have been obeyed, and defaults stand here as well.
        BeforeValidator(lambda value: value if isinstance(value, Recipe) else read_flat(value, written=())),
    ]
    workers: WorkerPlan
    sharding: Sharding | None
    """The engine that shares weights or optimizer state out over the workers; None = each holds everything."""
    deepspeed: dict[str, Any] | None
    """DeepSpeed's configuration, everything filled in; None where it does not run."""
    precision: PrecisionPlan
    batch: BatchPlan
    cadence: CadencePlan
    model: ModelPlan
    data: DataPlan | None
    place: PlacePlan
    resumable: bool
    notices: tuple[str, ...]


def batch_schedule(plan: Plan) -> BatchSchedule:
    """The sequence of global batches: it depends on the seed and the data alone, never on the workers at hand."""
    if plan.data is None or plan.batch.updates is None:
        raise Refused("The data of this recipe has not been tokenised: run `tunefleet plan` without --no-data first.")
    training = plan.recipe.training
    return BatchSchedule(
        rows=plan.data.train_rows,
        global_batch=plan.batch.global_batch_samples,
        updates=plan.batch.updates,
        seed=training.order_seed,
    )
