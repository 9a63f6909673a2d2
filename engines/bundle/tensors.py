"""Checks of the tensors bound to a component: names, dtypes, ranks and sizes. Shared by all sessions.

The checks read only `.shape` and `.dtype`, so they work wherever a tensor lives.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import numpy as np

from ..errors import InputError, listed
from .manifest import ComponentSpec, TensorSpec

PAST, PRESENT = "past_key_values.", "present."
# Of a component in parts: output of a part -> the input of the parts after it that takes the same numbers.
HANDED_ON = {
    "hidden_states": "inputs_embeds",
    "caption_states": "caption_embeds",
    "image_states": "image_embeds",
    "time_states": "time_embeds",
}
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int8": 1, "bool": 1}
A = TypeVar("A")
_AXIS = re.compile(r"(\d*)([A-Z])(?:/(\d+))?")  # `B`, `2N`, `P/4`


class Shaped(Protocol):
    """Anything with a shape and a dtype: a numpy array, or a buffer of a session."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...


def present_name(past_name: str) -> str | None:
    """Name of the output that shares memory with the cache input `past_name`; None for any other input."""
    return PRESENT + past_name.removeprefix(PAST) if past_name.startswith(PAST) else None


def handed_on(inputs: Mapping[str, A], outputs: Mapping[str, A]) -> dict[str, A]:
    """What a part that took `inputs` and made `outputs` hands to the next one, by the names of its inputs."""
    kept = {name: inputs[name] for name in HANDED_ON.values() if name in inputs}
    return kept | {into: outputs[out] for out, into in HANDED_ON.items() if out in outputs}


def check_binding(spec: ComponentSpec, tensors: Mapping[str, Shaped]) -> dict[str, int]:
    """Check that `tensors` are all inputs and outputs of `spec`, and return the size of each axis symbol.

    A cache is given once, under its `past_key_values.` name, which implies its `present.` output. A symbol
    (`B`) has one size everywhere; `2N` is twice `N` and `P/4` a quarter of `P`. Raises InputError that lists
    missing and extra tensors and every wrong dtype, rank and size.
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
        raise InputError(
            "The tensors do not match the component's inputs and outputs",
            where=f"{spec.graph}: {listed(wrong)}",
            fix="pass each input and output once with these dtypes and shapes; a cache only by its past name",
        )
    return {symbol: size for symbol, (size, _) in symbols.items()}


def disagreements(expected: TensorSpec, got: Shaped, symbols: dict[str, tuple[int, str]]) -> list[str]:
    """List what is wrong with one tensor.

    `symbols` maps each symbol to its size and the tensor that fixed it; new symbols are added to it.
    """
    name, shape, dtype = expected.name, tuple(got.shape), dtype_name(got.dtype)
    if dtype != expected.dtype or len(shape) != len(expected.shape):
        return [f"{name}: expected {_signature(expected)}, got {dtype}[{','.join(map(str, shape))}]"]
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
    """The inputs and outputs that a caller binds: all except the `present.` outputs of caches."""
    implied = {present_name(t.name) for t in spec.inputs}
    return [t for t in spec.inputs + spec.outputs if t.name not in implied]


def shape_from_symbols(shape: tuple[int | str, ...], symbols: Mapping[str, int]) -> tuple[int, ...]:
    """Replace the dynamic axes of `shape` by their sizes: `2N` at N=3 is 6."""
    return tuple(axis if isinstance(axis, int) else _size(axis, symbols) for axis in shape)


def symbols_of(shape: tuple[int | str, ...]) -> set[str]:
    """The symbols in `shape`: {'N'} for [`2N`, 1, 64]."""
    return {axis_parts(axis)[1] for axis in shape if isinstance(axis, str)}


def axis_parts(axis: str) -> tuple[int, str, int]:
    """Split a dynamic axis into (factor, symbol, divisor): `2N` is (2, `N`, 1). Else raises InputError."""
    match = _AXIS.fullmatch(axis)
    if match is None:
        raise InputError(
            "This dynamic axis is not valid",
            where=f"expected a form like B, 2N or P/4, got {axis!r}",
            fix="export the bundle again with this version of star-export",
        )
    return int(match[1] or 1), match[2], int(match[3] or 1)


@functools.cache
def dtype_name(dtype: Any) -> str:
    """Name of a dtype given as a string, numpy type or numpy dtype, including a foreign byte order."""
    try:
        dtype = np.dtype(dtype)
    except TypeError:  # numpy has no bfloat16
        return str(dtype)
    return dtype.name if dtype.isnative else f"{dtype.name} in foreign byte order"


def check_array(array: object, *, shape: tuple[int, ...], dtype: str) -> None:
    """Raise InputError unless `array` is a contiguous numpy array of exactly this shape and dtype.

    A session never converts another type, shape, byte order or layout silently.
    """
    if not isinstance(array, np.ndarray):
        got = type(array).__name__
    elif array.shape != tuple(shape) or dtype_name(array.dtype) != dtype:
        got = f"{dtype_name(array.dtype)}[{','.join(map(str, array.shape))}]"
    elif not array.flags.c_contiguous:
        got = "an array that is not contiguous"
    else:
        return
    raise InputError(
        "The array does not match the buffer",
        where=f"buffer: expected a contiguous {dtype}[{','.join(map(str, shape))}], got {got}",
        fix="convert it with numpy: ascontiguousarray(array, dtype)",
    )


def _size(axis: str, symbols: Mapping[str, int]) -> int:
    factor, symbol, divisor = axis_parts(axis)
    return factor * symbols[symbol] // divisor


def _signature(tensor: TensorSpec) -> str:
    return f"{tensor.dtype}[{','.join(map(str, tensor.shape))}]"
