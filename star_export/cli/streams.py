"""Standard streams that take whatever a run has to say, whatever they are.

A stream may be closed, full, or in an encoding without most letters; and what is printed may come from a
file, whose control characters must not reach a terminal.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import sys
from typing import Any, TextIO

from engines.bundle.files import reason
from engines.errors import InputError

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_LIST_OF_NUMBERS = re.compile(r"\[\n\s+(-?[0-9][0-9.eE+-]*(?:,\n\s+-?[0-9][0-9.eE+-]*)*)\n\s*\]")


def prepare() -> None:
    """Give closed streams a place, and let each escape what its encoding lacks.

    A closed descriptor would be the next opened file's, which then gets what a library prints.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if number == 0 else "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # something else may stand in for it
            stream.reconfigure(errors="backslashreplace")


def printable(text: str) -> str:
    """`text` with control characters, but for line breaks and tabs, as escapes such as `\\x1b`."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)


def json_text(data: Any) -> str:
    """`data` as JSON for a program that reads it, with lists of numbers on one line."""
    text = json.dumps(data, indent=1, ensure_ascii=False)
    text = _LIST_OF_NUMBERS.sub(lambda found: "[" + " ".join(found[1].split()) + "]", text)
    return _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def say(text: str) -> None:
    """Print a result on stdout. Raises InputError if it does not take it, BrokenPipeError if nobody reads."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        _discard(sys.stdout)
        if sys.platform == "win32" and error.errno == errno.EINVAL:  # its word for a pipe that nobody reads
            raise BrokenPipeError from None
        raise InputError(
            "The result cannot be printed",
            where=f"stdout: {reason(error)}; the work itself is done",
            fix="send the output elsewhere",
        ) from None


def complain(text: str) -> None:
    """Print a message on stderr, if that takes it."""
    try:
        print(text, file=sys.stderr, flush=True)
    except (OSError, ValueError):
        _discard(sys.stderr)


def hang_up() -> None:
    """Drop what is left for stdout, whose reader has gone: Python would complain when it flushes it."""
    _discard(sys.stdout)


def _discard(stream: TextIO) -> None:
    with contextlib.suppress(OSError, ValueError):  # the latter of a stream without a descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
