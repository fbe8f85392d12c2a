"""CRD schemas are used as the API server uses them: defaults first, and unknown fields are not lost in silence."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from tests.kube.samples import ray_cluster

from tunefleet.errors import Refused
from tunefleet.kube.check import check_text
from tunefleet.kube.schemas import Schemas

SCHEMA = {
    "type": "object",
    "properties": {
        "apiVersion": {"type": "string"},
        "kind": {"type": "string"},
        "metadata": {"type": "object"},
        "spec": {
            "type": "object",
            "required": ["least", "amount"],
            "properties": {
                "least": {"type": "integer", "default": 0},
                "amount": {"x-kubernetes-int-or-string": True, "pattern": "^[0-9]+Gi$|^$"},
                "nothing": {"type": "string", "nullable": True},
                "free": {"type": "object", "additionalProperties": {"type": "integer"}},
                "open": {"type": "object", "properties": {}, "x-kubernetes-preserve-unknown-fields": True},
                "list": {"type": "array", "items": {"type": "object", "properties": {"a": {"type": "integer"}}}},
            },
        },
    },
}
CRD = {
    "kind": "CustomResourceDefinition",
    "spec": {
        "group": "a.io",
        "names": {"kind": "Thing"},
        "versions": [{"name": "v1", "schema": {"openAPIV3Schema": SCHEMA}}],
    },
}


@pytest.fixture
def schemas(tmp_path: Path) -> Schemas:
    (tmp_path / "crd.yaml").write_text(yaml.safe_dump(CRD))
    return Schemas(tmp_path)


@pytest.mark.parametrize(
    ("spec", "wrong"),
    [
        ({"amount": 4}, []),  # `least` is required, and has a default
        ({"amount": "4Gi", "nothing": None, "free": {"x": 1}, "open": {"y": 1}, "list": [{"a": 1}]}, []),
        ({"amount": "much"}, ["spec.amount"]),
        ({}, ["spec"]),
        ({"amount": 1, "amuont": 2}, ["spec.amuont"]),
        ({"amount": 1, "free": {"x": "one"}}, ["spec.free.x"]),
        ({"amount": 1, "list": [{"a": 1}, {"b": 1}]}, ["spec.list[1].b"]),
        ({"amount": 1, "least": "0"}, ["spec.least"]),
    ],
)
def test_a_schema_is_obeyed(schemas: Schemas, spec: dict[str, object], wrong: list[str]) -> None:
    thing = {"apiVersion": "a.io/v1", "kind": "Thing", "metadata": {"name": "t", "labels": {"a": "b"}}, "spec": spec}
    assert schemas.kinds == ["a.io/v1 Thing"]
    assert [path for path, _ in schemas.problems(thing) or []] == wrong


def test_other_kinds_are_left_alone(schemas: Schemas) -> None:
    assert schemas.problems(ray_cluster()) is None
    assert check_text(yaml.safe_dump(ray_cluster()), "f", schemas).by_schema == 0


def test_a_folder_without_schemas_is_refused(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("nothing")
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(Refused, match="holds no CustomResourceDefinition: name a folder"):
            Schemas(folder)
