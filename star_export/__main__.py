"""The program `star-export`: signals from the first import on, then `cli.parser.main`."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
from typing import Any

INTERRUPTED, NO_MEMORY_OR_DEVICE = 130, 5
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run() -> int:
    """Run the command line of this process and return its exit code.

    SIGINT and SIGTERM unwind it once, so that it removes what it has begun; a second one ends it at once.
    """
    asked, code = 0, 0

    def interrupt(number: int, frame: Any) -> None:
        nonlocal asked
        asked += 1
        if asked > 1:
            os._exit(INTERRUPTED)
        raise KeyboardInterrupt

    def leave() -> None:
        """The last of all that runs. From here on Python would restore the system's own actions, and die of a
        signal; and it ends in one of its own where an interruption once passed a text that it executes, as
        dataclasses do, although it was caught."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        if code == INTERRUPTED:
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.flush()
            os._exit(code)

    try:
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` and shells ask
                signal.signal(number, interrupt)
        atexit.register(leave)  # before all others, which run in reverse
        from .cli.parser import main

        code = main()
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception:  # a library may make an error of its own of an interruption, as numpy's import does
        if not asked:
            raise
        code = INTERRUPTED
    if asked and code:
        code = INTERRUPTED
    asked = max(asked, 1)  # nothing is left to unwind
    if code == NO_MEMORY_OR_DEVICE:
        os._exit(code)  # what libraries do at exit may fail for want of memory, and say so
    return code


if __name__ == "__main__":
    sys.exit(run())
