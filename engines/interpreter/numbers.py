"""TensorRT's number formats in numpy, which has no bfloat16, fp8, fp4 or int4.

A real number of any type is held in float32, rounded to its type: float32 can represent every value of these
formats. BF16 is the upper half of a float32, FP8 is E4M3 without infinities (largest 448), FP4 is E2M1
(largest 6), and E8M0 is a power of two (NVIDIA, NvInferRuntimeBase.h `DataType`; OCP Microscaling Formats
v1.0, 5.3 and 5.4). Two INT4 or FP4 numbers share a byte, the first in the lower half.
"""

from __future__ import annotations

import functools

import numpy as np

from ..bundle.bfloat16 import bf16_rounded, float32_from_bits

REALS = ("FLOAT", "HALF", "BF16", "FP8", "FP4", "E8M0")
INTEGERS = {
    "INT8": np.int8,
    "UINT8": np.uint8,
    "INT32": np.int32,
    "INT64": np.int64,
    "INT4": np.int8,
    "BOOL": np.bool_,
}
RANGES = {"INT4": (-8, 7), "INT8": (-128, 127), "UINT8": (0, 255)}
_REAL_BITS = {"FLOAT": 32, "HALF": 16, "BF16": 16, "FP8": 8, "FP4": 4, "E8M0": 8}
BITS = _REAL_BITS | {"INT8": 8, "UINT8": 8, "INT32": 32, "INT64": 64, "INT4": 4, "BOOL": 8}
_PIECE = 1 << 15  # numbers
LARGEST = {"FP8": 448.0, "FP4": 6.0}
_SMALL = {"FP8": (3, -6), "FP4": (1, 0)}  # bits of mantissa, exponent of the smallest normal number


def held_dtype(kind: str) -> np.dtype:
    """The numpy type that holds values of TensorRT's type `kind`."""
    return np.dtype(INTEGERS.get(kind, np.float32))


def rounded(array: np.ndarray, kind: str) -> np.ndarray:
    """Round a float32 array to the nearest numbers of `kind`, ties to even.

    Where a number is too large, FP8 and FP4 saturate; HALF and BF16 become infinite.
    """
    if kind == "FLOAT":
        return array
    if kind == "HALF":
        with np.errstate(over="ignore"):
            return array.astype(np.float16).astype(np.float32)
    if kind == "BF16":
        return _bf16(array)
    return _small_float(array, *_SMALL[kind], LARGEST[kind])


def _bf16(array: np.ndarray) -> np.ndarray:
    """Round to bfloat16, in pieces that stay in the processor's cache: a weight is large."""
    flat = np.ascontiguousarray(array, np.float32).reshape(-1)
    result = np.empty_like(flat)
    for first in range(0, flat.size, _PIECE):
        piece = flat[first : first + _PIECE]
        values = bf16_rounded(piece)
        lost = np.isnan(piece)
        result[first : first + _PIECE] = np.where(lost, piece, values) if lost.any() else values
    return result.reshape(array.shape)


def bytes_count(kind: str, count: int) -> int:
    """How many bytes `count` numbers of `kind` take."""
    return (count * BITS[kind] + 7) // 8


def unpacked(data: np.ndarray, kind: str, count: int) -> np.ndarray:
    """Decode `count` numbers of `kind` from TensorRT's bytes (flat uint8) to `held_dtype(kind)`.

    Returns a view where numpy has the format itself.
    """
    if kind in ("FLOAT", "INT8", "UINT8", "INT32", "INT64", "BOOL"):
        return data.view(held_dtype(kind))
    if kind == "HALF":
        return data.view(np.float16).astype(np.float32)
    if kind == "BF16":
        return float32_from_bits(data.view(np.uint16))
    if kind in ("FP8", "E8M0"):
        return _table(kind)[data]
    fours = np.stack([data & 15, data >> 4], axis=-1).reshape(-1)[:count]
    if kind == "FP4":
        return _table(kind)[fours]
    assert kind == "INT4", kind
    signed = fours.view(np.int8)  # without a copy, and changed in place: weights are large
    signed ^= 8
    signed -= 8
    return signed


def _small_float(array: np.ndarray, mantissa: int, lowest: int, largest: float) -> np.ndarray:
    exponent = np.maximum(np.frexp(array)[1] - 1, lowest)  # subnormals are spaced as the lowest exponent
    step = np.ldexp(np.float32(1), exponent - mantissa)
    return np.clip(np.rint(array / step) * step, -largest, largest).astype(np.float32)


@functools.cache
def _table(kind: str) -> np.ndarray:
    """The value of every code of `kind`, as float32."""
    if kind == "E8M0":
        return np.append(np.ldexp(1.0, np.arange(255) - 127), np.nan).astype(np.float32)
    mantissa, lowest = _SMALL[kind]
    size = BITS[kind]
    codes = np.arange(1 << size)
    field, fraction = (codes >> mantissa) & ((1 << (size - 1 - mantissa)) - 1), codes & ((1 << mantissa) - 1)
    normal = np.ldexp(1 + fraction / (1 << mantissa), field - 1 + lowest)
    values = np.where(field == 0, np.ldexp(fraction / (1 << mantissa), lowest), normal)
    if kind == "FP8":
        values[(codes & 127) == 127] = np.nan
    return np.where(codes >> (size - 1), -values, values).astype(np.float32)
