"""Manifests, checked: every field against our types, and against official schemas where there are some."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from tunefleet.errors import Refused
from tunefleet.kube.documents import read_documents
from tunefleet.kube.fields import Piece
from tunefleet.kube.objects import (
    ClusterQueue,
    ConfigMap,
    Deployment,
    LocalQueue,
    Namespace,
    NetworkPolicy,
    PersistentVolumeClaim,
    ResourceFlavor,
    Service,
    ServiceAccount,
)
from tunefleet.kube.ray import RayCluster, RayJob
from tunefleet.kube.schemas import Schemas

KINDS: Mapping[str, type[Piece]] = {
    kind.__name__: kind
    for kind in (
        RayJob,
        RayCluster,
        ConfigMap,
        Namespace,
        ServiceAccount,
        PersistentVolumeClaim,
        Service,
        Deployment,
        NetworkPolicy,
        ResourceFlavor,
        ClusterQueue,
        LocalQueue,
    )
}
"""The objects that can be checked."""

_TYPES = {
    "string_type": "text; put it in quotes",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}
_LIMITS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("more than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
    "string_too_long": ("at most", "max_length"),
}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a manifest."""

    document: str
    """Which document: its number, kind and name."""
    path: str
    """The field, such as spec.workerGroupSpecs[0].maxReplicas; empty where it is the document itself."""
    what: str

    def line(self) -> str:
        """The finding as one line of text."""
        return f"{self.document}, {self.path}: {self.what}" if self.path else f"{self.document}: {self.what}"


@dataclass(frozen=True)
class Checked:
    """What a check found."""

    objects: int
    findings: tuple[Finding, ...]
    by_schema: int = 0
    """How many of the objects an official schema was there for."""


def check_file(path: Path, schemas: Schemas | None = None) -> Checked:
    """Check every object of a file.

    Raises:
        Refused: the file cannot be read, is no YAML, or holds no object.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise Refused(f"{path} cannot be read ({error.strerror}): name a YAML file.") from error
    return check_bytes(content, str(path), schemas)


def check_bytes(content: bytes, name: str, schemas: Schemas | None = None) -> Checked:
    """Check every object of a file's content.

    Raises:
        Refused: it is no text, no YAML, or holds no object.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused(f"{name} is not UTF-8 text (byte {error.start}): save it as UTF-8.") from error
    return check_text(text, name, schemas)


def check_text(text: str, name: str, schemas: Schemas | None = None) -> Checked:
    """Check every object of a YAML text.

    Raises:
        Refused: it is no YAML, or holds no object.
    """
    documents = [
        one
        for number, document in enumerate(read_documents(text, name), start=1)
        for one in _listed(document, f"{name}, document {number}")
    ]
    if not documents:
        raise Refused(f"{name} holds no object: write at least apiVersion, kind and metadata.")
    findings: list[Finding] = []
    by_schema = 0
    for place, document in documents:
        findings += check_document(document, place)
        official = None if schemas is None or not isinstance(document, dict) else schemas.problems(document)
        if official is not None:
            by_schema += 1
            label = _label(document, place)
            findings += [Finding(label, path, what) for path, what in official]
    return Checked(len(documents), tuple(dict.fromkeys(findings)), by_schema)


def _listed(document: object, place: str) -> Iterator[tuple[str, object]]:
    """A document, or the items of a List (what `kubectl get -o yaml` prints of several), each with its place."""
    items = document.get("items") if isinstance(document, dict) and document.get("kind") == "List" else None
    if not isinstance(items, list):
        yield place, document
        return
    for number, item in enumerate(items, start=1):
        yield f"{place}, item {number}", item


def check_document(document: object, name: str) -> Iterator[Finding]:
    """What is wrong with one object, by our own types."""
    label = _label(document, name)
    if not isinstance(document, dict):
        yield Finding(label, "", "is no object; write apiVersion, kind and metadata")
        return
    kind = KINDS.get(str(document.get("kind")))
    if kind is None:
        yield Finding(label, "kind", f"{document.get('kind')!r} is no kind that is checked here{_near(document)}")
        return
    version = kind.model_fields["apiVersion"].default
    if document.get("apiVersion") != version:
        yield Finding(label, "apiVersion", f"{document.get('apiVersion')!r} is not {version}; write {version}")
        return
    try:
        kind.model_validate(document)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            yield from _found(detail, kind, label)


def _near(document: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(str(document.get("kind")), KINDS, n=1)
    return f"; did you mean {near[0]}?" if near else f"; those are {', '.join(KINDS)}"


def _label(document: object, name: str) -> str:
    if not isinstance(document, dict):
        return name
    metadata = document.get("metadata")
    own = metadata.get("name") if isinstance(metadata, dict) else None
    return f"{name} ({document.get('kind')}{f' {own}' if own else ''})"


def _found(detail: ErrorDetails, kind: type[BaseModel], label: str) -> Iterator[Finding]:
    owner, path = _walk(kind, detail["loc"])
    what = detail["type"]
    if what == "extra_forbidden":
        key = str(detail["loc"][-1])
        near = difflib.get_close_matches(key, _names(owner), n=1, cutoff=0.6)
        yield Finding(label, path, f"is no field here; {f'did you mean {near[0]}?' if near else 'remove it'}")
    elif what == "missing":
        yield Finding(label, path, "is missing")
    elif what == "value_error":
        for line in str(detail["ctx"]["error"]).splitlines():
            yield Finding(label, path, line)
    elif what in _TYPES:
        yield Finding(label, path, f"{detail['input']!r} is not {_TYPES[what]}")
    elif what in _LIMITS:
        words, limit = _LIMITS[what]
        yield Finding(label, path, f"{detail['input']!r} must be {words} {detail['ctx'][limit]}")
    elif what == "literal_error":
        yield Finding(label, path, f"{detail['input']!r} is not {detail['ctx']['expected']}")
    elif what in ("too_short", "string_too_short"):
        yield Finding(label, path, "is empty")
    else:
        yield Finding(label, path, f"{detail['input']!r} does not fit ({detail['msg']})")


def _walk(kind: type[BaseModel], loc: Sequence[int | str]) -> tuple[type[BaseModel], str]:
    """The type that owns the last field of a path, and the path as people write it."""
    owner: type[BaseModel] | None = kind
    last: type[BaseModel] = kind
    path = ""
    for step in loc:
        if isinstance(step, int):
            path += f"[{step}]"
            continue
        if step in ("[key]", "str", "int", "float") and owner is None:  # pydantic's own words for keys and choices
            continue
        path += f".{step}" if path else step
        last = owner or last
        owner = _type_of(owner, step)
    return last, path


def _type_of(owner: type[BaseModel] | None, name: str) -> type[BaseModel] | None:
    """The model that a field holds, alone or in a list."""
    if owner is None:
        return None
    for field_name, field in owner.model_fields.items():
        if name in (field_name, field.alias):
            return _model_in(field.annotation)
    return None


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = (_model_in(part) for part in get_args(annotation))
    return next((model for model in found if model is not None), None)


def _names(owner: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in owner.model_fields.items()]
