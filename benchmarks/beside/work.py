"""The work both sides do: one model, one tokenizer, one adapter to start from, the same rows in the same order.

Model W3 of the reference: a Llama of 33.7 M parameters with random weights, vocabulary 8192. Everything is made once
into one folder and found again by the next run.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from beside.rows import AlpacaRow, make_rows
from tunefleet.data.batches import epoch_order

ROWS = 1000
HELD_OUT_ROWS = 64
VOCABULARY = 8192
BATCH = 8
SEED = 42
END = "<|end|>"
PAD = "<|pad|>"


@dataclass(frozen=True)
class Work:
    """Folders of the work and what was counted in it."""

    base: Path  # model and tokenizer
    adapter: Path  # the LoRA adapter that both sides start from (B = 0)
    data: Path  # dataset_info.json with the data sets `ours`, `peer` and `held_out`
    steps: int  # optimizer steps of one run, each over BATCH of the ROWS rows that it is given
    epoch_tokens: int  # real tokens of all ROWS rows
    tokens_of_step: tuple[int, ...]  # real tokens of each step's BATCH rows, in the order of the visit
    padded_of_step: tuple[int, ...]  # the same rows, each as long as the longest of its step
    longest: int  # tokens of the longest row
    parameters: int

    @property
    def tokens(self) -> int:
        """Real tokens of all steps together."""
        return sum(self.tokens_of_step)

    @property
    def rows(self) -> int:
        """Rows of all steps together."""
        return self.steps * BATCH

    @property
    def fill(self) -> float:
        """Share of a padded batch that is real."""
        return self.tokens / sum(self.padded_of_step)


def question_of(row: AlpacaRow) -> str:
    """Return what stands before the answer in the template `mistral` of both sides; it is not trained on.

    In that template an answer ends with its end token. In `default` a line break follows, which the peer also learns.
    """
    question = f"{row.instruction}\n{row.input}" if row.input else row.instruction
    return f"[INST] {question}[/INST]"


def rendered(row: AlpacaRow) -> str:
    """Return the whole row as the template `mistral` of both sides writes it, end tokens included."""
    return f"{question_of(row)} {row.output}{END}"


def train_tokenizer(rows: Sequence[AlpacaRow]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE of VOCABULARY tokens trained on the rendered rows."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((rendered(row) for row in rows), trainer)
    made: PreTrainedTokenizerFast = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END, pad_token=PAD, model_max_length=2048
    )
    return made


def make_base(folder: Path, rows: Sequence[AlpacaRow]) -> None:
    """Save model W3 with random weights (fp32) and the tokenizer into `folder`."""
    tokenizer = train_tokenizer(rows)
    torch.manual_seed(SEED)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=VOCABULARY,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_adapter(folder: Path, base: Path) -> None:
    """Save the adapter that both sides start from: rank 8 on every linear layer but the head, alpha 16, B = 0."""
    torch.manual_seed(SEED)
    model = LlamaForCausalLM.from_pretrained(base)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM")
    get_peft_model(model, lora).save_pretrained(str(folder))


def make_once(folder: Path, fill: Callable[[Path], None]) -> None:
    """Call `fill` on a new folder that becomes `folder` only when it is complete; nothing is done if it is there."""
    if folder.exists():
        return
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    fill(partial)
    partial.rename(folder)


def make_data(folder: Path, rows: Sequence[AlpacaRow], held_out: Sequence[AlpacaRow], order: Sequence[int]) -> None:
    """Write the rows as we read them, and in the order of our visit for the peer, which is told not to shuffle."""
    sets = {"ours": rows, "peer": [rows[index] for index in order], "held_out": held_out}
    for name, chosen in sets.items():
        (folder / f"{name}.json").write_text(json.dumps([asdict(row) for row in chosen], indent=1))
    (folder / "dataset_info.json").write_text(json.dumps({name: {"file_name": f"{name}.json"} for name in sets}))


def make_work(root: Path, steps: int) -> Work:
    """Make (or find) the work of `steps` steps of BATCH rows under `root`.

    Raises:
        ValueError: more steps than the rows give in one epoch.
    """
    if not 1 <= steps <= ROWS // BATCH:
        raise ValueError(f"{steps} steps of {BATCH} rows are not in {ROWS} rows; ask for 1 to {ROWS // BATCH}.")
    everything = make_rows(ROWS + HELD_OUT_ROWS, SEED)
    rows, held_out = everything[:ROWS], everything[ROWS:]
    order = [int(index) for index in epoch_order(ROWS, SEED, 0)]
    # Named by what it is made from: a folder that an older version of this file made is not found again.
    root = root / hashlib.sha256("".join(map(rendered, everything)).encode()).hexdigest()[:12]
    base, adapter, data = root / "base", root / "adapter", root / "data"
    make_once(base, lambda folder: make_base(folder, rows))
    make_once(adapter, lambda folder: make_adapter(folder, base))
    make_once(data, lambda folder: make_data(folder, rows, held_out, order))
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    lengths = np.array([len(tokenizer.encode(rendered(rows[index])).ids) for index in order]).reshape(-1, BATCH)
    with torch.device("meta"):
        parameters = LlamaForCausalLM(LlamaConfig.from_pretrained(base)).num_parameters()
    visited = lengths[:steps]
    return Work(
        base,
        adapter,
        data,
        steps=steps,
        epoch_tokens=int(lengths.sum()),
        tokens_of_step=tuple(int(total) for total in visited.sum(axis=1)),
        padded_of_step=tuple(int(longest) * BATCH for longest in visited.max(axis=1)),
        longest=int(lengths.max()),
        parameters=parameters,
    )
