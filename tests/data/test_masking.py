"""Which tokens of a conversation are learned, and what is cut."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from tunefleet.data.encode import Encoder
from tunefleet.data.formats import Conversation, Message
from tunefleet.data.masking import IGNORED, Masking, PieceEncoder, Sequence1D, TurnIds, masked, shares, turn_texts
from tunefleet.data.templates import choose

MakeTokenizer = Callable[..., PreTrainedTokenizerBase]

TALK = Conversation(
    (Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "Two?"), Message("assistant", "Four.")),
    system="Be brief.",
)
LONG = Masking(cutoff_len=10_000)


def encoded(
    tokenizer: PreTrainedTokenizerBase, talk: Conversation = TALK, name: str | None = None, masking: Masking = LONG
) -> list[Sequence1D]:
    result = Encoder(tokenizer, choose(name, tokenizer)[0], masking)([talk])[0]
    assert not isinstance(result, str), result
    return result


def learned(tokenizer: PreTrainedTokenizerBase, sequence: Sequence1D) -> list[str]:
    """The learned stretches, decoded."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], sequence.labels != IGNORED, [False]])))
    return [str(tokenizer.decode(sequence.ids[start:end].tolist())) for start, end in edges.reshape(-1, 2)]


def test_every_answer_is_learned_with_its_end_and_nothing_else(chat_tokenizer: PreTrainedTokenizerBase) -> None:
    (sequence,) = encoded(chat_tokenizer)
    assert learned(chat_tokenizer, sequence) == ["Hello<|im_end|>", "Four.<|im_end|>"]
    begin = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello"
    assert str(chat_tokenizer.decode(sequence.ids.tolist())).startswith(begin + "<|im_end|>\n<|im_start|>user\nTwo?")
    assert np.array_equal(sequence.labels[sequence.labels != IGNORED], sequence.ids[sequence.labels != IGNORED])


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("alpaca", "Hello</s>"),
        ("default", "Hello</s>"),
        ("gemma", "Hello<end_of_turn>"),
        ("llama2", " Hello </s>"),
        ("llama3", "Hello<|eot_id|>"),
        ("mistral", " Hello</s>"),
        ("qwen", "Hello<|im_end|>"),
    ],
)
def test_named_templates_learn_the_answers(name: str, first: str, plain_tokenizer: PreTrainedTokenizerBase) -> None:
    (sequence,) = encoded(plain_tokenizer, name=name)
    answers = learned(plain_tokenizer, sequence)
    assert answers == [first, first.replace("Hello", "Four.")]


def test_the_prompt_has_the_ids_it_has_in_use(chat_tokenizer: PreTrainedTokenizerBase) -> None:
    (sequence,) = encoded(chat_tokenizer)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    prompt = chat_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert sequence.ids[: len(prompt)].tolist() == prompt
    assert (sequence.labels[: len(prompt)] == IGNORED).all()
    assert sequence.labels[len(prompt)] != IGNORED


def test_a_template_that_forgets_gives_each_answer_the_prompt_it_will_meet(
    make_tokenizer: MakeTokenizer, forgetting: str
) -> None:
    tokenizer = make_tokenizer(chat_template=forgetting)
    first, second = encoded(tokenizer)
    assert learned(tokenizer, first) == ["<think>\n\n</think>\n\nHello<|im_end|>"]
    assert learned(tokenizer, second) == ["<think>\n\n</think>\n\nFour.<|im_end|>"]
    assert "assistant\nHello<|im_end|>\n<|im_start|>user\nTwo?" in tokenizer.decode(second.ids.tolist())
    (last,) = encoded(tokenizer, masking=Masking(10_000, mask_history=True))
    assert np.array_equal(last.labels, second.labels)


def test_a_generation_prompt_that_opens_a_thought_is_not_part_of_the_answer(
    make_tokenizer: MakeTokenizer, chatml: str
) -> None:
    opening = chatml.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    tokenizer = make_tokenizer(chat_template=opening)
    (sequence,) = encoded(tokenizer)
    assert learned(tokenizer, sequence) == ["Hello<|im_end|>", "Four.<|im_end|>"]


def test_an_end_mark_that_is_only_text_is_followed_by_a_learned_end_token(
    make_tokenizer: MakeTokenizer, chatml: str
) -> None:
    tokenizer = make_tokenizer(marks=False, chat_template=chatml)
    (sequence,) = encoded(tokenizer)
    assert learned(tokenizer, sequence) == ["Hello<|im_end|></s>", "Four.<|im_end|></s>"]


def test_a_system_prompt_that_has_no_role_joins_the_first_question(make_tokenizer: MakeTokenizer, chatml: str) -> None:
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + chatml
    tokenizer = make_tokenizer(chat_template=template)
    (sequence,) = encoded(tokenizer)
    assert str(tokenizer.decode(sequence.ids.tolist())).startswith("<|im_start|>user\nBe brief.\n\nHi<|im_end|>")


def test_pieces_of_one_text_get_no_blank_of_their_own(blank_first_tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer = blank_first_tokenizer
    encode = PieceEncoder(tokenizer)
    first, second, third = encode(["[a", "b]\n", "b"], [False, True, True])
    assert first + second + third == tokenizer("[ab]\nb", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(second) == ["b", "]", "<0x0A>"]


def test_calls_and_results_of_tools(plain_tokenizer: PreTrainedTokenizerBase) -> None:
    talk = Conversation(
        (
            Message("user", "add"),
            Message("assistant", "", ({"name": "plus", "arguments": {"a": 2}},)),
            Message("tool", "4"),
            Message("assistant", "Four."),
        )
    )
    (sequence,) = encoded(plain_tokenizer, talk, "qwen")
    assert learned(plain_tokenizer, sequence) == [
        '\n<tool_call>\n{"name": "plus", "arguments": {"a": 2}}\n</tool_call><|im_end|>'[1:],
        "Four.<|im_end|>",
    ]
    refused = Encoder(plain_tokenizer, choose("alpaca", plain_tokenizer)[0], LONG)([talk])[0]
    assert refused == "the template alpaca cannot write the results of tools"


def test_a_conversation_that_the_template_refuses_is_a_bad_row(make_tokenizer: MakeTokenizer, chatml: str) -> None:
    template = chatml.replace(
        "{% for m in messages %}", "{% for m in messages %}{{ raise_exception('odd') if 'odd' in m['content'] }}"
    )
    tokenizer = make_tokenizer(chat_template=template)
    odd = Conversation((Message("user", "odd"), Message("assistant", "x")))
    good, bad = Encoder(tokenizer, choose(None, tokenizer)[0], LONG)([TALK, odd])
    assert not isinstance(good, str)
    assert bad == "the chat template refuses it: odd"


@pytest.mark.parametrize(
    ("prompt", "answer", "budget", "kept"),
    [
        (400, 400, 512, (256, 256)),
        (1000, 100, 512, (412, 100)),
        (100, 1000, 512, (100, 412)),
        (10, 10, 512, (10, 10)),
        (300, 600, 300, (100, 200)),
        (5, 5, 1, (1, 0)),
    ],
)
def test_the_shorter_part_is_spared(prompt: int, answer: int, budget: int, kept: tuple[int, int]) -> None:
    assert shares(prompt, answer, budget) == kept


TURNS = [TurnIds([1, 2, 3], [4, 5]), TurnIds([6, 7], [8, 9])]


def test_turns_are_cut_one_after_the_other() -> None:
    cut = masked(TURNS, Masking(cutoff_len=7))
    # the second turn has a budget of 2: both parts reach half of it and give in proportion
    assert cut.ids.tolist() == [1, 2, 3, 4, 5, 6, 8]
    assert cut.labels.tolist() == [IGNORED, IGNORED, IGNORED, 4, 5, IGNORED, 8]
    assert masked(TURNS, Masking(cutoff_len=5)).ids.tolist() == [1, 2, 3, 4, 5]


def test_mask_history_learns_the_last_turn_and_fills_from_the_back() -> None:
    whole = masked(TURNS, Masking(9, mask_history=True))
    assert whole.ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert whole.labels.tolist() == [IGNORED] * 7 + [8, 9]
    assert masked(TURNS, Masking(6, mask_history=True)).ids.tolist() == [1, 2, 6, 7, 8, 9]


def test_train_on_prompt_learns_everything() -> None:
    whole = masked(TURNS, Masking(9, train_on_prompt=True))
    assert np.array_equal(whole.ids, whole.labels)


def test_the_texts_of_a_stable_template_join_to_its_rendering(chat_tokenizer: PreTrainedTokenizerBase) -> None:
    template, _ = choose(None, chat_tokenizer)
    (turns,) = turn_texts(TALK, template, chat_tokenizer)
    joined = "".join(turn.prompt + turn.answer for turn in turns)
    messages = [{"role": "system", "content": TALK.system}]
    messages += [{"role": message.role, "content": message.content} for message in TALK.messages]
    assert joined + "\n" == chat_tokenizer.apply_chat_template(messages, tokenize=False)
