"""What the sides' results have in common: parameter distance, and one held-out loss computed by one judge.

T tokens of a row, V vocabulary.
"""

import json
import math
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from beside.rows import AlpacaRow
from beside.work import Work, question_of, rendered

Weights = dict[str, Tensor]


def load_weights(folder: Path) -> Weights:
    """Return what was trained, in fp64: the adapter where there is one, else the model."""
    adapter = folder / "adapter_model.safetensors"
    kept = load_file(adapter if adapter.is_file() else folder / "model.safetensors")
    return {name: tensor.double() for name, tensor in kept.items()}


def distance(left: Weights, right: Weights) -> float:
    """Return the Euclidean distance of two sets of weights with the same names.

    Raises:
        ValueError: the names differ.
    """
    if left.keys() != right.keys():
        raise ValueError(f"These weights are in one of the two only: {sorted(left.keys() ^ right.keys())[:4]}")
    return math.sqrt(sum(float((left[name] - right[name]).square().sum()) for name in left))


def movement_ratio(mine: Weights, theirs: Weights, start: Weights) -> float:
    """Return the distance of two results / the way that `theirs` came from the start: 0 = the same result."""
    return distance(mine, theirs) / distance(theirs, start)


def held_out_loss(folder: Path, work: Work) -> float:
    """Return the mean loss of the answers' tokens over the held-out rows, in fp32, one row at a time."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work.base)
    model: nn.Module
    if (folder / "adapter_model.safetensors").is_file():
        model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(work.base, dtype=torch.float32), folder)
    else:
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    total, targets = 0.0, 0
    with torch.inference_mode():
        for kept in json.loads((work.data / "held_out.json").read_text()):
            row = AlpacaRow(**kept)
            question = len(tokenizer(question_of(row)).input_ids)
            tokens = torch.tensor(tokenizer(rendered(row)).input_ids)  # (T,)
            logits = model(input_ids=tokens[None]).logits[0]  # (T, V)
            answer = tokens[question:]
            total += float(nn.functional.cross_entropy(logits[question - 1 : -1], answer, reduction="sum"))
            targets += len(answer)
    return total / targets
