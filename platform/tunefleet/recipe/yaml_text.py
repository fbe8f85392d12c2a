"""YAML text -> keys and values. The only place that knows YAML; what the keys mean is decided elsewhere."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tunefleet.recipe.problems import Problem, RecipeError


class _Loader(yaml.SafeLoader):
    """A safe loader that reads numbers as people write them.

    YAML 1.1 takes `1e-5` for text, `010` for eight, `1:30` for ninety and `2024-01-01` for a date. Here the first two
    are the numbers that they look like and the others are text.
    """


def _decimal(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node).replace("_", ""))


_Loader.yaml_implicit_resolvers = {}
_WORDS = ("yes", "no", "true", "false", "on", "off")
_BOOLEAN = "|".join(form for word in _WORDS for form in (word, word.capitalize(), word.upper()))
_FRACTION = r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
_ENDLESS = r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
for _tag, _pattern, _first in (
    ("bool", _BOOLEAN, "yYnNtTfFoO"),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("int", r"[-+]?[0-9][0-9_]*", "-+0123456789"),
    ("float", f"{_FRACTION}|{_ENDLESS}", "-+.0123456789"),
):
    _starts = ["" if letter == "\0" else letter for letter in _first]
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _starts)
_Loader.add_constructor("tag:yaml.org,2002:int", _decimal)


def read_text(path: Path) -> str:
    """The text of a recipe file.

    Raises:
        RecipeError: there is no such file, it cannot be read, or it is not UTF-8.
    """
    name = str(path)
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        problem = Problem(name, "there is no such file", "check the path, which starts at the current folder")
    except IsADirectoryError:
        problem = Problem(name, "is a folder, not a recipe", "name the YAML file inside it")
    except UnicodeDecodeError as error:
        problem = Problem(name, f"is not UTF-8 text (byte {error.start})", "save it as UTF-8")
    except OSError as error:
        problem = Problem(name, f"cannot be read ({error.strerror})", "check its permissions")
    raise RecipeError([problem])


def read_mapping(text: str, name: str) -> tuple[dict[str, object], list[Problem]]:
    """The keys and values of a recipe's text, and what is wrong with single keys (written twice, unreadable).

    Raises:
        RecipeError: the text is empty, is not YAML or is not a mapping.
    """
    loader, node = _compose(text, name)
    if node is None:
        raise RecipeError([Problem(name, "is empty", "write at least model_name_or_path, dataset and output_dir")])
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError([Problem(name, "is not a list of keys and values", "write lines of the form `key: value`")])
    values: dict[str, object] = {}
    problems = _repeated(node)
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            line = key_node.start_mark.line + 1
            problems.append(Problem(name, f"has a key that is not a word (line {line})", "write `key: value`"))
            continue
        try:
            values[key_node.value] = loader.construct_object(value_node, deep=True)
        except (yaml.YAMLError, ValueError, RecursionError, TypeError):
            problems.append(_unreadable(key_node.value))
    return values, problems


def read_overrides(overrides: Sequence[str]) -> tuple[dict[str, object], list[Problem]]:
    """The keys and values of `key=value` words; of a key written twice the last one counts."""
    values: dict[str, object] = {}
    problems: list[Problem] = []
    for word in overrides:
        key, equals, text = (part.strip() for part in word.partition("="))
        if not equals or not re.fullmatch(r"[^\s=:]+", key):
            problems.append(Problem(f"`{word}`", "is not an override", "write key=value, without blanks around the ="))
        elif not text:
            problems.append(Problem(key, "has no value on the command line", f"write {key}=null for its default"))
        else:
            try:
                loader, node = _compose(text, key)
                values[key] = loader.construct_object(node, deep=True)
            except (RecipeError, yaml.YAMLError, ValueError, RecursionError, TypeError):
                problems.append(_unreadable(key))
    return values, problems


def _compose(text: str, name: str) -> tuple[_Loader, Any]:
    """The node tree of one YAML document (None if there is none), with the loader that builds its values."""
    try:
        loader = _Loader(text)
        return loader, loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        problem = Problem(name, f"is not valid YAML{where}: {error.problem}", "mend that line")
    except yaml.YAMLError:
        problem = Problem(name, "is not valid YAML: it has a character that text cannot have", "remove it")
    except RecursionError:
        problem = Problem(name, "is nested too deeply", "write flat lines of the form `key: value`")
    raise RecipeError([problem])


def _unreadable(key: str) -> Problem:
    return Problem(key, "has a value that is not plain YAML", "write text, a number, true, false, a list or a mapping")


def _repeated(node: yaml.MappingNode) -> list[Problem]:
    """Keys that stand twice in one mapping, nested mappings included."""
    problems: list[Problem] = []
    waiting: list[yaml.MappingNode] = [node]
    seen: set[int] = set()
    while waiting:
        mapping = waiting.pop()
        seen.add(id(mapping))
        lines: dict[str, int] = {}
        for key_node, value_node in mapping.value:
            if isinstance(value_node, yaml.MappingNode) and id(value_node) not in seen:
                waiting.append(value_node)
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            line = key_node.start_mark.line + 1
            if key_node.value in lines:
                what = f"is written twice (lines {lines[key_node.value]} and {line})"
                problems.append(Problem(key_node.value, what, "keep one of them"))
            lines.setdefault(key_node.value, line)
    return problems
