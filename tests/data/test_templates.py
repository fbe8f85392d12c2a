"""Each named template against a worked example, and what is found out about any template."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerBase

from tunefleet.data.templates import choose, render, template_names
from tunefleet.errors import Refused

MakeTokenizer = Callable[..., PreTrainedTokenizerBase]

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]
ALPACA_SYSTEM = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)
# The published formats of the models these names stand for, with <s> and </s> as begin and end of sequence.
EXAMPLES = {
    "alpaca": "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello</s>\n\n"
    "### Instruction:\nBye\n\n### Response:\n",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello"
    "<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    "default": "System: Be brief.</s>\nHuman: Hi</s>\nAssistant:Hello</s>\nHuman: Bye</s>\nAssistant:",
    "gemma": "<s><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
    "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n",
    "llama2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello </s><s>[INST] Bye [/INST]",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user"
    "<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] Be brief.\n\nHi[/INST] Hello</s>[INST] Bye[/INST]",
}
EXAMPLES["qwen"] = EXAMPLES["qwen3_nothink"] = EXAMPLES["chatml"]


@pytest.mark.parametrize("name", template_names())
def test_named_templates_write_the_published_format(name: str, plain_tokenizer: PreTrainedTokenizerBase) -> None:
    template, notices = choose(name, plain_tokenizer)
    assert render(template, plain_tokenizer, CHAT, generation_prompt=True) == EXAMPLES[name]
    assert notices == ()


def test_systems_of_their_own(plain_tokenizer: PreTrainedTokenizerBase) -> None:
    alpaca, qwen = (
        render(choose(name, plain_tokenizer)[0], plain_tokenizer, CHAT[1:2], generation_prompt=True)
        for name in ("alpaca", "qwen")
    )
    assert alpaca == ALPACA_SYSTEM + "### Instruction:\nHi\n\n### Response:\n"
    assert qwen.startswith("<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|")


@pytest.mark.parametrize(
    ("name", "stop"),
    [("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("gemma", "<end_of_turn>"), ("alpaca", "</s>")],
)
def test_generation_can_stop_at_one_token(name: str, stop: str, plain_tokenizer: PreTrainedTokenizerBase) -> None:
    template, _ = choose(name, plain_tokenizer)
    assert template.stop_token_ids == (plain_tokenizer.convert_tokens_to_ids(stop),)


def test_a_mark_that_is_no_token_is_followed_by_the_end_token(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(marks=False)
    template, _ = choose("chatml", tokenizer)
    written = render(template, tokenizer, CHAT, generation_prompt=True)
    assert "assistant\nHello<|im_end|></s>\n<|im_start|>user\nBye<|im_end|>\n" in written
    assert template.stop_token_ids == (tokenizer.eos_token_id,)


def test_the_tokenizers_own_template_is_the_default(chat_tokenizer: PreTrainedTokenizerBase, chatml: str) -> None:
    template, notices = choose(None, chat_tokenizer)
    assert (template.name, template.jinja, notices) == ("tokenizer", chatml, ())
    assert choose("alpaca", chat_tokenizer)[0].name == "alpaca"


def test_without_any_template_default_is_used_and_said(plain_tokenizer: PreTrainedTokenizerBase) -> None:
    template, notices = choose(None, plain_tokenizer)
    assert template.name == "default"
    assert "`template: default` is used" in notices[0]


def test_an_unknown_name_is_refused_with_the_nearest(plain_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(Refused, match="Did you mean `llama3`"):
        choose("lama3", plain_tokenizer)


def test_a_tokenizer_that_begins_texts_with_bos_gets_it_in_every_named_template(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(bos=True)
    template, _ = choose("chatml", tokenizer)
    assert render(template, tokenizer, CHAT, generation_prompt=True) == "<s>" + EXAMPLES["chatml"]


def test_a_missing_generation_prompt_is_added(make_tokenizer: MakeTokenizer, chatml: str) -> None:
    tokenizer = make_tokenizer(chat_template=chatml.split("{% if add_generation")[0])
    template, notices = choose(None, tokenizer)
    assert "has no generation prompt" in notices[0]
    assert render(template, tokenizer, CHAT[1:2], generation_prompt=True).endswith("<|im_start|>assistant\n")


def test_rows_do_not_depend_on_the_day(make_tokenizer: MakeTokenizer, chatml: str) -> None:
    tokenizer = make_tokenizer(chat_template="{{ strftime_now('%d %b %Y') }}\n" + chatml)
    template, notices = choose(None, tokenizer)
    assert render(template, tokenizer, CHAT[1:2], generation_prompt=True).startswith("26 Jul 2024\n<|im_start|>user")
    assert any("date" in notice for notice in notices)


def test_what_a_template_cannot_say_is_found_out(
    chat_tokenizer: PreTrainedTokenizerBase, make_tokenizer: MakeTokenizer, chatml: str
) -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + chatml
    template, _ = choose(None, make_tokenizer(chat_template=strict))
    assert not template.knows_system
    silent = chatml.replace("{% for m in messages %}", "{% for m in messages if m['role'] in ['user', 'assistant'] %}")
    template, _ = choose(None, make_tokenizer(chat_template=silent))
    assert not template.knows_system
    assert not template.knows_tool_results
    assert choose(None, chat_tokenizer)[0].knows_system


def test_a_broken_template_is_refused(make_tokenizer: MakeTokenizer) -> None:
    with pytest.raises(Refused, match="cannot write one question"):
        choose(None, make_tokenizer(chat_template="{{ raise_exception('no') }}"))
