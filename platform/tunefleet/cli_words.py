"""What the commands have in common: their words, and how they print."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A flat YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Keys that replace those of the file; null clears.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of a table for people.")]

console = Console()
errors = Console(stderr=True)


def print_plain(to: Console, text: str, style: str | None = None) -> None:
    """Print text that is not ours as it is: rich would read markup and emoji into it and break its lines."""
    to.print(text, style=style, markup=False, emoji=False, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Print JSON."""
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")
