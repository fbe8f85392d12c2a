"""A process that starts Ray on this machine and ends it when its standard input closes: at its parent's death too.

It takes the arguments of `ray.init` as a line of JSON and answers with a line: the address, or what went wrong. It is
run as a file, so that it needs nothing but Ray.
"""

from __future__ import annotations

import json
import logging
import signal
import sys

import ray


def main() -> None:
    options = json.loads(sys.stdin.readline())
    try:
        # An explicit "local" never joins a dead cluster that an old session file names.
        ray.init(address="local", log_to_driver=False, logging_level=logging.ERROR, **options)
    except (TypeError, ValueError) as error:
        _answer("refused", str(error))
        return
    except (ConnectionError, RuntimeError) as error:
        _answer("refused" if "keyword argument" in str(error) else "failed", str(error))
        return
    _answer("address", ray.get_runtime_context().gcs_address)
    sys.stdin.read()
    ray.shutdown()


def _answer(key: str, text: str) -> None:
    first_line = (text.strip().splitlines() or ["without a word"])[0].rstrip(".")
    print(json.dumps({key: first_line}), flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver decides what an interruption means
    main()
