"""What must not be written where it is copied, sent and kept: secrets, told by their names or place in a URL."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

_SECRET = re.compile(
    r"(?i)(SECRET|PASSWORD|PASSWD|CREDENTIAL|PRIVATE_KEY|ACCESS_KEY|API_KEY|TOKEN)(_|$|ID$)"
    r"|([_-](PASS|PWD)|PASSPHRASE|PASSCODE|API-?KEY|(AUTH|ACCOUNT|STORAGE|SIGNING|ENCRYPTION|MASTER|SSH)[_-]?KEY)$"
)
_NO_SECRETS = frozenset({"TOKENIZERS_PARALLELISM"})


def is_secret(name: str) -> bool:
    """Whether the value of a variable must not be written where it is copied, sent and kept."""
    return _SECRET.search(name) is not None and name not in _NO_SECRETS


def secret_keys(value: object) -> Iterator[str]:
    """The keys of a nested value that are named like secrets and hold something."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if is_secret(str(key)) and inner is not None:
                yield str(key)
            else:
                yield from secret_keys(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from secret_keys(inner)


# The scheme's length is bounded, or a megabyte of letters would take minutes.
_WITH_USER = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,30})://([^\s/?#\"'@]*)@")
_HARMLESS_SCHEMES = ("hdfs", "viewfs", "ssh", "git+ssh")
"""Here a name alone is that of an account, and no key."""


def url_with_user(value: object) -> str | None:
    """What stands before the user of the first URL that carries one, such as `https`, in a nested value; else None.

    Names that let nobody in are none: `git@`, `anonymous@`, an account of HDFS or SSH without a password.
    """
    if isinstance(value, str):
        for scheme, user in _WITH_USER.findall(value):
            if ":" in user or not (user in ("git", "anonymous") or scheme.lower() in _HARMLESS_SCHEMES):
                return str(scheme)
        return None
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return next((found for one in inner if (found := url_with_user(one)) is not None), None)
