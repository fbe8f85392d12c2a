"""Make the quickstart's world from what a Python installation holds: text, a tokenizer and a model. No download.

    python jobs/prepare_quickstart.py [--to .quickstart] [--base] [--small]
    ray job submit --working-dir . -- python jobs/prepare_quickstart.py [--to /mnt/shared/.quickstart]

The text is the standard library's own documentation strings, read from the running interpreter. What is written:

    data/train.jsonl      question and answer pairs in the alpaca layout
    data/heldout.jsonl    the same for modules that appear in no training file
    data/corpus.jsonl     plain text of the training modules, for `stage: pt`
    data/dataset_info.json
    init/                 a small Llama with random weights, and its tokenizer
    base/                 with --base: the same after pre-training (jobs/pretrain.yaml), where all other recipes begin

The same interpreter gives the same files, byte for byte. `--small` makes a tenth of it, for tests. A job that Ray has
shipped to a cluster keeps it all below `ray_storage_path` (as it is by default, ~/tunefleet), since its own folder goes
with it, and pre-trains as well: nothing can be brought there by hand.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import pkgutil
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from docstrings import Documented
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

JOBS = Path(__file__).resolve().parent

# Importing these opens a window or a browser, prints, installs, or belongs to nobody's daily work.
SKIPPED = {"antigravity", "distutils", "encodings", "ensurepip", "idlelib", "lib2to3", "test", "this", "tkinter"}
SKIPPED |= {"turtle", "turtledemo"}
SMALL_MODULES = ("argparse", "base64", "bisect", "calendar", "collections", "csv", "heapq", "json", "shlex", "string")

END, START, PAD = "<|im_end|>", "<|im_start|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ANSWER_CHARACTERS = 400  # a second paragraph is taken while the answer stays below this
IMPORT_SECONDS = 120
DATASETS = {
    "quickstart_train": {"file_name": "train.jsonl"},
    "quickstart_heldout": {"file_name": "heldout.jsonl"},
    "quickstart_corpus": {"file_name": "corpus.jsonl", "columns": {"prompt": "text"}},
}


@dataclass(frozen=True)
class Size:
    """How large a world to make."""

    modules: tuple[str, ...] | None  # None: the whole standard library
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    intermediate: int
    heldout_share: float = 0.08


FULL = Size(None, vocabulary=4096, hidden=192, layers=4, heads=4, key_value_heads=2, intermediate=512)
SMALL = Size(SMALL_MODULES, vocabulary=512, hidden=64, layers=2, heads=4, key_value_heads=2, intermediate=128)


@dataclass(frozen=True)
class Pair:
    """One row of the alpaca layout."""

    instruction: str
    input: str
    output: str


# ---- text -----------------------------------------------------------------------------------------------------------


def module_names(wanted: Sequence[str] | None) -> list[str]:
    """The public modules of the standard library, packages with their public submodules, in alphabetical order."""
    names: list[str] = []
    for name in sorted(wanted or sys.stdlib_module_names):
        if name.startswith("_") or name in SKIPPED:
            continue
        spec = importlib.util.find_spec(name)
        if spec is None:  # modules of another operating system
            continue
        names.append(name)
        folders = spec.submodule_search_locations
        names.extend(found.name for found in pkgutil.walk_packages(folders or [], f"{name}.") if is_public(found.name))
    return names


def is_public(name: str) -> bool:
    return not any(part.startswith("_") or part in {"test", "tests"} for part in name.split("."))


def read_documentation(names: Sequence[str]) -> list[Documented]:
    """Import the modules in another process and return what they document.

    Should that process die, each half is tried again alone; a module that cannot be imported is named and left out.
    """
    command = [sys.executable, "-W", "ignore", str(JOBS / "docstrings.py"), *names]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=IMPORT_SECONDS, check=True
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        if len(names) == 1:
            print(f"{names[0]} cannot be imported on this machine and is left out.")
            return []
        middle = len(names) // 2
        return read_documentation(names[:middle]) + read_documentation(names[middle:])
    return [json.loads(line) for line in done.stdout.splitlines()]


SIGNATURE = re.compile(r"^[\w.]+\(.*\)(\s*(->|=|:).*)?$", re.DOTALL)


def paragraphs(text: str) -> list[str]:
    """The prose of a documentation string: no signature line, no examples, no tables, each paragraph on one line."""
    pieces = re.split(r"\n\s*\n", text.strip())
    if pieces and SIGNATURE.match(pieces[0]):
        pieces = pieces[1:]
    prose = [" ".join(piece.split()) for piece in pieces if ">>>" not in piece and not re.search(r"[-=+]{4}", piece)]
    return [piece for piece in prose if re.search(r"[a-z]{3}", piece)]


def answer(text: str) -> str | None:
    """The first paragraphs of a documentation string, or None where there is too little to learn from."""
    taken = ""
    for piece in paragraphs(text):
        if taken and len(taken) + len(piece) > ANSWER_CHARACTERS:
            break
        taken = f"{taken}\n{piece}".strip()
    long_enough = 20 <= len(taken) <= 3 * ANSWER_CHARACTERS
    return taken if long_enough and taken.isascii() else None


def what_it_is(item: Documented) -> str:
    """The first sentence of an answer: what kind of thing has this name, and where it belongs."""
    if item["kind"] == "module":
        return "It is a module of the standard library."
    home = f"the module {item['module']}"
    if item["kind"] in {"method", "attribute"}:
        owner = item["name"].removeprefix(item["module"] + ".").rpartition(".")[0]
        home = f"the class {owner} of {home}"
    article = "an" if item["kind"] == "attribute" else "a"
    return f"It is {article} {item['kind']} of {home}."


def make_pairs(items: Iterable[Documented]) -> dict[str, list[Pair]]:
    """Pairs by top-level module; no question and no documentation appears twice in the whole."""
    questions: set[str] = set()
    answers: set[str] = set()
    pairs: dict[str, list[Pair]] = {}
    for item in items:
        text = answer(item["text"])
        question = f"What is {item['name']}?"
        if text is None or question in questions or text.casefold() in answers:
            continue
        questions.add(question)
        answers.add(text.casefold())
        pairs.setdefault(top_level(item), []).append(Pair(question, "", f"{what_it_is(item)}\n{text}"))
    return pairs


def top_level(item: Documented) -> str:
    return item["module"].partition(".")[0]


def held_out_modules(pairs: dict[str, list[Pair]], share: float) -> set[str]:
    """Modules whose rows together are about `share` of all, in an order fixed by a hash of their names.

    A module that would be more than a quarter of them is passed over, so that the held-out set is not one subject.
    """
    counts = Counter({module: len(rows) for module, rows in pairs.items()})
    wanted = round(share * counts.total())
    chosen: set[str] = set()
    rows = 0
    for module in sorted(counts, key=lambda name: hashlib.sha256(name.encode()).hexdigest()):
        if rows >= wanted:
            break
        if counts[module] <= wanted // 4:
            chosen.add(module)
            rows += counts[module]
    return chosen


def make_corpus(items: Iterable[Documented], heldout: set[str], heldout_rows: Iterable[Pair]) -> list[dict[str, str]]:
    """Whole documentation strings under their names, each once, from modules that are not held out.

    Modules lend each other their documentation, so a text that answers a held-out question is left out as well.
    """
    seen: set[str] = set()
    hidden = {pair.output.partition("\n")[2].casefold() for pair in heldout_rows}
    corpus = []
    for item in items:
        text = item["text"]
        if top_level(item) in heldout or text in seen or (answer(text) or "").casefold() in hidden:
            continue
        seen.add(text)
        corpus.append({"text": f"{item['name']}\n\n{text}"})
    return corpus


# ---- tokenizer and model --------------------------------------------------------------------------------------------


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE that can write any text, with a chat template in the ChatML form."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)
    fast.add_special_tokens({"additional_special_tokens": [START]})
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(size: Size, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    """A Llama with random weights and grouped-query attention."""
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


# ---- files ----------------------------------------------------------------------------------------------------------


def write_rows(path: Path, rows: Iterable[object]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def prepare(to: Path, size: Size) -> str:
    """Write the whole world to a folder; return one sentence that says what there is."""
    data = to / "data"
    data.mkdir(parents=True, exist_ok=True)
    items = read_documentation(module_names(size.modules))
    pairs = make_pairs(items)
    heldout = held_out_modules(pairs, size.heldout_share)
    train_rows = [pair for module, rows in pairs.items() if module not in heldout for pair in rows]
    heldout_rows = [pair for module, rows in pairs.items() if module in heldout for pair in rows]
    corpus = make_corpus(items, heldout, heldout_rows)
    write_rows(data / "train.jsonl", map(asdict, train_rows))
    write_rows(data / "heldout.jsonl", map(asdict, heldout_rows))
    write_rows(data / "corpus.jsonl", corpus)
    (data / "dataset_info.json").write_text(json.dumps(DATASETS, indent=2) + "\n", encoding="utf-8")

    # The held-out modules stay unseen by the tokenizer too.
    tokenizer = train_tokenizer((row["text"] for row in corpus), size.vocabulary)
    tokenizer.save_pretrained(to / "init")
    model = make_model(size, tokenizer)
    model.save_pretrained(to / "init")
    return (
        f"{len(train_rows)} pairs to train on, {len(heldout_rows)} held out ({len(heldout)} modules), "
        f"{len(corpus)} texts, {len(tokenizer)} tokens in the vocabulary, {model.num_parameters():,} parameters"
    )


def pretrain(to: Path, size: Size) -> None:
    """Train the base model, unless it is there. Ends this program with the command's exit code if that is not 0."""
    base = to / "base"
    if (base / "run.json").is_file():  # written last
        print(f"{base} is there (remove it to pre-train again).")
        return
    places = {
        "model_name_or_path": to / "init",
        "dataset_dir": to / "data",
        "output_dir": base,
        "ray_storage_path": to / "runs",
    }
    words = [f"{key}={json.dumps(str(place))}" for key, place in places.items()]
    words.append("overwrite_output_dir=true")
    if size is SMALL:
        words.append("max_steps=30")
    done = subprocess.run([sys.executable, JOBS / "train.py", JOBS / "pretrain.yaml", *words], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def main() -> None:
    sys.path.insert(0, str(JOBS.parent / "platform"))
    from tunefleet.launch.job_folder import QUICKSTART, is_shipped, kept_folder  # found by the line above

    shipped = is_shipped()
    here = kept_folder() / QUICKSTART if shipped else Path(QUICKSTART)
    parser = argparse.ArgumentParser(description="Make the quickstart's text, tokenizer and model.")
    parser.add_argument("--to", type=Path, default=here, help="folder to write to")
    parser.add_argument(
        "--base", action=argparse.BooleanOptionalAction, default=shipped, help="pre-train the base model too"
    )
    parser.add_argument("--small", action="store_true", help="a tenth of everything, for tests")
    arguments = parser.parse_args()
    size = SMALL if arguments.small else FULL
    print(prepare(arguments.to, size), flush=True)
    if arguments.base:
        pretrain(arguments.to.expanduser().resolve(), size)
    print(arguments.to)


if __name__ == "__main__":
    main()
