"""The fields of one request, read by name and checked one by one.

OpenAI's clients leave a field out, send null, or send `auto`: all mean the default. Fields that clients of
OpenAI's service send, and that mean nothing to this model, are accepted by name. Any other field is refused,
because a misspelt setting would be dropped silently.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from .refusals import Refused

NUMBER = re.compile(r"[-+.0-9eE]{1,40}")  # Python's own numbers have underscores, and digits of all scripts


class Fields:
    """The `values` of a request by name. Those of a form are texts, also where a number is meant."""

    def __init__(self, values: Mapping[str, Any], *, of_form: bool = False):
        self.values, self.of_form = dict(values), of_form
        self.known: set[str] = set()

    def take(self, name: str) -> Any:
        """The value as it is; None where it is absent, null or `auto`."""
        self.known.add(name)
        value = self.values.get(name)
        return None if isinstance(value, str) and value == "auto" else value

    def text(self, name: str, *, limit: int) -> str | None:
        """A text of at most `limit` characters."""
        value = self.values.get(name)  # "auto" is a text like any other
        self.known.add(name)
        if value is None:
            return None
        if not isinstance(value, str):
            raise invalid(name, "a text", value)
        if len(value) > limit:
            raise invalid(name, f"at most {limit} characters", f"a text of {len(value)}")
        return value

    def choice(self, name: str, names: Iterable[str]) -> str | None:
        """One of `names`."""
        value = self.take(name)
        if value is not None and value not in (known := tuple(names)):
            raise invalid(name, f"one of {', '.join(known)}", value)
        return value

    def whole(self, name: str, low: int, high: int) -> int | None:
        """A whole number from `low` to `high`."""
        value = self._number(name, f"a whole number from {low} to {high}", int)
        if value is not None and (value != int(value) or not low <= value <= high):
            raise invalid(name, f"a whole number from {low} to {high}", value)
        return None if value is None else int(value)

    def number(self, name: str) -> float | None:
        """A finite number; the runtime knows its range."""
        value = self._number(name, "a number", float)
        return None if value is None else float(value)

    def flag(self, name: str) -> bool:
        """True or false; false by default."""
        value = self.take(name)
        if self.of_form and isinstance(value, str):
            value = {"true": True, "1": True, "false": False, "0": False, "": False}.get(value.lower(), value)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise invalid(name, "true or false", value)
        return value

    def check_all_known(self, without_effect: Iterable[str] = ()) -> list[str]:
        """Refuse a field that nobody read. Returns those of `without_effect` that were given."""
        ignored = set(without_effect)
        for name in self.values:
            if name not in self.known | ignored:
                (near, *_) = [*difflib.get_close_matches(name, sorted(self.known), 1), ""]
                raise Refused(
                    400,
                    "There is no such field",
                    where=f"{name:.60}: expected one of {', '.join(sorted(self.known))}",
                    fix=f"did you mean {near}?" if near else "leave it out",
                    param=name[:60],
                    code="unknown_parameter",
                )
        return sorted(name for name in ignored if self.values.get(name) not in (None, "auto"))

    def _number(self, name: str, expected: str, kind: type) -> Any:
        value = self.take(name)
        if self.of_form and isinstance(value, str):
            try:
                value = kind(value) if NUMBER.fullmatch(value) else value
            except ValueError:
                raise invalid(name, expected, value) from None
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not _finite(value):
            raise invalid(name, expected, value)
        return value


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def invalid(name: str, expected: str, got: Any) -> Refused:
    """The refusal of a field's value."""
    try:
        shown = got if isinstance(got, str) and got.startswith("a ") else repr(got)
    except ValueError:  # an integer of too many digits
        shown = "a number of very many digits"
    return Refused(
        400,
        "A field has an invalid value",
        where=f"{name}: expected {expected}, got {shown:.80}",
        fix="correct it, or leave it out to use the default",
        param=name,
        code="invalid_value",
    )
