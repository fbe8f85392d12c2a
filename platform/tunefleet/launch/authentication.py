"""Ray's token, for a cluster that this process starts for itself. Ray reads the mode when it is imported, so this comes
before: nothing here imports it.
"""

from __future__ import annotations

import os
import secrets

MODE, TOKEN = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"


def prepare_own_cluster() -> None:
    """Let the cluster that this process will start, and join, ask for a token that nobody else has.

    Where a person has set a mode it stays.
    """
    os.environ.setdefault(MODE, "token")
    os.environ.setdefault(TOKEN, secrets.token_hex(32))
