"""Records in JSON: dataclasses that are written with a hash of their own, and parsed strictly.

Nothing is converted silently: a wrong type, an unknown or missing key, a number outside of its range, a
duplicate key or NaN is an InputError that names the path of the key.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from ..errors import InputError
from .seal import CONTENT, sealed_json, unsealed

T = TypeVar("T")
VALUES = 1 << 19  # of a JSON file; one takes up to 200 bytes once parsed


@dataclass(frozen=True)
class Within:
    """The range of a field's numbers, `low` and `high` included: `Annotated[float, Within(0.0, 1.0)]`."""

    low: float
    high: float


def json_from_record(record: Any) -> str:
    """Serialise a record, a dataclass, as JSON text with a hash of its own."""
    return sealed_json(dataclasses.asdict(record))


def record_from_json(kind: type[T], text: str, *, schema: int, other: str, fix: str, where: str) -> T:
    """Parse what `json_from_record` wrote of a dataclass `kind` with the field `schema`.

    Raises InputError with the key path, with `other` and `fix` for a record of another schema, and for one
    that was changed after it was written.
    """
    value = value_from_json(text, where=where)
    stated = value.get("schema") if isinstance(value, dict) else None
    if type(stated) is int and stated != schema:
        raise InputError(other, where=f"{where}: schema: expected {schema}, got {stated}", fix=fix)
    contents = _expect(dict, value, where)
    record = strict(kind, {key: entry for key, entry in contents.items() if key != CONTENT}, where)
    unsealed(contents, what="This file", where=where, fix="restore the file, or make it again: " + fix)
    return record


def value_from_json(text: str, *, where: str) -> object:
    """Parse strict JSON of at most VALUES values, counted before they take memory.

    Raises InputError for more, for duplicate keys, NaN and infinities.
    """

    def pairs(items):
        seen = {}
        for key, value in items:
            if key in seen:
                raise ValueError(f"duplicate key {key!r}")
            seen[key] = value
        return seen

    def constant(name):
        raise ValueError(f"{name} is not a number")

    try:
        if sum(map(text.count, ",[{")) > VALUES:
            raise ValueError(f"more than {VALUES} values")
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise InputError(
            "This JSON file cannot be read",
            where=f"{where}: expected strict JSON, got {error}",
            fix="restore the file; it may be truncated or edited by hand",
        ) from None


def strict(kind: Any, value: Any, path: str) -> Any:
    """Convert parsed JSON to `kind` (dataclass, dict, tuple, union or scalar).

    Raises InputError with `path`.
    """
    if type(value) is int and abs(value) >= 1 << 63:
        raise _refusal(path, "a number of 63 bits", f"one of {value.bit_length()}")
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _within(args[1], strict(args[0], value, path), path)
    if dataclasses.is_dataclass(kind):
        return _strict_dataclass(kind, _expect(dict, value, path), path)
    if origin is dict:
        return {k: strict(args[1], v, f"{path}: {k}") for k, v in _expect(dict, value, path).items()}
    if origin is tuple:
        items = _expect(list, value, path)
        kinds = [args[0]] * len(items) if args[1:] == (...,) else args
        if len(kinds) != len(items):
            raise _refusal(path, f"{len(kinds)} items", str(len(items)))
        return tuple(strict(k, v, f"{path}[{i}]") for i, (k, v) in enumerate(zip(kinds, items)))
    if origin in (types.UnionType, typing.Union):
        for option in args:
            if value is None and option is type(None) or type(value) is option:
                return value
            if dataclasses.is_dataclass(option) and isinstance(value, dict):
                return strict(option, value, path)
        raise _refusal(path, " or ".join(getattr(a, "__name__", str(a)) for a in args), repr(value))
    if kind is float and type(value) is int:
        value = float(value)
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        raise _refusal(path, "a finite number", repr(value))
    return _expect(kind, value, path)


def _strict_dataclass(kind: Any, value: dict[str, Any], path: str) -> Any:
    hints, fields = typing.get_type_hints(kind, include_extras=True), dataclasses.fields(kind)
    missing = dataclasses.MISSING
    required = {f.name for f in fields if f.default is missing and f.default_factory is missing}
    if wrong := sorted(set(value) - {f.name for f in fields}):
        raise _refusal(f"{path}: {wrong[0]}", "no such key", repr(wrong[0]))
    if absent := sorted(required - set(value)):
        raise _refusal(f"{path}: {absent[0]}", "this key", "nothing")
    return kind(**{k: strict(hints[k], v, f"{path}: {k}") for k, v in value.items()})


def _within(bounds: Within, value: Any, path: str) -> Any:
    for number in value if isinstance(value, tuple) else (value,):
        if not bounds.low <= number <= bounds.high:
            raise _refusal(path, f"{bounds.low:g} to {bounds.high:g}", repr(number))
    return value


def _expect(kind: type, value: Any, path: str) -> Any:
    if type(value) is not kind:
        names: dict[type, str] = {dict: "an object", list: "a list"}
        expected = names.get(kind, kind.__name__)
        raise _refusal(path, expected, f"{type(value).__name__} {value!r:.40}")
    return value


def _refusal(where: str, expected: str, got: str) -> InputError:
    return InputError(
        "This file has an invalid entry",
        where=f"{where}: expected {expected}, got {got}",
        fix="restore the file or create it again; it must not be edited by hand",
    )
