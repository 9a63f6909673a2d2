"""The progress callback that every long-running function takes as `progress`, and the units it counts in.

A call says what is being done, how much of it is done, and of how much in total. It counts the steps of the
whole work, unless `what` ends in a unit, as in "hash base_ar, in bytes": then it counts within the current
step. A remark may follow the unit, as in "draw, in tokens, 3.2 a forward".
"""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # what, done, total
Tick = Callable[[int], None]  # how much was done since the last call


def silent(what: str, done: int, total: int) -> None:
    """A progress callback that does nothing."""


def uncounted(count: int) -> None:
    """A tick that counts nothing."""


def adder(progress: Progress, what: str, total: int) -> Tick:
    """A tick that adds to what is done and reports it."""
    done = 0

    def add(count: int) -> None:
        nonlocal done
        done += count
        progress(what, done, total)

    return add
