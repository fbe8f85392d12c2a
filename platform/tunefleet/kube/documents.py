"""YAML text with several documents <-> plain mappings. A key that is written twice is an error, as in the API server's
strict reading."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import yaml

from tunefleet.errors import Refused
from tunefleet.kube.fields import Piece


class _Reader(yaml.SafeLoader):
    """A safe loader that takes no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[str, int] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            line = key_node.start_mark.line + 1
            if key_node.value in lines:
                first = lines[key_node.value]
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key_node.value} is written twice (lines {first} and {line})", key_node.start_mark
                )
            lines[key_node.value] = line
        return super().construct_mapping(node, deep)


class _Writer(yaml.SafeDumper):
    """A dumper that keeps the order of keys, writes text of several lines as such, and repeats instead of anchoring."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Writer.add_representer(str, _text)


def read_documents(text: str, name: str) -> list[object]:
    """The documents of a YAML text; empty ones are left out.

    Raises:
        Refused: it is no YAML, or has a key twice.
    """
    try:
        # A subclass of SafeLoader: nothing but plain values comes out of it.
        return [document for document in yaml.load_all(text, Loader=_Reader) if document is not None]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}" if mark else ""
        raise Refused(f"{name}{where}: {error.problem}: mend that line.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise Refused(f"{name} is not valid YAML: mend it.") from error


def plain(piece: Piece) -> dict[str, Any]:
    """An object as plain values, in the order of its fields; what is not written stays away."""
    values: dict[str, Any] = piece.model_dump(mode="json", exclude_none=True, by_alias=True)
    return values


def write_documents(pieces: Iterable[Piece]) -> str:
    """Objects as one YAML text, for `kubectl apply -f -`."""
    texts = [
        yaml.dump(plain(piece), Dumper=_Writer, sort_keys=False, width=120, allow_unicode=True) for piece in pieces
    ]
    return "---\n".join(texts)
