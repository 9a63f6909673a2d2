"""The progress callback that every long-running function takes as `progress`."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # current task, steps done, steps in total


def silent(what: str, done: int, total: int) -> None:
    """A progress callback that does nothing."""
