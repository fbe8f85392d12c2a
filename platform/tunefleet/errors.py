"""The ways in which a command ends without its result. Each message is one sentence that ends with the mend."""

from __future__ import annotations


class Refused(Exception):
    """What was asked for cannot be done as it is written. Exit code 2; nothing was started."""


class RunFailed(Exception):
    """A run that had started came to grief. Exit code 1."""


class Superseded(RunFailed):
    """Another command runs this run now, so this one must leave it alone."""


class PeerFailed(Exception):
    """Another rank failed, for a reason that another attempt may not meet."""


class BrokenOff(Exception):
    """A person would not wait for a run to stop by itself. Exit code 130."""


LONGEST_REASON = 160
"""Characters of what a library says, where it may be a page in one line."""


def first_line(error: BaseException, longest: int | None = None) -> str:
    """What an error of somebody else's says, as a piece of a sentence of ours.

    Args:
        longest: characters to cut it to; None = all of it.
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:longest].rstrip(".")
