"""YAML as people write it, and what is wrong with a file as a whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tunefleet.recipe.problems import RecipeError
from tunefleet.recipe.yaml_text import read_mapping, read_overrides, read_text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("1e-5", 1e-5), ("1E-4", 1e-4), ("5.0e-5", 5e-5), ("1e5", 1e5), ("-1e+3", -1000.0), (".5", 0.5), ("1.", 1.0)),
        *(("2_000", 2000), ("010", 10), ("-1", -1), ("+3", 3), ("1_0.5", 10.5)),
        *(("true", True), ("no", False), ("On", True), ("none", "none"), ("null", None), ("~", None), ("", None)),
        *(("1:30", "1:30"), ("2024-01-01", "2024-01-01"), ("0x10", "0x10"), ("1e", "1e"), ("e5", "e5"), ("=", "=")),
        *(("'1e-5'", "1e-5"), ("q_proj,v_proj", "q_proj,v_proj"), ("[1, 2e0]", [1, 2.0]), ("{GPU: 1}", {"GPU": 1})),
    ],
)
def test_values_mean_what_they_look_like(text: str, value: object) -> None:
    keys, problems = read_mapping(f"key: {text}", "r.yaml")
    assert problems == []
    assert keys == {"key": value}
    assert type(keys["key"]) is type(value)


def test_other_readers_of_yaml_keep_their_own_rules() -> None:
    assert yaml.safe_load("a: 1e-5")["a"] == "1e-5"


def test_keys_are_words_whatever_they_look_like() -> None:
    keys, _ = read_mapping("on: 1\n3: 2\nnull: 3\n", "r.yaml")
    assert keys == {"on": 1, "3": 2, "null": 3}


def test_duplicate_keys_are_all_found_with_their_lines() -> None:
    _, problems = read_mapping("a: 1\nb: 2\na: 3\nc:\n  d: 1\n  d: 2\n", "r.yaml")
    assert sorted((p.key, p.what) for p in problems) == [
        ("a", "is written twice (lines 1 and 3)"),
        ("d", "is written twice (lines 5 and 6)"),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        *(("", "is empty"), ("# only a remark\n", "is empty"), ("---\n", "is not a list of keys and values")),
        *(("- a\n- b\n", "is not a list of keys and values"), ("words", "is not a list of keys and values")),
        *(
            ("a: b: c", "is not valid YAML (line 1, column 5)"),
            ("a: [1", "is not valid YAML"),
            ("a:\n\t- b", "not valid"),
        ),
        *(("a: 1\n---\nb: 2\n", "is not valid YAML"), ("a: \x00", "has a character that text cannot have")),
        *(("a: *b", "is not valid YAML"), ("a: " + "[" * 3000, "is nested too deeply")),
    ],
)
def test_a_file_that_is_no_recipe_is_one_clear_sentence(text: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_mapping(text, "r.yaml")
    assert len(caught.value.problems) == 1
    line = str(caught.value)
    assert line.startswith("r.yaml: ")
    assert said in line
    assert "\n" not in line


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"output_dir: caf\xe9\n")
    for path, said in (
        (tmp_path / "none.yaml", "there is no such file"),
        (tmp_path, "is a folder"),
        (tmp_path / "latin.yaml", "is not UTF-8 text (byte 15)"),
        (tmp_path / "latin.yaml" / "x", "cannot be read"),
    ):
        with pytest.raises(RecipeError) as caught:
            read_text(path)
        assert said in str(caught.value)


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbfseed: 1\n")
    assert read_mapping(read_text(path), "r.yaml")[0] == {"seed": 1}


@pytest.mark.parametrize(
    "value", ["!!python/object/apply:os.system ['true']", "!!python/name:os.system", "!wanted 1", "&a [*a]", "9" * 5000]
)
def test_what_is_not_plain_data_is_never_built(value: str) -> None:
    keys, problems = read_mapping(f"seed: {value}\nother: 1\n", "r.yaml")
    assert keys == {"other": 1}
    assert [p.key for p in problems] == ["seed"]


def test_a_key_that_is_no_word_is_told() -> None:
    _, problems = read_mapping("? [a]\n: 1\n", "r.yaml")
    assert "has a key that is not a word (line 1)" in problems[0].what


def test_overrides_are_yaml_values_and_the_last_one_counts() -> None:
    values, problems = read_overrides(["a=1e-3", "b = x", "c={d: [1]}", "e=null", "f=a=b", "a=2"])
    assert problems == []
    assert values == {"a": 2, "b": "x", "c": {"d": [1]}, "e": None, "f": "a=b"}


@pytest.mark.parametrize("word", ["oops", "=3", "", "a b=3", "a=", "a=[1", "a=!!python/name:os.system", "a: 3"])
def test_a_malformed_override_is_a_problem(word: str) -> None:
    values, problems = read_overrides([word, "seed=1"])
    assert values == {"seed": 1}
    assert len(problems) == 1
