"""Cross-entropy at the supervised positions only, head and loss chunk by chunk, each chunk's backward run at once.

Shapes: B batch, T tokens, D model width, V vocabulary, S supervised positions of a micro-batch, s those of one chunk.

loss = sum of token losses / N, where N is the number of target tokens of the *global* batch (all micro-batches, all
workers). Local sums are divided by N and gradients are summed, so no mean of means appears.

The backward has two stages: decoder forward once -> for each chunk: head, loss, backward down to the chunk's hidden
states -> decoder backward with the collected gradient. Only one chunk's logits live at a time.

Mixtures of experts: the router's auxiliary loss is not part of the loss unless the model's config asks for it with
`output_router_logits: true`. It is a product of means over the tokens of one micro-batch, hence not additive over
tokens: then each micro-batch's auxiliary loss counts by its share of the target tokens, and how a global batch is cut
into micro-batches changes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunefleet.data.batches import Batch
from tunefleet.models import causal_lm
from tunefleet.training.attention import SEGMENTS, segment_kwargs
from tunefleet.training.layout import evaluating, forward_kwargs
from tunefleet.training.precision import autocast
from tunefleet_strategies.contract import Precision

_CHUNK_LOGITS = 2**22
"""Most logits that live at a time: 16 MiB in fp32, which a CPU's last cache still holds."""

_CHUNK_ROWS = 64
"""Fewest positions of a chunk, whatever the vocabulary: below it a product is too thin to run well."""

_RESCALING = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Names under which configs rescale logits behind the head."""


class _CrossEntropySum(torch.autograd.Function):
    """Sum of -log softmax(logits)[target]. Keeps one (s, V) fp32 tensor and turns it into the gradient in place."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        log_probabilities = torch.log_softmax(logits, dim=-1, dtype=torch.float32)  # (s, V)
        ctx.save_for_backward(targets)
        ctx.log_probabilities = log_probabilities
        ctx.dtype = logits.dtype
        return -log_probabilities.gather(1, targets[:, None]).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (targets,) = ctx.saved_tensors
        gradient = ctx.log_probabilities.exp_()  # softmax(logits); overwritten, so one backward only
        gradient[torch.arange(len(targets), device=targets.device), targets] -= 1.0
        return gradient.mul_(grads[0]).to(ctx.dtype), None


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy in fp32, whatever the dtype of the logits.

    Args:
        logits: (s, V).
        targets: (s,), none of them negative.

    Returns:
        A scalar in fp32. Its backward may run once.
    """
    return cast(Tensor, _CrossEntropySum.apply(logits, targets))  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Objective:
    """The loss of one model. Build it with `objective`, which finds out whether the two-stage backward is right."""

    model: nn.Module
    precision: Precision
    two_stage: bool
    lockstep: bool = False
    """Whether passes are collective, so that a micro-batch without targets is passed through like any other."""
    forward: Callable[[dict[str, Any]], Any] | None = None
    """What runs a whole forward pass (`Engine.forward`); None = the model itself."""
    router_loss_coefficient: float = 0.0
    """Weight of the auxiliary loss of a mixture of experts; 0 unless the model's config asks for it."""

    def backward(
        self,
        batch: Batch,
        total_targets: int,
        scale: float = 1.0,
        run: Callable[[Tensor], None] = torch.autograd.backward,
    ) -> Tensor:
        """Add the gradient of (this micro-batch's token losses / `total_targets`) * `scale` to the parameters.

        Args:
            run: the backward pass of a whole micro-batch, where there is one for it (`Engine.backward`).

        Returns:
            The sum of token losses: detached fp64 scalar, neither divided nor scaled.
        """
        factor = scale / total_targets
        if self._skips(batch):
            return torch.zeros((), dtype=torch.float64, device=batch.input_ids.device)
        if not self.two_stage:
            return self._one_stage(batch, factor, run)
        with autocast(self.model, self.precision):
            kept = self._supervised_states(batch)  # (S, D)
        total, gradients = torch.zeros((), dtype=torch.float64, device=kept.device), []
        for states, targets in self._chunks(kept, batch.target_ids):
            leaf = states.detach().requires_grad_(kept.requires_grad)
            with autocast(self.model, self.precision):
                loss = cross_entropy_sum(self._head(leaf), targets)
            torch.autograd.backward(loss * factor)
            total += loss.detach()
            gradients.append(leaf.grad)
        if kept.requires_grad:
            torch.autograd.backward(kept, torch.cat([g for g in gradients if g is not None]))
        return total

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Tensor:
        """The sum of token losses of a micro-batch, as a fp64 scalar; no gradients."""
        total = torch.zeros((), dtype=torch.float64, device=batch.input_ids.device)
        if self._skips(batch):
            return total
        with autocast(self.model, self.precision):
            if not self.two_stage:
                return total + cross_entropy_sum(self._logits(batch)[0], batch.target_ids)
            kept = self._supervised_states(batch)
            for states, targets in self._chunks(kept, batch.target_ids):
                total += cross_entropy_sum(self._head(states), targets)
        return total

    def _skips(self, batch: Batch) -> bool:
        return len(batch.target_ids) == 0 and not self.lockstep

    def _one_stage(self, batch: Batch, factor: float, run: Callable[[Tensor], None]) -> Tensor:
        with autocast(self.model, self.precision):
            logits, output = self._logits(batch)
            loss = cross_entropy_sum(logits, batch.target_ids)
            scaled = loss * factor
            if self.router_loss_coefficient:
                scaled = scaled + output.aux_loss * (self.router_loss_coefficient * len(batch.target_ids) * factor)
        run(scaled)
        return loss.detach().double()

    def _supervised_states(self, batch: Batch) -> Tensor:
        hidden = _decoder(causal_lm(self.model))(**forward_kwargs(batch)).last_hidden_state  # (B, T, D)
        # Unique indices: the backward of a repeated one would add in an order that depends on threads.
        return cast(Tensor, hidden.flatten(0, 1).index_select(0, batch.target_positions))  # (S, D)

    def _head(self, states: Tensor) -> Tensor:
        head = _head(causal_lm(self.model))
        assert head is not None  # `two_stage` is false without one
        return head(states)  # (s, V)

    def _chunks(self, kept: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
        rows = max(_CHUNK_ROWS, _CHUNK_LOGITS // causal_lm(self.model).config.get_text_config().vocab_size)
        return list(zip(torch.split(kept, rows), torch.split(targets, rows), strict=True))

    def _logits(self, batch: Batch) -> tuple[Tensor, Any]:
        """The model's own forward, its head at the supervised positions only: logits (S, V) and the whole output."""
        keep = torch.zeros(batch.input_ids.numel(), dtype=torch.bool, device=batch.input_ids.device)
        keep[batch.target_positions] = True
        inputs = forward_kwargs(batch) | {"logits_to_keep": keep.view_as(batch.input_ids)}
        output = causal_lm(self.model)(**inputs) if self.forward is None else self.forward(inputs)
        logits = output.logits.flatten(0, -2)
        if len(logits) == len(keep):  # models that do not know `logits_to_keep` return every position
            logits = logits.index_select(0, batch.target_positions)
        return logits, output


def objective(
    model: nn.Module,
    precision: Precision,
    *,
    one_backward: bool = False,
    lockstep: bool = False,
    forward: Callable[[dict[str, Any]], Any] | None = None,
) -> Objective:
    """The loss of `model`: two-stage where head(decoder(x)) is the model's own logits, else through its forward.

    Models that cap or scale their logits after the head (Gemma 2, Cohere, Granite) take the second way, and so does
    everything with `one_backward`: each gradient is then whole when the backward pass has reached its parameter.
    `lockstep` (an engine whose passes are collective) asks for that too.
    """
    base = causal_lm(model)
    coefficient = 0.0
    if getattr(base.config, "output_router_logits", False):
        coefficient = float(base.config.router_aux_loss_coef)
    two_stage = not (one_backward or lockstep) and coefficient == 0.0 and _head_is_all(base, precision)
    return Objective(model, precision, two_stage, lockstep, forward, coefficient)


def _decoder(base: PreTrainedModel) -> Callable[..., Any]:
    return cast(Callable[..., Any], base.base_model)


def _head(base: PreTrainedModel) -> Callable[[Tensor], Tensor] | None:
    return cast(Callable[[Tensor], Tensor] | None, cast(Any, base).get_output_embeddings())


def _head_is_all(base: PreTrainedModel, precision: Precision) -> bool:
    """Whether nothing happens to the logits but the head: the config names no rescaling, and six tokens agree."""
    # In bf16 a cap is invisible at small logits, so what the config says counts as well as what is seen.
    rescaled = any(getattr(base.config, name, None) not in (None, 1.0) for name in _RESCALING)
    head = _head(base)
    if rescaled or head is None or base.base_model is base:
        return False
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(base.config.get_text_config().vocab_size, (1, 6), generator=generator)
    kwargs: dict[str, Any] = {"input_ids": ids.to(next(base.parameters()).device), "use_cache": False}
    if base.config._attn_implementation == SEGMENTS:
        kwargs |= segment_kwargs((6,), kwargs["input_ids"].device)
    with evaluating(base), torch.no_grad(), autocast(base, precision):
        logits = base(**kwargs).logits
        ours = head(_decoder(base)(**kwargs).last_hidden_state)
    return bool(torch.equal(ours, logits))
