"""What the command line says of an error: three lines, also where a library ran out of memory."""

from __future__ import annotations

from engines.errors import MissingError, StarError
from reference.errors import CheckpointError

NO_MEMORY = (  # Python, torch, ONNX Runtime and the system's loader each have words of their own
    *("can't allocate memory", "failed to allocate memory", "cannot allocate memory"),
    *("bad allocation", "bad_alloc", "can't start new thread", "failed to map segment"),
)


def out_of_memory(error: Exception, verb: str) -> MissingError | None:
    """The user's error for a library's own, if that says that no memory or address space is left."""
    if not isinstance(error, MemoryError) and not any(words in str(error).lower() for words in NO_MEMORY):
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
