"""What is exported computes what base and adapters compute, loaded by transformers alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tunefleet.artifacts.export import export
from tunefleet.errors import Refused

Make = Callable[..., Path]
LLAMA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}


def load(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(str(folder), dtype="auto")
    model.eval()
    return model


def logits(model: torch.nn.Module) -> Tensor:
    ids = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, use_cache=False).logits
    return found


def with_adapters(base: Path, *adapters: Path) -> Tensor:
    """The reference: PEFT beside the base, only what comes before the last adapter merged."""
    model = load(base)
    for adapter in adapters[:-1]:
        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return logits(PeftModel.from_pretrained(model, str(adapters[-1])).eval())


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", LLAMA),
        ("llama", {**LLAMA, "use_rslora": True}),
        ("llama", {**LLAMA, "use_dora": True}),
        ("llama", {**LLAMA, "modules_to_save": ["lm_head", "norm"]}),
        ("llama-tied", LLAMA),
        ("llama-tied", {"r": 4, "target_modules": ["q_proj", "embed_tokens"]}),
        ("llama-tied", {"r": 4, "target_modules": ["q_proj", "lm_head"]}),
        ("llama-tied", {**LLAMA, "modules_to_save": ["lm_head"]}),
        ("llama-tied", {**LLAMA, "modules_to_save": ["embed_tokens"]}),
        ("llama-tied", {**LLAMA, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
        ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    ],
)
def test_merged_equals_base_plus_adapter(
    tmp_path: Path, make_model: Make, make_adapter: Make, name: str, settings: dict[str, object]
) -> None:
    base = make_model(tmp_path / "base", name)
    adapter = make_adapter(tmp_path / "adapter", base, **settings)
    expected = with_adapters(base, adapter)
    assert (expected - logits(load(base))).abs().max() > 0.01
    written = export(adapter, tmp_path / "merged")
    shutil.rmtree(base)
    assert not (written / "adapter_config.json").exists()
    assert (expected - logits(load(written))).abs().max() < 1e-5
    assert json.loads((written / "config.json").read_text())["vocab_size"] == 262


def test_a_tied_model_stays_tied(tmp_path: Path, make_model: Make, make_adapter: Make) -> None:
    base = make_model(tmp_path / "base", "llama-tied")
    written = export(make_adapter(tmp_path / "adapter", base, **LLAMA), tmp_path / "merged")
    assert json.loads((written / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(written / "model.safetensors")


def test_a_chain_of_adapters_is_merged_in_order(
    tmp_path: Path, make_model: Make, make_adapter: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_model(tmp_path / "base")
    settings = {**LLAMA, "use_dora": True}  # with DoRA the order counts
    first = make_adapter(tmp_path / "first", base, seed=1, **settings)
    middle = PeftModel.from_pretrained(load(base), str(first)).merge_and_unload()
    last = make_adapter(tmp_path / "last", middle, seed=2, **settings)
    chain = {"base": "base", "adapters": ["../first"]}
    (last / "tunefleet_chain.json").write_text(json.dumps(chain), encoding="utf-8")
    monkeypatch.chdir(tmp_path)  # the base from here, the earlier adapter from its folder
    written = export(Path("last"), Path("merged"))
    assert (with_adapters(base, first, last) - logits(load(written))).abs().max() < 1e-5
    shutil.rmtree(first)
    (last / "tunefleet_chain.json").write_text(json.dumps(chain), encoding="utf-8")
    with pytest.raises(Refused, match="merged before"):
        export(last, tmp_path / "again")


def test_a_half_precision_base_is_rounded_once(tmp_path: Path, make_model: Make, make_adapter: Make) -> None:
    base = make_model(tmp_path / "base", dtype=torch.bfloat16)
    wide = load(base).to(torch.float32)  # type: ignore[arg-type]
    adapter = make_adapter(tmp_path / "adapter", base, **LLAMA)
    exact = PeftModel.from_pretrained(wide, str(adapter)).merge_and_unload().state_dict()
    merged = load(export(adapter, tmp_path / "merged")).state_dict()
    for name, weight in merged.items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, exact[name].to(torch.bfloat16)), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_number_format_can_be_chosen(tmp_path: Path, make_model: Make, dtype: str) -> None:
    base = make_model(tmp_path / "base", dtype=torch.bfloat16)
    written = export(base, tmp_path / "copy", dtype=dtype)
    assert str(load(written).dtype) == f"torch.{dtype}"
    assert (logits(load(base)).float() - logits(load(written)).float()).abs().max() < 0.1


def test_the_tokenizer_goes_along_with_its_template(tmp_path: Path, make_model: Make, make_adapter: Make) -> None:
    base = make_model(tmp_path / "base", template=None)
    adapter = make_adapter(tmp_path / "adapter", base, **LLAMA)
    plain = AutoTokenizer.from_pretrained(str(export(adapter, tmp_path / "plain")))
    tuned = AutoTokenizer.from_pretrained(str(base))
    tuned.chat_template = "{{ messages[0]['content'] }}!"
    tuned.save_pretrained(str(adapter))
    written = AutoTokenizer.from_pretrained(str(export(adapter, tmp_path / "merged")))
    assert plain.chat_template is None
    assert written.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a!"


def test_what_is_there_is_not_overwritten(tmp_path: Path, make_model: Make) -> None:
    base = make_model(tmp_path / "base")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(Refused, match="not empty"):
        export(base, tmp_path / "full")
    (tmp_path / "empty").mkdir()
    assert (export(base, tmp_path / "empty") / "config.json").is_file()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_refusals_name_what_is_wrong(tmp_path: Path, make_model: Make, make_adapter: Make) -> None:
    base = make_model(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base, **LLAMA)
    with pytest.raises(Refused, match="float32, bfloat16, float16"):
        export(base, tmp_path / "x", dtype="int3")
    with pytest.raises(Refused, match="needs no base"):
        export(base, tmp_path / "x", base=str(base))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(Refused, match="neither"):
        export(tmp_path / "nothing", tmp_path / "x")
    base.rename(tmp_path / "moved")
    with pytest.raises(Refused, match=r"base model .* is not on this machine: name it with base"):
        export(adapter, tmp_path / "x")
    assert export(adapter, tmp_path / "x", base=str(tmp_path / "moved")).is_dir()


def change(adapter: Path, **changes: object) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}), encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"r": 8}, "size mismatch"),
        ({"target_modules": ["q_proj"]}, "no counterpart"),
        ({"target_modules": ["q_proj", "down_proj", "v_proj"]}, "no counterpart"),
        ({"target_modules": ["wq"]}, "wq"),
        ({"init_lora_weights": "pissa_niter_16"}, "residual base"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    tmp_path: Path, make_model: Make, make_adapter: Make, changes: dict[str, object], words: str
) -> None:
    adapter = make_adapter(tmp_path / "adapter", make_model(tmp_path / "base"), **LLAMA)
    change(adapter, **changes)
    with pytest.raises(Refused, match=words):
        export(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
