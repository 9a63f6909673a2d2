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
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
