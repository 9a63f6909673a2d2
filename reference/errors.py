"""The reference's only error: a checkpoint that cannot be used."""

from __future__ import annotations


class CheckpointError(Exception):
    """The files cannot be read as a STAR checkpoint. `str()` gives three lines: what is wrong; where, with
    expected and got; what to do.

    `exit_code` is the command line's code for bad input, so that a caller can treat this error like its own.
    """

    exit_code = 3

    def __init__(self, what: str, *, where: str, fix: str):
        super().__init__(what)
        self.what, self.where, self.fix = printable(what), printable(where), printable(fix)

    def __str__(self) -> str:
        return f"{self.what}\n  where: {self.where}\n  fix: {self.fix}"


def printable(text: str) -> str:
    """Text from a file made safe to show on one line: control characters and line ends are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
