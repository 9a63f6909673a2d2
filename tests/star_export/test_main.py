"""However an interruption comes to an end, the program ends with 130 and without a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
from star_export.cli import parser
from star_export.__main__ import run

def interrupt():
    os.kill(os.getpid(), signal.SIGINT)

def main():
{body}

parser.main = main
sys.exit(run())
"""
SWALLOWED = "    try: interrupt()\n    except KeyboardInterrupt: pass\n"


@pytest.fixture
def ended(tmp_path: Path) -> Callable[[str], tuple[int, str]]:
    """The exit code and stderr of the program whose `main` is a body, run with `python -m`."""

    def run(body: str) -> tuple[int, str]:
        (tmp_path / "program.py").write_text(PROGRAM.format(body=body))
        done = subprocess.run(
            [sys.executable, "-m", "program"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.returncode, done.stderr

    return run


@pytest.mark.parametrize(
    "body",
    [
        "    interrupt()",
        "    os.kill(os.getpid(), signal.SIGTERM)",
        "    exec('interrupt()', globals())",  # Python itself would end in the signal
        "    try: interrupt()\n    except KeyboardInterrupt: raise ImportError('numpy')",
        SWALLOWED + "    return 5",
    ],
    ids=["SIGINT", "SIGTERM", "in a text that is executed", "made an ImportError", "made an exit code"],
)
def test_an_interruption_ends_with_130(ended, body: str) -> None:
    assert ended(body) == (130, "")


def test_a_second_one_ends_it_at_once(ended) -> None:
    assert ended("    try: interrupt()\n    finally: interrupt(); print('on', file=sys.stderr)") == (130, "")


def test_what_was_done_all_the_same_is_done(ended) -> None:
    assert ended(SWALLOWED + "    return 0") == (0, "")


def test_a_signal_while_python_ends_changes_nothing(ended) -> None:
    late = "class Late: __del__ = lambda self, kill=os.kill, me=os.getpid(): kill(me, 2)"
    assert ended(f"    global last\n    {late}\n    last = Late()\n    return 3") == (3, "")


def test_a_bug_is_still_a_traceback(ended) -> None:
    code, said = ended("    raise RuntimeError('ours')")
    assert code == 1 and said.startswith("Traceback") and "ours" in said
