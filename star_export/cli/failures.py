"""What the command line says of an error: three lines, also where a library ran out of memory."""

from __future__ import annotations

import os
import re

from engines.bundle.files import reason
from engines.bundle.typed_paths import shown
from engines.errors import InputError, MissingError, StarError
from engines.fit.machine import lack_of_memory
from reference.errors import CheckpointError

from .streams import printable

FULL = "No space left on device"
COLOURS = re.compile("\x1b\\[[0-9;]*m")  # which torch puts into messages


def user_error(error: Exception, verb: str) -> StarError | CheckpointError | None:
    """What the user is told of `error`, or None for a bug of ours.

    What looks like a bad file may be a library that ran out of memory while it read it.
    """
    cause = error.__context__ if isinstance(error, InputError) else error
    if isinstance(error, (StarError, CheckpointError)):
        return (_out_of_memory(cause, verb) if isinstance(error, InputError) and cause else None) or error
    return _out_of_memory(error, verb) or _refused(error)


def _out_of_memory(error: BaseException, verb: str) -> MissingError | None:
    """The user's error for a library's own, if no memory or address space is left."""
    lack = lack_of_memory(error)
    if lack is None:
        return None
    said = (COLOURS.sub("", str(lack)).strip() or "no memory left").splitlines()[0][:200]
    return MissingError(
        "There is too little memory for this",
        where=f"{verb}: {type(lack).__name__}: {said}",
        fix="close other programs, or raise the limit (ulimit -v), and repeat the command; "
        "an export goes on where it stopped",
    )


def _refused(error: Exception) -> InputError | None:
    """The user's error for a file that the system refused to open, read or write."""
    full = FULL in str(error)  # safetensors has an error of its own for it
    name = getattr(error, "filename", None)
    if not full and (not isinstance(error, OSError) or name is None):
        return None
    place = "a file" if name is None else shown(os.fsdecode(name))
    return InputError(
        "The system refused this file",
        where=f"{place}: {FULL if full else reason(error)}",
        fix="check the name, its folder, its permissions and the free space, and repeat the command",
    )


def parts_of(error: StarError | CheckpointError) -> dict[str, str]:
    """What, where and fix, one line each: line breaks inside a part become spaces."""
    return {
        name: printable(" ".join(str(getattr(error, name)).split("\n"))) for name in ("what", "where", "fix")
    }


def three_lines(error: StarError | CheckpointError) -> str:
    """Format an error as what, where and fix, one line each."""
    parts = parts_of(error)
    return f"error: {parts['what']}\n  where: {parts['where']}\n  fix: {parts['fix']}"
