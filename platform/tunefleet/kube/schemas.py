"""Official schemas of custom resources (CRD files), used as the API server uses them, with unknown fields refused.

The API server fills in defaults before it validates, and drops unknown fields in silence; here they are named. What a
schema cannot say (lengths of names, rules between fields, CEL) is in our own types.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft7Validator

from tunefleet.errors import Refused

Schema = dict[str, Any]
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Schemas:
    """The schemas of a folder, by version and kind."""

    def __init__(self, folder: Path) -> None:
        """Read every CRD in the YAML files of a folder.

        Raises:
            Refused: there is none.
        """
        self._schemas: dict[tuple[str, str], tuple[Schema, Draft7Validator]] = {}
        files = sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")]) if folder.is_dir() else []
        for file in files:
            for document in yaml.load_all(file.read_text(encoding="utf-8"), Loader=_Loader):
                if isinstance(document, dict) and document.get("kind") == "CustomResourceDefinition":
                    self._add(document["spec"])
        if not self._schemas:
            raise Refused(f"{folder} holds no CustomResourceDefinition: name a folder of CRD files (*.yaml).")

    def _add(self, spec: Mapping[str, Any]) -> None:
        for version in spec["versions"]:
            schema: Schema = version["schema"]["openAPIV3Schema"]
            key = (f"{spec['group']}/{version['name']}", spec["names"]["kind"])
            self._schemas[key] = (schema, Draft7Validator(_as_json_schema(schema)))

    @property
    def kinds(self) -> list[str]:
        """What there are schemas for."""
        return [" ".join(key) for key in self._schemas]

    def problems(self, document: Mapping[str, Any]) -> list[tuple[str, str]] | None:
        """Paths and what is wrong there; None where there is no schema of this kind."""
        found = self._schemas.get((str(document.get("apiVersion")), str(document.get("kind"))))
        if found is None:
            return None
        schema, validator = found
        unknown = [(path, "is no field of the official schema") for path in _unknown(document, schema, "")]
        filled = copy.deepcopy(dict(document))
        _fill(filled, schema)
        wrong = [
            (_path(error.absolute_path), f"{error.message[:200]} (official schema)")
            for error in validator.iter_errors(filled)
        ]
        return [*unknown, *wrong]


def _as_json_schema(node: Any) -> Any:
    """OpenAPI v3 as CRDs write it -> JSON Schema."""
    if isinstance(node, list):
        return [_as_json_schema(one) for one in node]
    if not isinstance(node, dict):
        return node
    kept = {key: value for key, value in node.items() if not str(key).startswith("x-kubernetes-")}
    if node.get("x-kubernetes-int-or-string") is True:
        kept.pop("type", None)
        kept["anyOf"] = [{"type": "integer"}, {"type": "number"}, {"type": "string"}]
    nullable = kept.pop("nullable", False)
    if nullable is True and isinstance(kept.get("type"), str):
        kept["type"] = [kept["type"], "null"]
    return {key: _as_json_schema(value) for key, value in kept.items()}


def _children(value: object, schema: Schema) -> Iterator[tuple[Any, Schema, str]]:
    """What lies in a value, each with its schema and the step that leads there."""
    if isinstance(value, dict):
        named, rest = schema.get("properties", {}), schema.get("additionalProperties")
        for key, inner in value.items():
            if key in named:
                yield inner, named[key], f".{key}"
            elif isinstance(rest, dict):
                yield inner, rest, f".{key}"
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        for index, inner in enumerate(value):
            yield inner, schema["items"], f"[{index}]"


def _unknown(value: object, schema: Schema, path: str) -> Iterator[str]:
    closed = "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(value, dict) and closed and not schema.get("additionalProperties"):
        for key in value:
            if key not in schema["properties"]:
                yield f"{path}.{key}".lstrip(".")
    if path == ".metadata":  # every object's: the API server's own type, which a CRD does not repeat
        return
    for inner, own, step in _children(value, schema):
        yield from _unknown(inner, own, path + step)


def _fill(value: Any, schema: Schema) -> None:
    """Write defaults where fields are missing, as the API server does before it validates."""
    if isinstance(value, dict):
        for key, own in schema.get("properties", {}).items():
            if key not in value and "default" in own:
                value[key] = copy.deepcopy(own["default"])
    for inner, own, _ in _children(value, schema):
        _fill(inner, own)


def _path(steps: Any) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).lstrip(".")
