"""The process of one step: `python -m tests.gpu.child MODULE FOLDER REPORT`. What a step lacks is "not run";
all else that it raises is a crash.
"""

from __future__ import annotations

import ctypes
import importlib
import signal
import sys
from pathlib import Path

from engines.errors import MissingError

from .report import Report

PR_SET_PDEATHSIG = 1  # prctl(2)


def main(module: str, folder: str, path: str) -> None:
    ctypes.CDLL(None).prctl(
        PR_SET_PDEATHSIG, signal.SIGKILL
    )  # not to run on where the runner itself was killed
    report = Report(Path(path))
    try:
        importlib.import_module(module).run(Path(folder), report)
    except (ImportError, MissingError) as error:
        print(error, file=sys.stderr)
        report.not_run(f"{type(error).__name__}: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main(*sys.argv[1:])
