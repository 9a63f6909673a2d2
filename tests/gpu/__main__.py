"""What only a GPU can show, in one run of at most 8 minutes:

    python -m tests.gpu --out FOLDER

writes FOLDER/gpu_check.json and FOLDER/gpu_check.md (docs/gpu_check.md says how to read them). `--steps`
runs some steps again and keeps what is there of the others. Exit status: 0 all ran and held, 4 something
failed, 5 something could not run.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
from pathlib import Path

from .runner import BUDGET_SECONDS, STEPS, run_steps


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps",
        nargs="+",
        choices=STEPS,
        metavar="NAME",
        help=f"of {', '.join(STEPS)} (default: all, in this order)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("gpu-check"),
        help="folder of the record and its page (default: gpu-check)",
    )
    parser.add_argument(
        "--list", action="store_true", help="only say which steps there are, and their limits"
    )
    parser.add_argument("--commit", help="what this tree is, where git cannot say it")
    parser.add_argument(
        "--budget",
        type=float,
        default=BUDGET_SECONDS,
        help="seconds that all steps may take together (default: 480)",
    )
    options = parser.parse_args(argv)
    if options.list:
        print("\n".join(map(described, STEPS)))
        return 0
    # an exit that passes the `finally` which kills the step's processes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    record = run_steps(
        options.steps or list(STEPS), options.out, budget_seconds=options.budget, commit=options.commit
    )
    return status_of([record["steps"][name] for name in options.steps or STEPS])


def described(name: str) -> str:
    """A step's line: its name, its limit and the first sentence of its module."""
    try:
        module = importlib.import_module(f"{__package__}.{name}")
    except ImportError as error:
        return f"{name:12} cannot be imported: {error}"
    sentence = " ".join(module.__doc__.partition("\n\n")[0].split())
    return f"{name:12} {module.LIMIT_SECONDS:4} s  {sentence}"


def status_of(entries: list[dict]) -> int:
    """0 when every step is done, 4 when one failed, else 5."""
    found = {entry["status"] for entry in entries}
    return 4 if "failed" in found else 5 if "not run" in found else 0


if __name__ == "__main__":
    sys.exit(main())
