"""The typed side of a recipe: every key has exactly one owner. Run and Ray own their keys here, the others at home."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue, SerializeAsAny, WithJsonSchema, field_validator

from tunefleet.data.settings import DataSettings, Pieces
from tunefleet.errors import Refused
from tunefleet.model_settings import ModelSettings
from tunefleet.recipe.node_types import NodeTypes
from tunefleet.secret_names import secret_keys
from tunefleet.settings import DEFAULT_STORAGE, Settings
from tunefleet.stores import refuse_credentials
from tunefleet.training.settings import TrainingSettings
from tunefleet_strategies.contract import Strategy

REPORTERS = ("none", "tensorboard", "mlflow", "wandb")
LATER_REPORTERS = ("swanlab", "trackio", "comet_ml", "clearml", "neptune", "dvclive", "all")
_REPORT_TO = "report_to: tensorboard, mlflow, wandb or none"
LONGEST_NAME = 100
"""Characters of a run's name; it is the name of a folder."""


def _read_best_metric(value: object) -> object:
    return "eval_loss" if value == "loss" else value


_T = TypeVar("_T")


def _without_credentials(value: _T) -> _T:
    """A path or a URI that holds no secret: a recipe is copied, sent and kept."""
    if isinstance(value, str):
        try:
            refuse_credentials(value)
        except Refused as error:
            raise ValueError(str(error)) from error
    return value


def _without_secret_variables(value: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """Arguments of `ray.init` that hold no secret: Ray shows `runtime_env` to whoever asks, and a recipe is copied."""
    name = next(secret_keys(value), None)
    if name is not None:
        raise ValueError(
            f"ray_init_kwargs: sets {name}, a secret, which does not belong into a recipe; set it in the environment "
            f"of the cluster's machines (manifest --secret NAME=SECRET:KEY does so for pods, submit --secret NAME asks "
            f"for it), or give them an identity of the platform"
        )
    return value


StorePath = Annotated[str, AfterValidator(_without_credentials)]


class RunSettings(Settings):
    """What a run leaves, how often it looks up, and how it begins again."""

    output_dir: str = Field(min_length=1, description="The folder for the tuned model and the record of the run.")
    overwrite_output_dir: bool = Field(
        False, description="Let a finished run be done anew. An unfinished run is continued all the same."
    )
    logging_steps: int = Field(10, ge=1, description="Steps between two lines of `metrics.jsonl`.")
    save_strategy: Literal["no", "steps", "epoch"] = Field("steps", description="When checkpoints are written.")
    save_steps: int = Field(500, ge=1, description="Steps between two checkpoints.")
    save_total_limit: int | None = Field(None, ge=1, description="Checkpoints that are kept, the newest; all if unset.")
    save_only_model: bool = Field(
        False,
        description="Leave optimizer and random state out of checkpoints: smaller, but nothing resumes from them.",
    )
    plot_loss: bool = Field(True, description="Draw `loss.png`.")
    report_to: Pieces = Field(
        ("tensorboard",),
        description="Where metrics go besides `metrics.jsonl`: tensorboard, mlflow, wandb, several of them, or none.",
    )
    eval_strategy: Literal["no", "steps", "epoch"] = Field("no", description="When the held-out rows are evaluated.")
    eval_steps: int | None = Field(None, ge=1, description="Steps between two evaluations; left out, `logging_steps`.")
    eval_on_start: bool = Field(False, description="Evaluate before the first step too: the model as it was.")
    load_best_model_at_end: bool = Field(
        False, description="Hand over the checkpoint with the lowest `eval_loss` instead of the last one."
    )
    metric_for_best_model: Annotated[Literal["eval_loss"], BeforeValidator(_read_best_metric)] = Field(
        "eval_loss", description="What `load_best_model_at_end` compares; lower is better."
    )
    resume_from_checkpoint: Annotated[bool | str | None, AfterValidator(_without_credentials)] = Field(
        None,
        description="false: start anew. A path: start from that checkpoint. Left out or true: continue an unfinished "
        "run.",
    )

    @field_validator("report_to")
    @classmethod
    def _known_reporters(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name in LATER_REPORTERS:
                raise ValueError(f"{name} is not there yet; write {_REPORT_TO}")
            if name not in REPORTERS:
                raise ValueError(f"{name} is no place for metrics; write {_REPORT_TO}")
        if "none" in value and len(value) > 1:
            raise ValueError("none cannot stand beside others; write report_to: none alone or drop it")
        return value

    @property
    def tensorboard(self) -> bool:
        """Whether TensorBoard events are written."""
        return "tensorboard" in self.report_to

    @property
    def evaluation_steps(self) -> int:
        """Steps between two evaluations under `eval_strategy: steps`."""
        return self.logging_steps if self.eval_steps is None else self.eval_steps


def _read_worker_count(value: object) -> object:
    """A whole number, or the least and the most of an elastic run."""
    pieces = list(value) if isinstance(value, list | tuple) else [value]
    counts = [piece for piece in pieces if isinstance(piece, int) and not isinstance(piece, bool)]
    if not counts or len(counts) < len(pieces):
        raise ValueError("is no number of workers; write a whole number such as 2, or [1, 4] for an elastic run")
    if min(counts) < 1:
        raise ValueError("takes at least one worker; write 1 or more")
    if not isinstance(value, list | tuple):
        return counts[0]
    if len(counts) != 2 or counts[0] > counts[1]:
        raise ValueError("as a list is [least, most]; write for example [1, 4]")
    return tuple(counts)


def _read_json_text(value: object) -> object:
    """A mapping that was written as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        read: object = json.loads(value)
    except ValueError as error:
        raise ValueError("is text that is not JSON; write a YAML mapping") from error
    return read


WorkerCount = Annotated[
    int | tuple[int, int],
    BeforeValidator(_read_worker_count),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1},
                {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 2, "maxItems": 2},
            ]
        }
    ),
]
InitArguments = Annotated[
    dict[str, JsonValue],
    BeforeValidator(_read_json_text),
    AfterValidator(_without_secret_variables),
    WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "string"}]}),
]


_RAYS_OWN = ("CPU", "GPU")


def _in_rays_spelling(value: dict[str, float]) -> dict[str, float]:
    """Refuse `cpu: 1`: Ray would take it for a resource of somebody's own, which no node has.

    Raises:
        ValueError: a name of Ray's is written with other capitals.
    """
    for name in value:
        if name not in _RAYS_OWN and name.upper() in _RAYS_OWN:
            raise ValueError(f"{name} is no resource of Ray's: write {name.upper()}")
    return value


def _whole_gpus(value: dict[str, float]) -> dict[str, float]:
    """Refuse `GPU: 1.5`: several workers may share one GPU, and above one Ray gives whole ones.

    Raises:
        ValueError: it is a fraction above 1.
    """
    gpus = value.get("GPU", 0.0)
    if gpus > 1 and gpus % 1:
        raise ValueError(f"GPU: {gpus:g} is a fraction above 1, and Ray gives whole ones there; write {round(gpus)}")
    return value


Resources = Annotated[
    dict[str, Annotated[float, Field(ge=0)]], AfterValidator(_in_rays_spelling), AfterValidator(_whole_gpus)
]


class RaySettings(Settings):
    """Where the run happens: workers, resources, storage, cluster."""

    ray_num_workers: WorkerCount = Field(
        1, description="Data-parallel workers; [least, most] for an elastic run, whose batch counts the most."
    )
    resources_per_worker: Resources | None = Field(
        None,
        description="Resources of one worker, such as {GPU: 1}; unset: a GPU if there is one, else a share of CPUs.",
    )
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = Field(
        "PACK", description="How workers are laid over the nodes of the cluster."
    )
    ray_storage_path: StorePath = Field(
        DEFAULT_STORAGE,
        min_length=1,
        description="A folder or URI (s3://, gs://, hdfs://) that every node reaches; it holds the truth of runs.",
    )
    ray_run_name: str | None = Field(
        None,
        pattern=rf"^[A-Za-z0-9][A-Za-z0-9._-]{{0,{LONGEST_NAME - 1}}}$",
        description="The run's folder in `ray_storage_path`: letters, digits, dots, dashes; unset: from `output_dir`.",
    )
    ray_address: str | None = Field(
        None, min_length=1, description="An existing cluster; left out, the one that runs here or a local one."
    )
    ray_node_types: NodeTypes | None = Field(
        None,
        description="What the cluster's autoscaler can start, in the words of Ray's `available_node_types`: {gpu: "
        "{resources: {GPU: 1, CPU: 8}, max_workers: 4}}; unset: what the cluster publishes, else what is there.",
    )
    ray_init_kwargs: InitArguments = Field({}, description="Further arguments of `ray.init`, as a mapping.")
    ray_start_timeout: int = Field(
        900,
        ge=1,
        description="Seconds that a run waits until the cluster has room for its workers, at the start and again.",
    )
    max_failures: int = Field(
        3,
        ge=-1,
        description="How often a run that failed or lost a worker is started again; -1 = without end. A node that is "
        "taken away with notice, SIGTERM to a worker and workers that join are not counted.",
    )
    preemption_poll_steps: int = Field(
        100,
        ge=1,
        description="Steps between two looks for a notice that a node is taken away, at most; slow steps look sooner.",
    )
    elastic_resize_monitor_interval_s: float = Field(
        60.0,
        ge=25,  # Ray's own list of what workers may be placed on is up to 20 s old
        description="Seconds that a node must be there before an elastic run starts anew to use it.",
    )
    ddp_timeout: int = Field(1800, ge=1, description="Seconds that a worker waits for the others.")

    @property
    def max_workers(self) -> int:
        """W of the global batch: the workers as written, the most of an elastic run."""
        return self.ray_num_workers if isinstance(self.ray_num_workers, int) else self.ray_num_workers[1]


def slug(output_dir: str) -> str:
    """A folder name made of a path; empty if the path has no letter and no digit in it.

    Paths that are too long end with a digest of themselves, so that two of them stay apart.
    """
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", output_dir)
    name = re.sub(r"(^|-)\.+(?=-|$)", "", name).strip("-._")
    if len(name) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(output_dir.encode()).hexdigest()[:8]
    return f"{name[: LONGEST_NAME - 9].rstrip('-._')}-{digest}"


class Recipe(Settings):
    """A recipe, read and checked. Two recipes are equal if every key has the same value, whoever wrote it."""

    model: ModelSettings
    data: DataSettings
    training: TrainingSettings
    run: RunSettings
    ray: RaySettings
    method: SerializeAsAny[Strategy]
    written: frozenset[str] = frozenset()
    """The keys that a person wrote, in the file or on the command line."""
    notices: tuple[str, ...] = ()
    """Sentences to read before the run starts."""

    @property
    def run_name(self) -> str:
        """The run's folder below `ray_storage_path`."""
        return self.ray.ray_run_name or slug(self.run.output_dir)

    @property
    def evaluates(self) -> bool:
        """Whether anything asks for an evaluation."""
        return self.training.do_eval or self.run.eval_on_start or self.run.eval_strategy != "no"

    def flat(self) -> dict[str, JsonValue]:
        """Every key with its value, as JSON: what `read_flat` takes back."""
        keys: dict[str, JsonValue] = {}
        for section in (self.model, self.data, self.training, self.run, self.ray):
            keys |= section.model_dump(mode="json")
        selector: dict[str, JsonValue] = json.loads(json.dumps(dict(self.method.selector)))
        return keys | selector | self.method.model_dump(mode="json")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.flat() == other.flat()

    def __hash__(self) -> int:
        return hash(json.dumps(self.flat(), sort_keys=True))
