"""What may be bound to a component: names, dtypes, ranks and sizes against its spec. Shared by all sessions.

Knows nothing of where tensors live: anything with `.shape` and `.dtype` can be checked.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

import numpy as np

from ..errors import InputError
from .manifest import ComponentSpec, TensorSpec

PAST, PRESENT = "past_key_values.", "present."
_AXIS = re.compile(r"(\d*)([A-Z])(?:/(\d+))?")  # `B`, `2N`, `P/4`
_LISTED = 10


def present_name(past_name: str) -> str | None:
    """Name of the output that lies at the same address as the cache input `past_name`; None for what is no cache input."""
    return PRESENT + past_name.removeprefix(PAST) if past_name.startswith(PAST) else None


def check_binding(spec: ComponentSpec, tensors: Mapping[str, object]) -> dict[str, int]:
    """Check `tensors` (name -> anything with `.shape` and `.dtype`) as all inputs and outputs of `spec`, and return its axes' sizes.

    A cache is given once, under its `past_key_values.` name; its `present.` output is implied and may not be given. A symbol
    (`B`) has one size everywhere; `2N` is twice `N` and `P/4` a quarter of `P`. Raises InputError listing what is missing, what
    is extra, and every wrong dtype, rank and size.
    """
    expected = {t.name: t for t in bound_tensors(spec)}
    wrong = [
        f"{name}: missing, expected {_signature(t)}" for name, t in expected.items() if name not in tensors
    ]
    wrong += [f"{name}: extra" for name in tensors if name not in expected]
    symbols: dict[str, tuple[int, str]] = {}
    for name, tensor in expected.items():
        if name in tensors:
            wrong += disagreements(tensor, tensors[name], symbols)
    if wrong:
        more = f"; and {len(wrong) - _LISTED} more" if len(wrong) > _LISTED else ""
        raise InputError(
            "These tensors do not fit this component",
            where=f"{spec.graph}: " + "; ".join(wrong[:_LISTED]) + more,
            fix="give each input and output once, with these dtypes and shapes (a cache under its past name only)",
        )
    return {symbol: size for symbol, (size, _) in symbols.items()}


def disagreements(expected: TensorSpec, got: object, symbols: dict[str, tuple[int, str]]) -> list[str]:
    """What is wrong with one tensor. Enters the symbols' sizes, with the tensor that said so, into `symbols`."""
    name, shape = expected.name, tuple(got.shape)
    if dtype_name(got.dtype) != expected.dtype or len(shape) != len(expected.shape):
        return [
            f"{name}: expected {_signature(expected)}, got {dtype_name(got.dtype)}[{','.join(map(str, shape))}]"
        ]
    wrong = []
    for axis, size in zip(expected.shape, shape):
        if isinstance(axis, int):
            if size != axis:
                wrong.append(f"{name}: expected {_signature(expected)}, got size {size} for {axis}")
            continue
        factor, symbol, divisor = axis_parts(axis)
        value, rest = divmod(size * divisor, factor)
        if rest or size < 1:
            wrong.append(f"{name}: expected {_signature(expected)}, got size {size} for {axis}")
            continue
        said, by = symbols.setdefault(symbol, (value, name))
        if value != said:
            wrong.append(f"{name}: expected {symbol}={said} as in {by}, got {symbol}={value}")
    return wrong


def bound_tensors(spec: ComponentSpec) -> list[TensorSpec]:
    """The inputs and outputs that a caller binds: all but the `present.` outputs of caches."""
    implied = {present_name(t.name) for t in spec.inputs}
    return [t for t in spec.inputs + spec.outputs if t.name not in implied]


def shape_from_symbols(shape: tuple[int | str, ...], symbols: Mapping[str, int]) -> tuple[int, ...]:
    """Sizes of `shape`, its dynamic axes computed from `symbols`: `2N` at N=3 is 6."""
    return tuple(axis if isinstance(axis, int) else _size(axis, symbols) for axis in shape)


def symbols_of(shape: tuple[int | str, ...]) -> set[str]:
    """The symbols in `shape`: {'N'} for [`2N`, 1, 64]."""
    return {axis_parts(axis)[1] for axis in shape if isinstance(axis, str)}


def axis_parts(axis: str) -> tuple[int, str, int]:
    """(factor, symbol, divisor) of a dynamic axis: (2, `N`, 1) for `2N`. Raises InputError for another form."""
    match = _AXIS.fullmatch(axis)
    if match is None:
        raise InputError(
            "This dynamic axis has no meaning",
            where=f"expected a form like B, 2N or P/4, got {axis!r}",
            fix="export the bundle again with this version of star-export",
        )
    return int(match[1] or 1), match[2], int(match[3] or 1)


@functools.cache
def dtype_name(dtype: object) -> str:
    """`float32` for the string, the numpy type or the numpy dtype. Foreign byte order is part of the name."""
    try:
        dtype = np.dtype(dtype)
    except TypeError:  # numpy has no bfloat16
        return str(dtype)
    return dtype.name if dtype.isnative else f"{dtype.name} in foreign byte order"


def check_array(array: object, *, shape: tuple[int, ...], dtype: str) -> None:
    """Refuse an array that cannot be written into a buffer of `shape` and `dtype` as it stands: another type, shape, byte order or
    layout is never converted silently. Raises InputError with expected and got."""
    if not isinstance(array, np.ndarray):
        got = type(array).__name__
    elif array.shape != tuple(shape) or dtype_name(array.dtype) != dtype:
        got = f"{dtype_name(array.dtype)}[{','.join(map(str, array.shape))}]"
    elif not array.flags.c_contiguous:
        got = "one that is not contiguous"
    else:
        return
    raise InputError(
        "This array does not fit its buffer",
        fix="convert it with numpy: ascontiguousarray(array, dtype)",
        where=f"buffer: expected a contiguous {dtype}[{','.join(map(str, shape))}], got {got}",
    )


def _size(axis: str, symbols: Mapping[str, int]) -> int:
    factor, symbol, divisor = axis_parts(axis)
    return factor * symbols[symbol] // divisor


def _signature(tensor: TensorSpec) -> str:
    return f"{tensor.dtype}[{','.join(map(str, tensor.shape))}]"
