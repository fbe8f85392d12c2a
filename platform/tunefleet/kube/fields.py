"""What fields of Kubernetes objects hold: names, labels, quantities. Each type refuses what the API server refuses.

Sources: Kubernetes' API conventions, `apimachinery/pkg/util/validation` and `api/resource`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_QUALIFIED = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")
_VARIABLE = re.compile(r"[-._a-zA-Z][-._a-zA-Z0-9]*")
_QUANTITY = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?\d+)?")
_PORT_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_LONGEST_PORT_NAME = 15
_HIGHEST_PORT = 65535
_HOST = r"[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?"
_IMAGE_PART = r"[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*"
_IMAGE = re.compile(
    rf"({_HOST}(\.{_HOST})*(:\d{{1,5}})?/|\[[0-9a-fA-F:]+\](:\d{{1,5}})?/)?{_IMAGE_PART}(/{_IMAGE_PART})*"
    r"(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(@[A-Za-z][A-Za-z0-9]*([-_+.][A-Za-z][A-Za-z0-9]*)*:[0-9a-fA-F]{32,})?"
)
"""As `github.com/distribution/reference` reads one: a registry, a path, a tag, a digest."""
_OWN_RESOURCES = ("cpu", "memory", "ephemeral-storage")
_FACTORS = {"n": 1e-9, "u": 1e-6, "m": 1e-3, "": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
_FACTORS |= {f"{letter}i": 1024.0**power for power, letter in enumerate("KMGTPE", start=1)}


class Piece(BaseModel):
    """A part of an object, its fields by Kubernetes' names. Unknown fields and values of another type are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


def refuse_all(sentences: Iterable[str]) -> None:
    """Refuse a piece for every rule that it breaks, one on a line.

    Raises:
        ValueError: it breaks some.
    """
    broken = "\n".join(sentences)
    if broken:
        raise ValueError(broken)


def _label_name(value: str) -> str:
    if len(value) > 63 or not _LABEL.fullmatch(value):
        raise ValueError(f"{value!r} is no name; use up to 63 small letters, digits and dashes")
    return value


def _object_name(value: str) -> str:
    if len(value) > 253 or not all(_LABEL.fullmatch(part) for part in value.split(".")):
        raise ValueError(f"{value!r} is no name; use small letters, digits, dashes and dots")
    return value


def is_dns_1035(value: str, longest: int = 63) -> bool:
    """Whether a name begins with a letter and has nothing but small letters, digits and dashes."""
    return len(value) <= longest and _DNS_1035.fullmatch(value) is not None


def _dns_1035(value: str) -> str:
    if not is_dns_1035(value):
        raise ValueError(f"{value!r} is no name; begin with a small letter, then small letters, digits and dashes")
    return value


def _qualified(value: str) -> str:
    prefix, slash, name = value.rpartition("/")
    if slash:
        _object_name(prefix)
    if len(name) > 63 or not _QUALIFIED.fullmatch(name):
        raise ValueError(f"{value!r} is no key of a label; write up to 63 letters, digits, dashes, dots, underscores")
    return value


def _label_value(value: str) -> str:
    if value and (len(value) > 63 or not _QUALIFIED.fullmatch(value)):
        raise ValueError(f"{value!r} is no value of a label; write up to 63 letters, digits, dashes, dots, underscores")
    return value


def _variable(value: str) -> str:
    if not _VARIABLE.fullmatch(value):
        raise ValueError(f"{value!r} is no name of a variable; begin with a letter, then letters, digits, underscores")
    return value


def quantity(value: str | int | float) -> float:
    """The number that a quantity stands for.

    Raises:
        ValueError: it is none.
    """
    text = str(value)
    if not _QUANTITY.fullmatch(text):
        raise ValueError(f"{text!r} is no quantity; write for example 4, 500m or 16Gi")
    suffix = re.sub(r"^[+-]?[\d.]+", "", text)
    return (
        float(text)
        if suffix[:1] in ("e", "E") and len(suffix) > 1
        else float(text[: len(text) - len(suffix)]) * (_FACTORS[suffix])
    )


def _quantity(value: str | int | float) -> str | int | float:
    if quantity(value) < 0:
        raise ValueError(f"{value} is negative; write an amount of 0 or more")
    return value


def near(word: str, known: Iterable[str]) -> str | None:
    """The known word that a misspelt one may be meant for."""
    return next(iter(difflib.get_close_matches(word, known, n=1)), None)


def _resource_name(value: str) -> str:
    if value in _OWN_RESOURCES or value.startswith("hugepages-") or "/" in value:
        return _qualified(value)
    meant = near(value, _OWN_RESOURCES)
    mend = f"did you mean {meant}?" if meant else f"write {', '.join(_OWN_RESOURCES)} or a name such as nvidia.com/gpu"
    raise ValueError(f"{value!r} is no resource of a container; {mend}")


def _image(value: str) -> str:
    if len(value) > 512 or not _IMAGE.fullmatch(value):
        raise ValueError(f"{value!r} is no image; write for example registry.example/team/tunefleet:1")
    return value


def _port_name(value: str) -> str:
    named = _PORT_NAME.fullmatch(value) is not None and re.search("[a-z]", value) is not None
    if not named or len(value) > _LONGEST_PORT_NAME:
        raise ValueError(
            f"{value!r} is no name of a port; write up to {_LONGEST_PORT_NAME} small letters, digits and single "
            "dashes, with a letter among them"
        )
    return value


def _port_or_name(value: int | str) -> int | str:
    if isinstance(value, str):
        return _port_name(value)
    if not 1 <= value <= _HIGHEST_PORT:
        raise ValueError(f"{value} is no port; write one from 1 to {_HIGHEST_PORT}")
    return value


def _http_path(value: str) -> str:
    if not value.startswith("/"):
        raise ValueError(f"{value!r} is no path of a URL; begin with a slash")
    return value


def _absolute(value: str) -> str:
    if not value.startswith("/") or ":" in value:
        raise ValueError(f"{value!r} is no absolute path in a container; begin with a slash")
    return value


LabelName = Annotated[str, AfterValidator(_label_name)]
"""A DNS label: the name of a container, a volume, a namespace."""
ObjectName = Annotated[str, AfterValidator(_object_name)]
"""A DNS subdomain: the name of most objects."""
Dns1035Name = Annotated[str, AfterValidator(_dns_1035)]
QualifiedName = Annotated[str, AfterValidator(_qualified)]
LabelValue = Annotated[str, AfterValidator(_label_value)]
Labels = dict[QualifiedName, LabelValue]
Annotations = dict[QualifiedName, str]
VariableName = Annotated[str, AfterValidator(_variable)]
Quantity = Annotated[str | int | float, AfterValidator(_quantity)]
MountPath = Annotated[str, AfterValidator(_absolute)]
Port = Annotated[int, Field(ge=1, le=_HIGHEST_PORT)]
PortName = Annotated[str, AfterValidator(_port_name)]
PortOrName = Annotated[int | str, AfterValidator(_port_or_name)]
ResourceName = Annotated[str, AfterValidator(_resource_name)]
"""What a container may ask for: Kubernetes' own resources, and extended ones, whose names have a slash."""
Image = Annotated[str, AfterValidator(_image)]
HttpPath = Annotated[str, AfterValidator(_http_path)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
AtLeastOne = Annotated[int, Field(ge=1, lt=2**31)]


class ObjectMeta(Piece):
    """Name, place and labels of an object. What the API server writes itself is not for a manifest."""

    name: ObjectName
    namespace: LabelName | None = None
    labels: Labels | None = None
    annotations: Annotations | None = None


class Requirement(Piece):
    """One condition of a selector."""

    key: QualifiedName
    operator: str
    values: list[str] | None = None


class Selector(Piece):
    """Which objects are meant, by their labels; an empty one means all."""

    matchLabels: Labels | None = None
    matchExpressions: list[Requirement] | None = None
