"""Which variables of an environment are secrets, told by their names."""

from __future__ import annotations

import re

_SECRET = re.compile(r"(?i)(SECRET|PASSWORD|PASSWD|CREDENTIAL|PRIVATE_KEY|ACCESS_KEY|API_KEY|TOKEN)(_|$|ID$)")
_NO_SECRETS = frozenset({"TOKENIZERS_PARALLELISM"})


def is_secret(name: str) -> bool:
    """Whether the value of a variable must not be written where it is copied, sent and kept."""
    return _SECRET.search(name) is not None and name not in _NO_SECRETS
