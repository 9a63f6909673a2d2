"""bfloat16 for numpy, which has no such dtype: a bfloat16 is the upper half of a float32."""

from __future__ import annotations

import numpy as np


def float32_from_bits(bits: np.ndarray) -> np.ndarray:
    """Convert bfloat16 bit patterns, uint16 of any shape, to float32 values of the same shape."""
    wide = bits.astype(np.uint32)
    wide <<= 16  # in place, because weights are large
    return wide.view(np.float32)


def bf16_rounded(x: np.ndarray) -> np.ndarray:
    """Round finite float32 values to the nearest bfloat16 (ties to even), returned as float32."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    rounded = bits >> 16
    rounded &= 1  # in place, because weights are large
    rounded += np.uint32(0x7FFF)
    rounded += bits
    rounded &= np.uint32(0xFFFF0000)
    return rounded.view(np.float32)
