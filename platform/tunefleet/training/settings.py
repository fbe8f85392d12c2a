"""The keys of a recipe that change the mathematics of training: batch, schedule, optimizer and number formats."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, JsonValue, WithJsonSchema, field_validator

from tunefleet.settings import Settings
from tunefleet_strategies.contract import OptimizerName

Scheduler = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
]
"""The schedules of transformers that need no further argument."""

DeepSpeedConfig = Annotated[
    str | dict[str, JsonValue] | None,
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object"}, {"type": "null"}]}),
]


class TrainingSettings(Settings):
    """How the loop trains."""

    do_train: bool = Field(True, description="`tunefleet train` trains; false is refused.")
    do_eval: bool = Field(False, description="Evaluate once at the end, also where `eval_strategy: no`.")
    per_device_train_batch_size: int = Field(8, ge=1, description="Samples of one micro-batch on one worker.")
    per_device_eval_batch_size: int = Field(8, ge=1, description="Samples of one evaluation batch on one worker.")
    gradient_accumulation_steps: int = Field(
        1,
        ge=1,
        description="Micro-batches of one optimizer step on one worker. Global batch = "
        "per_device_train_batch_size x gradient_accumulation_steps x ray_num_workers.",
    )
    learning_rate: float = Field(5e-5, gt=0, description="The highest learning rate of the schedule.")
    num_train_epochs: float = Field(3.0, gt=0, description="Passes over the data; `max_steps` wins over it.")
    max_steps: int = Field(-1, ge=-1, description="Optimizer steps of the whole run; -1 = as `num_train_epochs` says.")
    lr_scheduler_type: Scheduler = Field("linear", description="The shape of the learning rate over the run.")
    warmup_ratio: float = Field(0.0, ge=0, le=1, description="The part of all steps in which the rate rises from 0.")
    warmup_steps: int = Field(
        0, ge=0, description="Steps in which the rate rises from 0; wins over `warmup_ratio`. Below 1: read as a ratio."
    )
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay; norms and biases are never decayed.")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradients are clipped to this global norm; 0 = no clipping.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Decay of Adam's first moment.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="Decay of Adam's second moment.")
    adam_epsilon: float = Field(1e-8, gt=0, description="Adam's epsilon.")
    optim: OptimizerName = Field(
        "adamw_torch",
        description="The optimizer; `adamw_torch` and `adamw_torch_fused` mean the same numbers, fused where the "
        "device can. `adamw_8bit` keeps its state in 8 bits: `optimizer_backend: upstream` only, on a GPU.",
    )
    bf16: bool | None = Field(
        None,
        description="true: fp32 weights of what trains, bf16 compute, frozen base in bf16. false: fp32. Left out: as "
        "true where the hardware has bf16, else fp32.",
    )
    fp16: bool = Field(False, description="fp16 compute with a loss scaler; a GPU only.")
    pure_bf16: bool = Field(False, description="bf16 weights too, without an fp32 master copy.")
    tf32: bool | None = Field(None, description="Whether fp32 products may use TF32 on a GPU; unset: PyTorch's choice.")
    gradient_checkpointing: bool = Field(
        False,
        description="Keep layer inputs only and compute the rest again in the backward pass: less memory, slower.",
    )
    disable_gradient_checkpointing: bool | None = Field(
        None,
        description="The same switch from the other side: true = off, false = on; left out, as "
        "`gradient_checkpointing` says.",
    )
    seed: int = Field(42, ge=0, lt=2**32, description="Seeds everything that is drawn at random.")
    data_seed: int | None = Field(
        None, ge=0, lt=2**32, description="Seeds the order of the data and the held-out split; left out, `seed`."
    )
    deepspeed: DeepSpeedConfig = Field(
        None,
        description="Share the model out by DeepSpeed's ZeRO: `zero2`, `zero3`, `zero2_offload`, `zero3_offload`, the "
        'path of a DeepSpeed JSON file, or its content; "auto" in it is filled in from the recipe.',
    )
    sharding: Literal["none", "fsdp2"] = Field(
        "none",
        description="`fsdp2` shares weights, gradients and optimizer state out over the workers (PyTorch's "
        "`fully_shard`), so that each holds a part of the model; `deepspeed` is the other way.",
    )
    dataloader_num_workers: int = Field(
        0, ge=0, description="Threads that lay out coming batches on each worker; 0 = in the loop itself."
    )

    @field_validator("max_steps")
    @classmethod
    def _some_step(cls, value: int) -> int:
        if value == 0:
            raise ValueError("0 would train nothing; write a number of steps, or -1 for as many as the epochs have")
        return value

    @property
    def checkpoints_activations(self) -> bool:
        """Whether activations are computed again in the backward pass, from the two keys that say so."""
        return self.gradient_checkpointing or self.disable_gradient_checkpointing is False

    @property
    def order_seed(self) -> int:
        """The seed of the data order and of the held-out split."""
        return self.seed if self.data_seed is None else self.data_seed
