"""Strict reading of a checkpoint's small files, and of the JSON objects in them: it rejects the duplicate
keys, NaN, infinities and `true` for 1 that Python's parser accepts.

Every error names the file and the path of the key. A `Section` returns typed values and at the end rejects
the keys that nobody read, so that an unknown key cannot be ignored silently.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from .errors import CheckpointError

MAX_BYTES = 16 << 20  # a configuration has a few KiB, the index of a sharded model a few hundred
MAX_VALUES = 1 << 18  # of a file; one takes up to 200 bytes once parsed
FIX = "use the unmodified file of the release"


def read_object(path: Path, *, max_values: int = MAX_VALUES) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError for anything else."""
    return object_from_bytes(read_small(path), where=str(path), max_values=max_values)


def read_text(path: Path, *, max_bytes: int = MAX_BYTES) -> str:
    """The text of a small file in UTF-8. Raises CheckpointError for anything else."""
    try:
        return read_small(path, max_bytes=max_bytes).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{path.name} is not text in UTF-8",
            where=f"{path}: expected UTF-8, got byte {error.start} that is not",
            fix=FIX,
        ) from None


def read_small(path: Path, *, max_bytes: int = MAX_BYTES) -> bytes:
    """The bytes of a small file. Raises CheckpointError if it is none, too large or cannot be read."""
    try:
        if not path.is_file():  # a pipe would never end
            raise CheckpointError(
                f"{path.name} does not exist",
                where=f"{path}: expected a file, found {'something else' if path.exists() else 'none'}",
                fix="check the path",
            )
        size = path.stat().st_size
        if size > max_bytes:
            raise CheckpointError(
                f"{path.name} is too large for a small file of a checkpoint",
                where=f"{path}: expected at most {max_bytes} bytes, got {size}",
                fix=FIX,
            )
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path.name}", where=f"{path}: {error.strerror}", fix="check the path"
        ) from None


def object_from_bytes(data: bytes, *, where: str, max_values: int = MAX_VALUES) -> dict[str, Any]:
    """The JSON object in UTF-8 bytes; `where` names their origin in errors. Raises CheckpointError for
    anything else, and for more than about `max_values` values, before they take memory."""

    def refuse(got: str) -> CheckpointError:
        return CheckpointError("the file is not a strict JSON object", where=f"{where}: {got}", fix=FIX)

    def checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise refuse(f"key {key[:80]!r} appears twice")
            found[key] = value
        return found

    def number(text: str) -> float:
        if not math.isfinite(value := float(text)):
            raise refuse(f"expected a finite number, got {text[:80]}")
        return value

    def integer(text: str) -> int:
        if len(text) > 20:
            raise refuse(f"expected a 64-bit integer, got {len(text)} digits")
        return int(text)

    if data.startswith(b"\xef\xbb\xbf"):
        raise refuse("it starts with a UTF-8 byte order mark")
    if (values := sum(map(data.count, (b",", b"[", b"{")))) > max_values:
        raise refuse(f"expected at most {max_values} values, got about {values}")
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=checked,
            parse_float=number,
            parse_int=integer,
            parse_constant=number,
        )
    except UnicodeDecodeError as error:
        raise refuse(f"byte {error.start} is not valid UTF-8") from None
    except json.JSONDecodeError as error:
        raise refuse(f"line {error.lineno} column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise refuse("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise refuse(f"expected an object at the top level, got {kind(value)}")
    return value


def kind(value: Any) -> str:
    """A JSON value as a reader would name it, short enough for an error message."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


class Section:
    """One JSON object, read key by key.

    `integer`, `number`, `text`, `flag`, `integers` and `section` read values, and `finish` rejects the keys
    that were not read. All of them raise CheckpointError with the path of the key.
    """

    def __init__(self, values: dict[str, Any], *, source: Path, path: str = ""):
        self.values, self.source, self.path = values, source, path
        self.taken: set[str] = set()

    def refuse(self, key: str, expected: str, got: str) -> CheckpointError:
        return CheckpointError(
            f"{self.source.name} has an invalid value",
            where=f"{self.source}: {self.key_path(key)}: expected {expected}, got {got}",
            fix=FIX,
        )

    def key_path(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def take(self, key: str, expected: str) -> Any:
        self.taken.add(key)
        if key not in self.values:
            raise self.refuse(key, expected, "no such key")
        return self.values[key]

    def integer(self, key: str, *, low: int = 1, high: int, default: int | None = None) -> int:
        """An integer in [low, high]. The key may be absent only if there is a `default`."""
        if default is not None and key not in self.values:
            return default
        return self.check_integer(key, self.take(key, f"an integer from {low} to {high}"), low=low, high=high)

    def check_integer(self, key: str, value: Any, *, low: int, high: int) -> int:
        if type(value) is not int or not low <= value <= high:
            raise self.refuse(key, f"an integer from {low} to {high}", kind(value))
        return value

    def number(self, key: str, *, low: float, high: float, default: float | None = None) -> float:
        """A number in [low, high]. The key may be absent only if there is a `default`."""
        if default is not None and key not in self.values:
            return default
        return self.check_number(
            key, self.take(key, f"a number from {low:g} to {high:g}"), low=low, high=high
        )

    def check_number(self, key: str, value: Any, *, low: float, high: float) -> float:
        if type(value) not in (int, float) or not low <= value <= high:
            raise self.refuse(key, f"a number from {low:g} to {high:g}", kind(value))
        return float(value)

    def text(self, key: str, *, choices: tuple[str, ...] = (), default: str | None = None) -> str:
        """A string, one of `choices` if there are any. The key may be absent only if there is a `default`."""
        if default is not None and key not in self.values:
            return default
        expected = " or ".join(json.dumps(choice) for choice in choices) or "a string"
        value = self.take(key, expected)
        if type(value) is not str or (choices and value not in choices):
            raise self.refuse(key, expected, kind(value))
        return value

    def flag(self, key: str, *, default: bool | None = None) -> bool:
        """`true` or `false`. The key may be absent only if there is a `default`."""
        if default is not None and key not in self.values:
            return default
        value = self.take(key, "true or false")
        if type(value) is not bool:
            raise self.refuse(key, "true or false", kind(value))
        return value

    def integers(
        self,
        key: str,
        *,
        low: int,
        high: int,
        length: int | None = None,
        default: tuple[int, ...] | None = None,
    ) -> tuple[int, ...]:
        """A non-empty list of integers in [low, high], of the given `length` if there is one. The key may be
        absent only if there is a `default`."""
        if default is not None and key not in self.values:
            return default
        items = self.items(key, f"integers from {low} to {high}", length=length)
        return tuple(
            self.check_integer(f"{key}[{i}]", item, low=low, high=high) for i, item in enumerate(items)
        )

    def numbers(self, key: str, *, low: float, high: float, length: int) -> tuple[float, ...]:
        """A list of `length` numbers in [low, high]."""
        items = self.items(key, f"numbers from {low:g} to {high:g}", length=length)
        return tuple(
            self.check_number(f"{key}[{i}]", item, low=low, high=high) for i, item in enumerate(items)
        )

    def items(self, key: str, what: str, *, length: int | None = None) -> list[Any]:
        expected = f"a list of {length or 'one or more'} {what}"
        value = self.take(key, expected)
        if type(value) is not list or not value or len(value) > 1024 or (length and len(value) != length):
            raise self.refuse(
                key, expected, f"a list of {len(value)}" if type(value) is list else kind(value)
            )
        return value

    def section(self, key: str) -> Section:
        """A nested object."""
        value = self.take(key, "an object")
        if type(value) is not dict:
            raise self.refuse(key, "an object", kind(value))
        return Section(value, source=self.source, path=self.key_path(key))

    def finish(self, *, unused: frozenset[str] = frozenset()) -> None:
        """Reject every key that was not read and is not listed as `unused`."""
        for key in sorted(self.values.keys() - self.taken - unused):
            known = ", ".join(sorted(self.taken))
            raise self.refuse(key[:80], f"no key of this name (known: {known})", "an unknown key")
