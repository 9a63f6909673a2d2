"""Errors for people: what happened; where, with expected and got; what to do.

Each class carries the exit code of the command line. Anything else that reaches the top is a bug of ours (exit code 1).
"""

from __future__ import annotations


class StarError(Exception):
    """A mistake that its reader can mend. `str()` is the three-line message."""

    exit_code = 1

    def __init__(self, what: str, *, where: str, fix: str):
        super().__init__(what)
        self.what, self.where, self.fix = what, where, fix

    def __str__(self) -> str:
        return f"{self.what}\n  where: {self.where}\n  fix: {self.fix}"


class UsageError(StarError):
    """A wrong word or number on the command line or in a call."""

    exit_code = 2


class InputError(StarError):
    """A file, array or artifact that is not what it must be."""

    exit_code = 3


class ParityError(StarError):
    """What runs is not what the reference computes."""

    exit_code = 4


class MissingError(StarError):
    """A dependency or device that this machine lacks."""

    exit_code = 5
