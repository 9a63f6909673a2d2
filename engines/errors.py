"""Errors that the user can fix. Each states what is wrong, where (with expected and got), and what to do.

Each class carries the exit code of the command line. Any other exception is a bug of ours (exit code 1).
"""

from __future__ import annotations

from collections.abc import Sequence


class StarError(Exception):
    """The base class. `str()` is the three-line message: `what`, `where`, `fix`."""

    exit_code = 1

    def __init__(self, what: str, *, where: str, fix: str):
        super().__init__(what)
        self.what, self.where, self.fix = what, where, fix

    def __str__(self) -> str:
        return f"{self.what}\n  where: {self.where}\n  fix: {self.fix}"


class UsageError(StarError):
    """An option or argument has an invalid value."""

    exit_code = 2


class InputError(StarError):
    """A file, array or artifact is invalid."""

    exit_code = 3


class ParityError(StarError):
    """The device does not compute what the reference computes."""

    exit_code = 4


class MissingError(StarError):
    """A dependency or device is missing on this machine."""

    exit_code = 5


def install(extras: str) -> str:
    """The command that installs `extras` of this package, such as `cpu,export`, which is on no index."""
    return f'pip install ".[{extras}]" in a clone of star-export'


def listed(items: Sequence[str], *, limit: int = 10, separator: str = "; ") -> str:
    """The first `limit` of `items` on one line, and how many more there are. Empty when there are none."""
    more = [f"and {len(items) - limit} more"] if len(items) > limit else []
    return separator.join([*items[:limit], *more])
