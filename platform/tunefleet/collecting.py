"""How often Python looks for objects that only hold each other."""

import gc

_OWN_PACE = gc.get_threshold()
_RARELY = (50_000, 50, 100)


def collect_rarely() -> None:
    """Look rarely, before a process imports what trains.

    torch, transformers and Ray make a million objects that stay. At Python's own pace all of them are walked eight
    times on the way: a fifth of the time that the imports take.
    """
    gc.set_threshold(*_RARELY)


def collect_as_ever() -> None:
    """Look at Python's own pace."""
    gc.set_threshold(*_OWN_PACE)
