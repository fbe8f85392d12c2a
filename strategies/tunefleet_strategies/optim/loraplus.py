"""LoRA+: a learning rate for each kind of factor (Hayou et al., arXiv 2402.12354, section 4: lr_B = ratio * lr_A)."""

from __future__ import annotations

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch.optim import Optimizer

from tunefleet_strategies.contract import OptimizerSpec
from tunefleet_strategies.optim.build import build
from tunefleet_strategies.optim.groups import Owned, Rate, grouped, trainable


def lora_optimizer(model: PeftModel, spec: OptimizerSpec, ratio: float | None, embedding_rate: float) -> Optimizer:
    """The optimizer over an adapted model.

    Args:
        ratio: B's learning rate over the common one; None = LoRA+ is off and everything learns at one rate.
        embedding_rate: learning rate of both factors of LoRA on embeddings under LoRA+.
    """
    if ratio is None:
        return build(grouped(trainable(model), spec), spec)
    rates = kinds(model, Rate("lora_b", spec.learning_rate * ratio), Rate("lora_embedding", embedding_rate))
    base = Rate("base", spec.learning_rate)

    def rate(owned: Owned) -> Rate:
        return rates.get(id(owned.parameter), base)

    return build(grouped(trainable(model), spec, rate), spec)


def kinds(model: PeftModel, factor_b: Rate, embedding: Rate) -> dict[int, Rate]:
    """The rate of each factor that does not learn at the common one, by the id of its parameter.

    Factors are told by the module that holds them: a model may have a layer that is itself named `lora_B`.
    """
    rates: dict[int, Rate] = {}
    for module in model.modules():
        if isinstance(module, LoraLayer):
            rates |= {id(parameter): factor_b for parameter in module.lora_B.parameters()}
            for table in (module.lora_embedding_A, module.lora_embedding_B):
                rates |= {id(parameter): embedding for parameter in table.parameters()}
    return rates
