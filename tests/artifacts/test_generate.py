"""One answer: base found, template used, stopped at the end of the turn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tunefleet.artifacts.generate import answer, prompt_ids, turn_end
from tunefleet.errors import Refused

Make = Callable[..., Path]
HASHES = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n##\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def teach(folder: Path, text: str, reply: str) -> None:
    """Fit the model to answer `text` by `reply`, by plain gradient steps."""
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    model = AutoModelForCausalLM.from_pretrained(str(folder))
    asked = tokenizer(text, add_special_tokens=False)["input_ids"]
    said = tokenizer(reply, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([asked + said])
    labels = torch.tensor([[-100] * len(asked) + said])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    model.save_pretrained(str(folder))


def test_the_answer_ends_with_the_turn(tmp_path: Path, make_model: Make) -> None:
    folder = make_model(tmp_path / "model")
    asked = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    teach(folder, asked, "Hello!<|im_end|>\nNo more of this, it is behind the end")
    assert answer(folder, "hi", max_new_tokens=40) == "Hello!"
    assert answer(folder, "hi", max_new_tokens=3) == "Hel"


def test_an_end_of_turn_in_plain_text_stops_too(tmp_path: Path, make_model: Make) -> None:
    folder = make_model(tmp_path / "model", template=HASHES)
    teach(folder, "user: hi\n##\nassistant: ", "Hello!\n##\nuser: no more")
    assert answer(folder, "hi", max_new_tokens=40) == "Hello!"


def test_without_a_template_the_prompt_is_continued(tmp_path: Path, make_model: Make) -> None:
    folder = make_model(tmp_path / "model", template=None)
    teach(folder, "one two", " three</s> four")
    assert answer(folder, "one two", max_new_tokens=20) == "three"
    with pytest.raises(Refused, match="no chat template"):
        answer(folder, "one two", system="be brief")


def test_an_adapter_finds_its_base(
    tmp_path: Path, make_model: Make, make_adapter: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_model(tmp_path / "base", scale=3.0)
    monkeypatch.chdir(tmp_path)
    model = AutoModelForCausalLM.from_pretrained("base")  # the adapter then names a relative path
    adapter = make_adapter(tmp_path / "adapter", model, r=4, target_modules=["q_proj", "o_proj"], lora_alpha=64)
    by_itself = answer(adapter, "hi", max_new_tokens=12)
    assert by_itself == answer(adapter, "hi", max_new_tokens=12, base=str(base))
    assert by_itself != answer(base, "hi", max_new_tokens=12)


def test_sampling_depends_on_the_seed_alone(tmp_path: Path, make_model: Make) -> None:
    folder = make_model(tmp_path / "model")
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    first = answer(folder, "hi", temperature=1.0, seed=1, max_new_tokens=16)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert answer(folder, "hi", temperature=1.0, seed=1, max_new_tokens=16) == first
    assert answer(folder, "hi", temperature=1.0, seed=2, max_new_tokens=16) != first


def test_the_prompt_is_written_by_the_template(tmp_path: Path, make_model: Make) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(make_model(tmp_path / "model")))
    text = tokenizer.decode(prompt_ids(tokenizer, "hi", "be brief")[0])
    assert text == ("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert turn_end(tokenizer).token == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_what_cannot_be_answered_is_refused(tmp_path: Path, make_model: Make) -> None:
    folder = make_model(tmp_path / "model")
    with pytest.raises(Refused, match="max_new_tokens"):
        answer(folder, "hi", max_new_tokens=0)
    with pytest.raises(Refused, match="temperature"):
        answer(folder, "hi", temperature=-1.0)
    with pytest.raises(Refused, match="reads 64: shorten it"):
        answer(folder, "long " * 40)


def test_an_answer_fills_at_most_what_the_model_reads(tmp_path: Path, make_model: Make) -> None:
    folder = make_model(tmp_path / "model", template=None)
    assert 1 <= len(answer(folder, "x" * 60, max_new_tokens=500)) <= 4  # a token is a byte, so a character at most
