"""A conversation -> texts of prompts and answers -> token ids and labels, cut turn by turn to `cutoff_len`.

Shapes: T tokens of one sequence; ids (T,) int32, labels (T,) int32 with IGNORED where a token is not learned.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from jinja2.exceptions import TemplateError

from tunefleet.data.formats import BadRecord, Conversation, Message
from tunefleet.data.templates import SENTINEL, Template, end_token_id, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100

Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True)
class TurnText:
    """A prompt (not learned) and the answer to it (learned). `append_end`: the answer needs an end token added."""

    prompt: str
    answer: str
    append_end: bool


@dataclass(frozen=True)
class TurnIds:
    """The token ids of a prompt and of the answer to it."""

    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Sequence1D:
    """One sequence that attends to itself only. ids and labels: (T,) int32."""

    ids: Int32
    labels: Int32
    cut: bool = False
    """Whether `cutoff_len` left something out."""


@dataclass(frozen=True)
class Masking:
    """Which tokens are learned, and how many there may be."""

    cutoff_len: int
    train_on_prompt: bool = False
    mask_history: bool = False


def turn_texts(
    conversation: Conversation, template: Template, tokenizer: PreTrainedTokenizerBase
) -> list[list[TurnText]]:
    """Cut a conversation into sequences of turns.

    An answer is what follows the prompt that `generate` would be given at this point, up to the token that ends the
    turn. As long as the prompt of a later turn continues the text so far, the turns share one sequence. Templates
    that rewrite earlier turns (reasoning models drop old thoughts) break this: a new sequence then begins with the
    whole prompt of that turn, so that every answer is learned once, after exactly the prompt it will meet in use.

    Raises `BadRecord` if the template cannot write this conversation.
    """
    chat = _as_chat(conversation, template)
    sequences: list[list[TurnText]] = []
    written = ""
    for position, message in enumerate(chat):
        if message["role"] != "assistant":
            continue
        try:
            prompt, full = _prompt_and_full(chat, position, conversation, template, tokenizer)
        except (TemplateError, TypeError) as problem:
            raise BadRecord(f"the chat template refuses it: {problem}") from None
        answer, append_end = _up_to_the_end(full[len(prompt) :], template.answer_ends)
        if sequences and prompt.startswith(written):
            sequences[-1].append(TurnText(prompt[len(written) :], answer, append_end))
        else:
            sequences.append([TurnText(prompt, answer, append_end)])
        written = prompt + answer
    return sequences


class PieceEncoder:
    """Encodes pieces of one text separately, so that the prompt gets the ids that it has when it stands alone.

    Tokenizers of the SentencePiece family put a blank before every text; for a piece that continues a text this
    would be wrong, so such a piece is encoded behind a line break whose ids are then taken away.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._anchor: list[int] = []
        line_break = self._encode(["\n"])[0]
        if self._encode(["\na"])[0] != line_break + self._encode(["a"])[0]:
            self._anchor = line_break

    def __call__(self, texts: Sequence[str], continues: Sequence[bool]) -> list[list[int]]:
        """Ids of each text, without special tokens of the tokenizer's own adding."""
        if not self._anchor:
            return self._encode(texts)
        anchored = self._encode(["\n" + text if later else text for text, later in zip(texts, continues, strict=True)])
        return [
            self._unanchored(ids, text) if later else ids
            for ids, text, later in zip(anchored, texts, continues, strict=True)
        ]

    def _unanchored(self, ids: list[int], text: str) -> list[int]:
        count = len(self._anchor)
        # Where the line break melts into what follows (runs of line breaks), no blank was put before the text either.
        return ids[count:] if ids[:count] == self._anchor else self._encode([text])[0]

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        encoded: list[list[int]] = self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return encoded


def turn_ids(
    sequences: Sequence[Sequence[TurnText]], encode: PieceEncoder, tokenizer: PreTrainedTokenizerBase
) -> list[list[TurnIds]]:
    """The token ids of many sequences of turns, encoded in one call."""
    texts = [text for turns in sequences for turn in turns for text in (turn.prompt, turn.answer)]
    continues = [bool(number) for turns in sequences for number in range(2 * len(turns))]
    pieces = iter(encode(texts, continues))
    encoded = []
    for turns in sequences:
        row = []
        for turn in turns:
            prompt, answer = next(pieces), next(pieces)
            row.append(TurnIds(prompt, [*answer, end_token_id(tokenizer)] if turn.append_end else answer))
        encoded.append(row)
    return encoded


def masked(turns: Sequence[TurnIds], masking: Masking) -> Sequence1D:
    """Lay turns end to end with their labels, cut turn by turn to `cutoff_len`.

    `mask_history` learns the last turn only and spends the budget from the last turn backwards.
    """
    pieces: list[tuple[list[int], list[int]]] = []
    budget = masking.cutoff_len
    for number, turn in enumerate(reversed(turns) if masking.mask_history else turns):
        if budget <= 0:
            break
        prompt_length, answer_length = shares(len(turn.prompt), len(turn.answer), budget)
        prompt, answer = turn.prompt[:prompt_length], turn.answer[:answer_length]
        budget -= prompt_length + answer_length
        learned_answer = not (masking.mask_history and number > 0)
        labels = prompt if masking.train_on_prompt else [IGNORED] * prompt_length
        pieces.append((prompt + answer, labels + (answer if learned_answer else [IGNORED] * answer_length)))
    if masking.mask_history:
        pieces.reverse()
    return Sequence1D(
        np.array([token for ids, _ in pieces for token in ids], dtype=np.int32),
        np.array([label for _, labels in pieces for label in labels], dtype=np.int32),
        cut=sum(len(ids) for ids, _ in pieces) < sum(len(turn.prompt) + len(turn.answer) for turn in turns),
    )


def shares(prompt: int, answer: int, budget: int) -> tuple[int, int]:
    """How many tokens of a prompt and of its answer fit into `budget`: the shorter is spared if it can be.

    An answer under half the budget is kept whole; else a prompt under half of it; else both are cut (400 and 400
    into 512 gives 256 and 256).
    """
    if answer * 2 < budget:
        room = budget
    elif prompt * 2 < budget:
        room = budget - prompt
    else:
        room = budget * answer // (prompt + answer)
    kept_answer = min(room, answer)
    return min(prompt, max(budget - kept_answer, 0)), kept_answer


def _as_chat(conversation: Conversation, template: Template) -> list[dict[str, Any]]:
    """The messages as `apply_chat_template` takes them."""
    if conversation.tools and not template.knows_tools:
        raise BadRecord(f"the template {template.name} cannot write the schemas of tools")
    if any(message.role == "tool" for message in conversation.messages) and not template.knows_tool_results:
        raise BadRecord(f"the template {template.name} cannot write the results of tools")
    chat = [_as_dict(message, number, template) for number, message in enumerate(conversation.messages)]
    _link_results(chat)
    if conversation.system and template.knows_system:
        return [{"role": "system", "content": conversation.system}, *chat]
    if conversation.system:
        chat[0] = {**chat[0], "content": f"{conversation.system}\n\n{chat[0]['content']}"}
    return chat


def _as_dict(message: Message, number: int, template: Template) -> dict[str, Any]:
    if not message.calls:
        return {"role": message.role, "content": message.content}
    if not template.knows_calls:
        content = "\n".join(text for text in (message.content, _calls_as_text(message.calls)) if text)
        return {"role": message.role, "content": content}
    calls = [
        # nine letters and digits, which is what the strictest templates ask of an id
        {"type": "function", "id": f"call{number:03}{index:02}", "function": dict(call)}
        for index, call in enumerate(message.calls)
    ]
    return {"role": message.role, "content": message.content, "tool_calls": calls}


def _link_results(chat: Sequence[dict[str, Any]]) -> None:
    """Tell each result which call it answers: they come in the order of the calls."""
    open_calls: list[dict[str, Any]] = []
    for message in chat:
        if message["role"] == "tool" and open_calls:
            call = open_calls.pop(0)
            message.update(tool_call_id=call["id"], name=call["function"]["name"])
        elif message["role"] != "tool":
            open_calls = list(message.get("tool_calls", ()))


def _calls_as_text(calls: Sequence[Mapping[str, Any]]) -> str:
    return json.dumps([dict(call) for call in calls] if len(calls) > 1 else dict(calls[0]), ensure_ascii=False)


def _prompt_and_full(
    chat: list[dict[str, Any]],
    position: int,
    conversation: Conversation,
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[str, str]:
    """The text before the answer at `position`, and the text up to and with it."""

    def written(messages: list[dict[str, Any]], *, generation_prompt: bool) -> str:
        return render(template, tokenizer, messages, generation_prompt=generation_prompt, tools=conversation.tools)

    prompt = written(chat[:position], generation_prompt=True)
    full = written(chat[: position + 1], generation_prompt=False)
    if full.startswith(prompt):
        return prompt, full
    # The generation prompt opens something that a finished answer does not have (a thought, say): the answer then
    # begins where its own text begins, which a text that stands nowhere else shows.
    probe = [*chat[:position], {"role": "assistant", "content": SENTINEL}]
    shown = written(probe, generation_prompt=False)
    at = shown.find(SENTINEL)
    if at < 0 or full[:at] != shown[:at]:
        raise BadRecord("where its answer begins cannot be told from the chat template; write `template`")
    return full[:at], full


def _up_to_the_end(answer: str, ends: tuple[str, ...]) -> tuple[str, bool]:
    """The answer up to its end token, without the blank lines that only lead to the next turn.

    True beside it where no single token ends the answer and one must be added.
    """
    bare = answer.rstrip()
    return bare, not bare.endswith(ends)
