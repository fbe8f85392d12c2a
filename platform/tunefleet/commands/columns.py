"""Columns of tables that a person reads on a narrow terminal and copies from."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Column

_WIDTH = 40


def name_column(title: str, names: Iterable[str]) -> Column:
    """A column of names that other commands are given: whole on one line up to 40 characters, and never cut."""
    longest = max((len(name) for name in names), default=0)
    return Column(title, overflow="fold", min_width=min(longest, _WIDTH))
