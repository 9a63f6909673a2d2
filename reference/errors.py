"""The one error of the reference: a checkpoint that is not what it must be."""

from __future__ import annotations


class CheckpointError(Exception):
    """Files that cannot be read as a STAR checkpoint. `str()` is three lines: what; where, expected and got; what to do.

    `exit_code` is the command line's, so a caller can treat it as it treats its own errors.
    """

    exit_code = 3

    def __init__(self, what: str, *, where: str, fix: str):
        super().__init__(what)
        self.what, self.where, self.fix = printable(what), printable(where), printable(fix)

    def __str__(self) -> str:
        return f"{self.what}\n  where: {self.where}\n  fix: {self.fix}"


def printable(text: str) -> str:
    """Text from a file, safe to show on one line: control characters and line ends are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
