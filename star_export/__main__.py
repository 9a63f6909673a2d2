"""The program `star-export`: signals from the first import on, then `cli.parser.main`."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

INTERRUPTED = 130
NO_MEMORY_OR_DEVICE = 5


def run() -> int:
    """Run the command line of this process and return its exit code.

    SIGINT and SIGTERM unwind it once, so that it removes what it has begun; a second one ends it at once.
    """
    asked = 0

    def interrupt(number: int, frame: Any) -> None:
        nonlocal asked
        asked += 1
        if asked > 1:
            os._exit(INTERRUPTED)
        raise KeyboardInterrupt

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` and shells ask
                signal.signal(number, interrupt)
        from .cli.parser import main

        code = main()
    except KeyboardInterrupt:
        code = INTERRUPTED
    asked = max(asked, 1)  # nothing is left to unwind
    if code == NO_MEMORY_OR_DEVICE:
        os._exit(code)  # what libraries do at exit may fail for want of memory, and say so
    return code


if __name__ == "__main__":
    sys.exit(run())
