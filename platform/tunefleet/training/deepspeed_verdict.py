"""What DeepSpeed itself refuses of a configuration, heard before anything starts instead of from its workers."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import ValidationError

from tunefleet.errors import Refused, first_line
from tunefleet.training.deepspeed_config import Config

_FORMATS = ("fp32", "bf16", "fp16")


def refuse_unreadable(config: Config) -> None:
    """Let DeepSpeed read a filled configuration. Imports DeepSpeed, which takes seconds.

    Raises:
        Refused: it has a key that DeepSpeed does not know there, or a value that it does not take.
    """
    summed = config.get("data_types", {}).get("grad_accum_dtype")
    if summed not in (None, *_FORMATS):  # DeepSpeed finds this out only once it has a model
        raise Refused(f"deepspeed: data_types.grad_accum_dtype is {summed}: write one of {', '.join(_FORMATS)}.")
    asked = copy.deepcopy(config)
    del asked["train_batch_size"]  # DeepSpeed would count the ranks of a process group, and there is none yet
    with _in_silence():
        from deepspeed.runtime.config import DeepSpeedConfig

        try:
            DeepSpeedConfig(asked)
        except ValidationError as error:
            raise Refused(f"deepspeed: {_first_finding(error)}.") from error
        except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise Refused(
                f"deepspeed: DeepSpeed cannot read the configuration ({first_line(error)}): correct it."
            ) from error


def _first_finding(error: ValidationError) -> str:
    detail = error.errors(include_url=False)[0]
    key = ".".join(str(piece) for piece in detail["loc"])
    block = error.title.removeprefix("DeepSpeed").removesuffix("Config")
    if detail["type"] == "extra_forbidden":
        return f"{key} is no key that DeepSpeed knows in its block {block}: correct or remove it"
    return f"DeepSpeed does not take {key} in its block {block} ({detail['msg']}): correct or remove it"


@contextmanager
def _in_silence() -> Iterator[None]:
    """Without what DeepSpeed tells its own developers while it is imported."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
