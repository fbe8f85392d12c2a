"""What goes wrong with a method. Light to import: a command knows it before it loads torch."""

from __future__ import annotations


class StrategyError(ValueError):
    """A method cannot do what was asked of it. The message is one sentence that ends with the mend."""
