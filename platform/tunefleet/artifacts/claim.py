"""Who may write into a run's folder: the newest command, and of its attempts the newest.

A lock holds on one machine only. What protects a run everywhere is this file in its storage: whoever takes a run over
writes its own mark there, and whoever finds another one there than its own stops before its next seal. So a command
that was killed never blocks the next, and workers that outlived their driver cannot spoil what the next one does.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field

from tunefleet.errors import Superseded
from tunefleet.storage import Place


def new_mark() -> str:
    """A mark that nobody else has."""
    return uuid.uuid4().hex


@dataclass(frozen=True)
class Claim:
    """One attempt's right to write."""

    place: Place
    command: str
    """The mark of the command that started the attempt."""
    attempt: str = field(default_factory=new_mark)

    def take(self) -> None:
        """Take the run over from the attempts before, unless another command has.

        Raises:
            Superseded: it has.
        """
        found = _written(self.place)
        if found[0] != self.command:
            raise Superseded(self._sentence(found))
        self.place.write_text(json.dumps([self.command, self.attempt]))

    def check(self) -> None:
        """See that nobody has taken the run over since `take`.

        Raises:
            Superseded: somebody has.
        """
        found = _written(self.place)
        if found != [self.command, self.attempt]:
            raise Superseded(self._sentence(found))

    def _sentence(self, found: list[str]) -> str:
        if not found[0]:
            return (
                f"{self.place.uri} is gone, so somebody has removed the run's folder or what was in it, and this one "
                f"ends: the same command goes on from what is left there."
            )
        return "Another command has taken this run over, so this one ends: look for who else runs it."


def mark_of(place: Place) -> str:
    """The mark of the newest command; empty where there was none."""
    return _written(place)[0]


def claim_run(place: Place) -> str:
    """Take a run over for a new command. Returns its mark."""
    mark = new_mark()
    place.write_text(json.dumps([mark, ""]))
    return mark


def _written(place: Place) -> list[str]:
    """The marks of the newest command and of its newest attempt."""
    try:
        command, attempt = json.loads(place.read_text())
    except (FileNotFoundError, ValueError, TypeError):
        return ["", ""]
    return [str(command), str(attempt)]
