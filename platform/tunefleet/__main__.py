"""`python -m tunefleet`, and what the script `tunefleet` runs."""

import atexit
import os
import sys
from contextlib import suppress

from tunefleet.cli import main
from tunefleet.collecting import collect_rarely


def command() -> None:
    """Run a command, and end its process at once.

    Python would take everything apart that torch, transformers and Ray have made, for a second and a half, and after
    that the system does it anyway. What was registered for the end of the process is run as ever.
    """
    collect_rarely()
    try:
        main()
        code = 0
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            raise  # a sentence, which Python prints
        code = end.code or 0
    with suppress(OSError):  # whoever read it has left: Python has its own end for that
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    command()
