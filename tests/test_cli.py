"""The commands, as a person gives them: what they print, what they leave, and the code that they end with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
from safetensors.torch import load_file
from typer.core import TyperGroup
from typer.testing import CliRunner

from tunefleet import cli
from tunefleet.errors import BrokenOff, Refused, RunFailed
from tunefleet.plan import Plan
from tunefleet.recipe.problems import Problem, RecipeError
from tunefleet.storage import Damaged
from tunefleet_strategies import registry
from tunefleet_strategies.errors import StrategyError

TWELVE = """
model_name_or_path: base
output_dir: outputs/first
finetuning_type: full
dataset: "a,,b"
lerning_rate: 1e-4
lora_rank: 8
learning_rate: fast
num_train_epochs: -1
optim: adafactor
save_steps: 1.5
bf16: true
fp16: true
quantization_bit: 4
seed: 1
seed: 2
do_eval: true
report_to: neptune
"""
TWELVE_KEYS = [
    *("dataset", "lerning_rate", "lora_rank", "learning_rate", "num_train_epochs", "optim", "save_steps", "bf16"),
    *("quantization_bit", "seed", "do_eval", "report_to"),
]


@dataclass(frozen=True)
class Answer:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)


Command = Callable[..., Answer]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that commands are given in. The home folder is an empty one beside it."""
    for name in ("work", "home"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "work"


@pytest.fixture
def command(work: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Gives a command in this process."""

    def give(*words: str | Path) -> Answer:
        monkeypatch.setattr(sys, "argv", ["tunefleet", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        code = caught.value.code
        assert code is None or isinstance(code, int)
        return Answer(code or 0, *capfd.readouterr())

    return give


@pytest.fixture
def recipe(work: Path, quickstart_world: Path) -> Path:
    """A recipe that would run."""
    keys = {
        "model_name_or_path": quickstart_world / "init",
        "dataset": "quickstart_train",
        "dataset_dir": quickstart_world / "data",
        "output_dir": "outputs/first",
        "cache_dir": "cache",
        "cutoff_len": 128,
        "max_samples": 20,
        "preprocessing_num_workers": 1,
        "finetuning_type": "full",
        "bf16": "false",
    }
    file = work / "recipe.yaml"
    file.write_text("".join(f"{key}: {value}\n" for key, value in keys.items()))
    return file


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def is_one_sentence(text: str) -> bool:
    return text.count("\n") == 1 and text.endswith(".\n") and "Traceback" not in text


# ---- a recipe that is wrong -----------------------------------------------------------------------------------------


def twelve_are_told(code: int, out: str, err: str) -> None:
    lines = err.splitlines()
    assert [line.partition(":")[0] for line in lines] == TWELVE_KEYS
    assert all("; " in line for line in lines), "a mend in each"
    assert (code, out) == (2, "")


def test_twelve_mistakes_are_told_at_once_and_nothing_is_written(tmp_path: Path) -> None:
    for name in ("work", "home", "temporary"):
        (tmp_path / name).mkdir()
    (tmp_path / "work" / "recipe.yaml").write_text(TWELVE)
    before = everything(tmp_path)
    home = {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "temporary")}
    done = subprocess.run(
        [sys.executable, "-c", "from tunefleet.__main__ import command; command()", "train", "recipe.yaml"],
        cwd=tmp_path / "work",
        env=os.environ | home,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    twelve_are_told(done.returncode, done.stdout, done.stderr)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("words", [["plan"], ["plan", "--no-data", "--json"], ["data"], ["train", "--json"]])
def test_every_command_that_reads_a_recipe_tells_the_twelve(
    command: Command, work: Path, tmp_path: Path, words: list[str]
) -> None:
    (work / "recipe.yaml").write_text(TWELVE)
    before = everything(tmp_path)
    answer = command(*words, "recipe.yaml")
    twelve_are_told(answer.code, answer.out, answer.err)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("name", ["train", "plan", "data"])
def test_a_missing_recipe_is_one_sentence(command: Command, name: str) -> None:
    answer = command(name, "nowhere.yaml")
    assert answer.code == 2
    assert answer.err.splitlines() == [answer.err.strip()]
    assert answer.err.startswith("nowhere.yaml: there is no such file")


def test_a_long_sentence_stays_on_one_line_and_is_shown_as_it_is(command: Command, recipe: Path) -> None:
    name = f"./{'deep/' * 40}[red]model[/]:x:"
    answer = command("plan", recipe, f"model_name_or_path='{name}'")
    assert answer.code == 2
    assert is_one_sentence(answer.err)
    assert f"{name} is no folder" in answer.err


@pytest.mark.parametrize(
    "words", [["plan", "{recipe}", "seed"], ["plan", "--nonsense"], ["data", "{recipe}", "--rows", "0"]]
)
def test_words_that_are_no_command_end_with_two(command: Command, recipe: Path, words: list[str]) -> None:
    assert command(*(word.format(recipe=recipe) for word in words)).code == 2


# ---- plan -----------------------------------------------------------------------------------------------------------


def test_a_plan_as_json_is_a_plan(command: Command, recipe: Path, work: Path) -> None:
    plan = Plan.model_validate(command("plan", recipe, "learning_rate=1e-3", "--json").json())
    assert plan.recipe.training.learning_rate == 1e-3
    assert plan.data is not None
    assert plan.data.train_rows == 20
    assert plan.batch.updates == 9
    assert plan.place.root == str(work)
    assert everything(work / "cache"), "the token cache is filled"


def test_a_plan_without_data_writes_nothing(command: Command, recipe: Path, tmp_path: Path) -> None:
    before = everything(tmp_path)
    answer = command("plan", recipe, "--no-data")
    assert answer.code == 0
    assert "known once the data is tokenised" in answer.out
    assert "learned tokens" not in answer.out
    assert everything(tmp_path) == before


def test_a_plan_for_people_shows_names_and_notices_as_they_are(
    command: Command, recipe: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    good = {"instruction": "What is json?", "input": "", "output": "It is a module."}
    rows = work / "rows [bold].jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in (good, good | {"output": 3})))
    answer = command("plan", recipe, f"dataset='{rows.name}'", "output_dir='out[lora]'")
    assert (answer.code, answer.err) == (0, "read training: 1 done\ntokenise training: 1 done\nwrite train: 1 done\n")
    assert " out[lora] " in answer.out
    assert "note 1 row is not used (rows [bold].jsonl row 2: " in answer.out
    assert "plan of out-lora" in answer.out


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("ray_num_workers=4000", "ray_num_workers: 4000"),
        ("model_name_or_path=./nowhere", "./nowhere is no folder"),
        ("dataset=nothing_like_this", "nothing_like_this"),
        ("fp16=true", "fp16"),
    ],
)
def test_what_cannot_run_is_refused_with_code_two(command: Command, recipe: Path, override: str, said: str) -> None:
    answer = command("plan", recipe, "bf16=null", override)
    assert (answer.code, answer.out) == (2, "")
    assert said in answer.err
    assert is_one_sentence(answer.err)


def test_two_workers_of_ratio_mode_are_refused_before_anything_starts(
    command: Command, recipe: Path, tmp_path: Path
) -> None:
    written = ["use_badam=true", "badam_mode=ratio", "ray_num_workers=2", "bf16=true"]
    before = everything(tmp_path)
    for name in ("plan", "train"):
        answer = command(name, recipe, *written)
        assert (answer.code, answer.out) == (2, "")
        assert answer.err == (
            "badam with badam_mode: ratio runs on one worker, but ray_num_workers is 2: write ray_num_workers: 1 and "
            "gradient_accumulation_steps: 2 to keep the global batch.\n"
        )
        assert everything(tmp_path) == before
    mended = command("plan", recipe, *written[:2], "ray_num_workers=1", "gradient_accumulation_steps=2", "--json")
    assert mended.json()["batch"]["global_batch_samples"] == 16


# ---- data -----------------------------------------------------------------------------------------------------------


def test_rows_as_json_say_what_is_learned(command: Command, recipe: Path, quickstart_world: Path) -> None:
    rows = command("data", recipe, "--rows", "2", "--json").json()
    first = json.loads((quickstart_world / "data" / "train.jsonl").read_text().splitlines()[0])
    assert [row["row"] for row in rows] == [0, 1]
    learned = "".join(span["text"] for span in rows[0]["spans"] if span["learned"])
    read = "".join(span["text"] for span in rows[0]["spans"] if not span["learned"])
    assert learned.startswith(first["output"][:40])
    assert first["instruction"] in read
    assert rows[0]["targets"] == sum(span["tokens"] for span in rows[0]["spans"] if span["learned"])


def test_rows_for_people_come_with_the_sizes_of_the_splits(command: Command, recipe: Path) -> None:
    command("data", recipe)
    answer = command("data", recipe, "--rows", "1")
    assert (answer.code, answer.err) == (0, "")
    assert "training" in answer.out
    assert "What is " in answer.out
    assert "held-out" not in answer.out


# ---- methods, schema, doctor ----------------------------------------------------------------------------------------


def test_methods_are_listed_with_names_and_keys(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = {method["name"]: method for method in command("methods", "--json").json()}
    assert [*listed] == [method.name for method in registry.methods()]
    assert listed["full"] == {
        "name": "full",
        "summary": "every parameter trains",
        "selector": {"finetuning_type": "full"},
        "keys": [],
    }
    assert {"lora_rank", "use_dora", "pissa_init"} <= {*listed["lora"]["keys"]}
    monkeypatch.setenv("COLUMNS", "200")
    answer = command("methods")
    assert answer.code == 0
    for method in listed.values():
        selected = ", ".join(f"{key}: {str(value).lower()}" for key, value in method["selector"].items())
        assert f" {method['name']} " in answer.out
        assert f" {selected} " in answer.out
        assert method["summary"].split()[0] in answer.out


def test_the_matrix_says_where_each_method_runs(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = command("methods", "--matrix", "--json").json()
    ratio = next(line for line in lines if line["form"] == "badam_mode: ratio")
    assert [cell["refusal"] for cell in ratio["cells"]][:2] == [None, "badam with badam_mode: ratio runs on one worker"]
    monkeypatch.setenv("COLUMNS", "200")
    answer = command("methods", "--matrix")
    assert answer.code == 0
    assert "badam with badam_mode: ratio runs on one worker" in answer.out
    monkeypatch.setenv("COLUMNS", "80")  # as where the output is no terminal
    narrow = command("methods", "--matrix").out
    assert all(word in narrow for line in lines for word in line["form"].split())
    assert (
        command("methods", "--matrix", "--markdown").out
        == (Path(__file__).resolve().parents[1] / "docs" / "places.md").read_text()
    )


def test_the_schema_is_a_json_schema_of_recipes(command: Command) -> None:
    schema = command("schema").json()
    jsonschema.Draft202012Validator.check_schema(schema)
    good = {"model_name_or_path": "base", "dataset": "rows.jsonl", "output_dir": "out"}
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid(good)
    assert not validator.is_valid(good | {"lerning_rate": 1})


def test_the_schema_as_a_page_is_the_one_in_docs(command: Command, repository: Path) -> None:
    answer = command("schema", "--markdown")
    assert (answer.code, answer.err) == (0, "")
    assert answer.out == (repository / "docs" / "recipe.md").read_text(encoding="utf-8")


def test_the_doctor_names_the_stack_and_its_code_says_whether_all_is_well(command: Command) -> None:
    answer = command("doctor", "--json")
    findings = json.loads(answer.out)
    assert {"python", "ray", "torch", "transformers", "peft", "cpu", "bf16", "disk"} <= {
        one["name"] for one in findings
    }
    assert all({*one} == {"name", "value", "ok"} for one in findings)
    assert answer.code == (0 if all(one["ok"] for one in findings) else 1)


def test_a_doctor_who_misses_something_says_so_and_ends_with_one(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunefleet.launch.doctor._NEEDED", ("ray", "no-such-package"))
    answer = command("doctor")
    assert answer.code == 1
    assert "missing: pip install no-such-package" in answer.out


# ---- export and generate --------------------------------------------------------------------------------------------


def test_an_answer_is_printed_as_it_is(command: Command, tiny_model: Path) -> None:
    words = ["generate", tiny_model, "--prompt", "What is json?", "--max-new-tokens", "60"]
    said = command(*words, "--json").json()
    assert said["prompt"] == "What is json?"
    assert len(said["answer"]) > 80, "longer than a line"
    answer = command(*words)
    assert (answer.code, answer.out) == (0, said["answer"] + "\n")


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_model_is_exported_whole(command: Command, tiny_model: Path, work: Path, dtype: str | None) -> None:
    wanted = [] if dtype is None else ["--dtype", dtype]
    written = command("export", tiny_model, "whole", *wanted, "--json").json()
    assert written == {"folder": "whole"}
    before, after = load_file(tiny_model / "model.safetensors"), load_file(work / "whole" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all((before[name].to(after[name].dtype) == after[name]).all() for name in before)
    assert {str(value.dtype) for value in after.values()} == {f"torch.{dtype or 'float32'}"}
    assert (work / "whole" / "tokenizer.json").is_file()


def test_the_folder_of_an_export_is_printed_on_one_line(command: Command, tiny_model: Path, work: Path) -> None:
    to = f"{'deep/' * 20}whole[bold]"
    answer = command("export", tiny_model, to)
    assert (answer.code, answer.out) == (0, f"{to}\n")
    assert (work / to / "config.json").is_file()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["generate", "nowhere", "--prompt", "x"], "nowhere holds neither"),
        (["export", "nowhere", "to"], "nowhere holds neither"),
        (["export", "{model}", "to", "--dtype", "int3"], "dtype int3 is unknown"),
        (["export", "{model}", "."], "is not empty"),
        (["generate", "{model}", "--prompt", "x", "--base", "y"], "leave base out"),
    ],
)
def test_folders_that_do_not_fit_are_refused_with_code_two(
    command: Command, tiny_model: Path, work: Path, words: list[str], said: str
) -> None:
    (work / "file").touch()
    answer = command(*(word.format(model=tiny_model) for word in words))
    assert (answer.code, answer.out) == (2, "")
    assert said in answer.err
    assert is_one_sentence(answer.err)
    assert everything(work) == ["file"]


# ---- errors and codes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (
            RecipeError([Problem("seed", "is odd", "write 2"), Problem("x", "is no key")]),
            2,
            "seed: is odd; write 2\nx: is no key\n",
        ),
        (Refused("No [red]way[/]: mend it."), 2, "No [red]way[/]: mend it.\n"),
        (StrategyError("no such layer; name another"), 2, "no such layer; name another\n"),
        (RunFailed("The run failed."), 1, "The run failed.\n"),
        (Damaged("gone"), 1, "gone\n"),
        (BrokenOff("Broken off: it goes on from step 3."), 130, "Broken off: it goes on from step 3.\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_an_error_becomes_its_sentence_and_a_code(
    command: Command, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, said: str
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("tunefleet.launch.doctor.examine", fail)
    answer = command("doctor")
    assert (answer.code, answer.out, answer.err.lstrip("\n")) == (code, "", said)


def test_the_commands_are_listed_without_loading_torch_or_ray() -> None:
    script = (
        "import sys; from typer.testing import CliRunner; from tunefleet.cli import app; "
        "said = CliRunner().invoke(app, ['--help']); print(said.output); print(said.exit_code); "
        "print([name for name in ('torch', 'ray', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    *page, code, loaded = done.stdout.splitlines()
    assert (code, loaded) == ("0", "[]")
    for name in ("train", "plan", "data", "export", "generate", "schema", "methods", "doctor"):
        assert any(name in line for line in page)


def commands_of(group: object, *words: str) -> list[tuple[str, ...]]:
    """The words of a command and of all that are below it."""
    below = group.commands.items() if isinstance(group, TyperGroup) else ()
    return [words, *(found for name, one in below for found in commands_of(one, *words, name))]


@pytest.mark.parametrize("words", commands_of(typer.main.get_command(cli.app)), ids=" ".join)
def test_every_command_says_what_it_takes(words: tuple[str, ...]) -> None:
    """Its page is markup: what stands in brackets without need may be taken for a tag, and break it."""
    said = CliRunner().invoke(cli.app, [*words, "--help"])
    assert said.exit_code == 0, said.exception
    assert "Usage" in said.output
