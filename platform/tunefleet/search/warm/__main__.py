"""`python -P -m tunefleet.search.warm LISTENER`: the fork server (`server.py`), from its first import on."""

from tunefleet.collecting import collect_rarely


def start() -> None:
    """Import what trials train with, and serve."""
    collect_rarely()
    from tunefleet.search.warm.server import main

    main()


if __name__ == "__main__":
    start()
