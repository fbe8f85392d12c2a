"""docs/recipe.md is what the models say."""

from __future__ import annotations

from pathlib import Path

from tunefleet.recipe.docs import recipe_markdown
from tunefleet.recipe.owners import known_keys
from tunefleet.recipe.peers import IGNORED, REFUSED

PAGE = Path(__file__).parents[2] / "docs" / "recipe.md"


def test_the_page_is_the_generated_one() -> None:
    assert PAGE.read_text(encoding="utf-8") == recipe_markdown(), "run: tunefleet schema --markdown > docs/recipe.md"


def test_every_key_is_on_the_page() -> None:
    page = recipe_markdown()
    assert [key for key in known_keys() | IGNORED.keys() | REFUSED.keys() if f"`{key}`" not in page] == []
