"""One answer from a trained folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tunefleet.artifacts.assemble import find_parts, load_parts, load_parts_tokenizer
from tunefleet.errors import Refused

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MARK = "tunefleet"


def answer(
    folder: Path,
    prompt: str,
    *,
    system: str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    base: str | None = None,
    seed: int = 0,
) -> str:
    """Answer a prompt with a whole model or an adapter, whose base is looked up.

    With a chat template the prompt is a user's turn, and the answer ends with the assistant's; without one the prompt
    is continued.

    Args:
        temperature: 0 takes the likeliest token each time; above, tokens are drawn with `seed`.
        base: the base model, where it is not what the adapter names.

    Raises:
        Refused: a part is missing or does not fit, or the prompt is longer than the model reads.
    """
    if max_new_tokens < 1:
        raise Refused(f"max_new_tokens is {max_new_tokens}: ask for at least 1.")
    if temperature < 0:
        raise Refused(f"temperature is {temperature}: write 0 for the likeliest answer, or more.")
    parts = find_parts(folder, base)
    tokenizer = load_parts_tokenizer(parts)
    ids = prompt_ids(tokenizer, prompt, system)
    model = _placed(load_parts(parts))
    room = _room(model, ids)
    return _generate(model, tokenizer, ids, min(max_new_tokens, room), temperature, seed)


@dataclass(frozen=True)
class TurnEnd:
    """What a chat template writes behind an assistant's turn."""

    token: int | None
    """Where it is one special token."""
    text: str | None
    """Where it is ordinary text."""


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, system: str | None) -> Tensor:
    """The prompt as token ids (1, T), in the chat template if there is one.

    Raises:
        Refused: there is a system prompt and no template, or one that takes none.
    """
    import torch
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        if system is not None:
            raise Refused("This model has no chat template, so a system prompt has no place: write it into the prompt.")
        return torch.tensor([tokenizer(prompt)["input_ids"]])
    turns = [{"role": "user", "content": prompt}]
    if system is not None:
        turns.insert(0, {"role": "system", "content": system})
    try:
        text = str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
    except TemplateError as error:
        raise Refused(f"The model's chat template refuses this ({error}): leave the system prompt out.") from error
    return torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])


def turn_end(tokenizer: PreTrainedTokenizerBase) -> TurnEnd:
    """How an assistant's turn ends, found by writing one."""
    if tokenizer.chat_template is None:
        return TurnEnd(None, None)
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}]
    behind = str(tokenizer.apply_chat_template(turns, tokenize=False)).rpartition(MARK)[2].rstrip()
    if not behind:
        return TurnEnd(None, None)
    first = tokenizer(behind.lstrip(), add_special_tokens=False)["input_ids"][0]
    if first in tokenizer.added_tokens_decoder:
        return TurnEnd(int(first), None)
    return TurnEnd(None, behind)


def _placed(model: PreTrainedModel) -> PreTrainedModel:
    """On the GPU if there is one; half precision is nothing that a CPU computes well."""
    import torch
    from torch import nn

    if torch.cuda.is_available():
        nn.Module.to(model, "cuda")
    elif model.dtype == torch.float16:
        nn.Module.to(model, torch.float32)
    return model


def _room(model: PreTrainedModel, ids: Tensor) -> int:
    """How many tokens the model can still write behind the prompt."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is None:
        return 2**31
    if ids.shape[1] >= longest:
        raise Refused(f"The prompt has {ids.shape[1]} tokens and the model reads {longest}: shorten it.")
    return int(longest) - int(ids.shape[1])


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,  # (1, T)
    count: int,
    temperature: float,
    seed: int,
) -> str:
    import torch
    from transformers import GenerationConfig, StoppingCriteriaList

    end = turn_end(tokenizer)
    stops = _stop_tokens(model, tokenizer, end)
    settings = GenerationConfig(
        max_new_tokens=count,
        do_sample=temperature > 0,
        temperature=temperature if temperature > 0 else None,
        eos_token_id=stops or None,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(stops), 0),
    )
    ids = ids.to(model.device)

    def written(all_ids: Tensor) -> str:  # (1, T + new) -> the new text
        return str(tokenizer.decode(all_ids[0, ids.shape[1] :], skip_special_tokens=True))

    def ended(all_ids: Tensor, _scores: object) -> Tensor:
        return torch.tensor([end.text is not None and end.text in written(all_ids)], device=all_ids.device)

    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        # The own settings stand whole: those saved with the model would else fill in what is None here.
        model.generation_config = settings
        output = cast(Any, model).generate(
            ids, attention_mask=torch.ones_like(ids), stopping_criteria=StoppingCriteriaList([ended])
        )
    return (written(output) if end.text is None else written(output).partition(end.text)[0]).strip()


def _stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, end: TurnEnd) -> list[int]:
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    listed = own if isinstance(own, list) else [own]
    return sorted({token for token in (*listed, tokenizer.eos_token_id, end.token) if token is not None})
