"""The keys of a recipe that say which rows are learned and how they become tokens."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, field_validator

from tunefleet.settings import Settings

DEFAULT_FOLDER = "data"
"""Where `dataset_info.json` is looked for; it need not be there."""


def read_pieces(value: object) -> object:
    """Cut a comma string into its pieces; a YAML list passes through with its pieces stripped.

    Raises:
        ValueError: a piece is empty (`"a,"`), or stands twice.
    """
    if isinstance(value, str):
        pieces: list[object] = [piece.strip() for piece in value.split(",")]
    elif isinstance(value, (list, tuple)):
        pieces = [piece.strip() if isinstance(piece, str) else piece for piece in value]
    else:
        return value
    if "" in pieces:
        raise ValueError("has an empty piece; write the names with one comma between them")
    twice = [piece for index, piece in enumerate(pieces) if piece in pieces[:index]]
    if twice:
        raise ValueError(f"names {twice[0]} twice; write it once")
    return tuple(pieces)


Pieces = Annotated[
    tuple[str, ...],
    BeforeValidator(read_pieces),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]
"""A comma string or a YAML list of names."""


class DataSettings(Settings):
    """Which rows are learned, and how they become tokens."""

    stage: Literal["sft", "pt"] = Field(
        "sft", description="`sft` learns the answers of question/answer rows, `pt` (pre-training) learns plain text."
    )
    dataset: Pieces = Field(
        min_length=1,
        description="What is learned: entries of `dataset_info.json`, existing paths or hub names, comma separated.",
    )
    eval_dataset: Pieces = Field((), description="What is evaluated on, named as in `dataset`. Excludes `val_size`.")
    dataset_dir: str = Field(
        DEFAULT_FOLDER,
        min_length=1,
        description="The folder that holds `dataset_info.json` and the files that it names.",
    )
    template: str | None = Field(
        None,
        min_length=1,
        description="The named chat template; left out, the tokenizer's own. Not used by `stage: pt`.",
    )
    cutoff_len: int = Field(2048, ge=1, description="Most tokens of one row; longer rows are cut.")
    max_samples: int | None = Field(None, ge=1, description="Rows taken from the start of each data set; all if unset.")
    val_size: float = Field(
        0.0,
        ge=0,
        description="Rows held out of `dataset` for evaluation: below 1 a fraction, from 1 on a count.",
    )
    packing: bool | None = Field(
        None,
        description="Fill rows up to `cutoff_len` with several samples, which never see each other. Left out: on for "
        "`stage: pt`, off for `stage: sft`.",
    )
    neat_packing: bool = Field(
        False, description="The same as `packing: true` here, where samples never see each other; `stage: sft` only."
    )
    train_on_prompt: bool = Field(False, description="Learn the questions too, not only the answers; `stage: sft`.")
    mask_history: bool = Field(False, description="Learn the last answer of each conversation only; `stage: sft`.")
    preprocessing_num_workers: int | None = Field(
        None, ge=1, description="Processes that tokenise; left out, as many as there are CPUs."
    )
    overwrite_cache: bool = Field(False, description="Tokenise again even if the token cache already holds these rows.")
    tokenized_path: str | None = Field(
        None, min_length=1, description="A folder of tokenised rows: loaded if it holds some, else written."
    )
    cache_dir: str | None = Field(
        None, min_length=1, description="The folder of the token cache, on each node; left out, `~/.cache/tunefleet`."
    )

    @field_validator("val_size")
    @classmethod
    def _whole_count(cls, value: float) -> float:
        if value > 1 and value != int(value):
            raise ValueError(f"{value} is neither a fraction nor a count; write a fraction below 1 or a whole number")
        return value

    @property
    def packs(self) -> bool:
        """Whether rows are filled up to `cutoff_len`: as written, else for pre-training."""
        if self.packing is None:
            return self.neat_packing or self.stage == "pt"
        return self.packing or self.neat_packing

    @property
    def has_evaluation(self) -> bool:
        """Whether there are rows to evaluate on."""
        return bool(self.eval_dataset) or self.val_size > 0
