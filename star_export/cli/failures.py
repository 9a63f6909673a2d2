"""What the command line says of an error: three lines, also where a library ran out of memory."""

from __future__ import annotations

from engines.errors import MissingError, StarError
from engines.fit.machine import memory_ran_out
from reference.errors import CheckpointError


def out_of_memory(error: BaseException, verb: str) -> MissingError | None:
    """The user's error for a library's own, if no memory or address space is left."""
    if not memory_ran_out(error):
        return None
    said = (str(error).strip() or "no memory left").splitlines()[0][:200]
    return MissingError(
        "There is too little memory for this",
        where=f"{verb}: {type(error).__name__}: {said}",
        fix="close other programs, or raise the limit (ulimit -v), and repeat the command; "
        "an export goes on where it stopped",
    )


def three_lines(error: StarError | CheckpointError) -> str:
    """Format an error as what, where and fix, one line each: line breaks inside a part become spaces."""
    what, where, fix = (" ".join(str(part).split("\n")) for part in (error.what, error.where, error.fix))
    return f"error: {what}\n  where: {where}\n  fix: {fix}"
