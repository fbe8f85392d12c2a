"""Print the documentation strings of standard library modules, one JSON object a line.

    python jobs/docstrings.py json textwrap ...

Runs in a process of its own (`prepare_quickstart.py` starts it), because importing a module runs its code. Each line is
{"module", "name", "kind", "text"}; `kind` is module, class, function, method or attribute.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import json
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import TypedDict


class Documented(TypedDict):
    module: str
    name: str
    kind: str
    text: str


def load(name: str) -> ModuleType | None:
    """Import a module with its printing and its warnings kept quiet; None where this machine lacks what it needs."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except (ImportError, AttributeError, OSError):  # modules of another operating system
            return None


def public_names(module: ModuleType) -> list[str]:
    listed = vars(module).get("__all__")
    return sorted(listed) if listed is not None else sorted(name for name in vars(module) if not name.startswith("_"))


def belongs(value: object, module: ModuleType) -> bool:
    """Whether an object is documented here: it says so itself, or its home is a private twin (`_json` of `json`)."""
    home = inspect.getattr_static(value, "__module__", None)
    if not isinstance(home, str):
        return True  # built-in functions of C modules do not always name their home
    return home == module.__name__ or home.startswith((module.__name__ + ".", "_"))


def own_text(value: object) -> str | None:
    """The documentation string that an object carries itself, not one it inherits."""
    text = value.__doc__
    return inspect.cleandoc(text) if isinstance(text, str) and text.strip() else None


def members(module: str, name: str, owner: type) -> Iterator[Documented]:
    """The documented public methods and attributes that a class defines itself."""
    for member, value in sorted(vars(owner).items()):
        text = own_text(value)
        if member.startswith("_") or text is None:
            continue
        if inspect.isroutine(value) or isinstance(value, (staticmethod, classmethod)):
            yield {"module": module, "name": f"{name}.{member}", "kind": "method", "text": text}
        elif inspect.isdatadescriptor(value):
            yield {"module": module, "name": f"{name}.{member}", "kind": "attribute", "text": text}


def documented(module: ModuleType) -> Iterator[Documented]:
    """Everything public in a module that carries documentation, the module itself first."""
    title = module.__name__
    text = own_text(module)
    if text is not None:
        yield {"module": title, "name": title, "kind": "module", "text": text}
    for name in public_names(module):
        value = vars(module).get(name)
        if not (inspect.isclass(value) or inspect.isroutine(value)) or not belongs(value, module):
            continue
        full_name = name if title == "builtins" else f"{title}.{name}"
        text = own_text(value)
        if text is not None:
            kind = "class" if inspect.isclass(value) else "function"
            yield {"module": title, "name": full_name, "kind": kind, "text": text}
        if inspect.isclass(value):
            yield from members(title, full_name, value)


def main(names: list[str]) -> None:
    for name in names:
        module = load(name)
        if module is None:
            continue
        for item in documented(module):
            sys.stdout.write(json.dumps(item) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
