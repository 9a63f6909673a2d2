"""Numbers that a caller gives: whole ones, and in their range."""

from __future__ import annotations

import numbers

from .errors import UsageError


def is_whole(value: object) -> bool:
    """Whether `value` is an integer of Python or numpy; True and 1.0 are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def between(name: str, value: int, limit: int) -> int:
    """`value`, from 1 to `limit`. Raises UsageError for any other, and for what is no whole number."""
    if not (is_whole(value) and 1 <= value <= limit):
        raise UsageError(
            f"{name} is out of range",
            where=f"{name}: expected a whole number from 1 to {limit}, got {value!r:.40}",
            fix="omit it to use the default",
        )
    return value
