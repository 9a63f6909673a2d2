"""bfloat16 in numpy, which has no such type: a bfloat16 is the upper half of a float32."""

from __future__ import annotations

import numpy as np


def float32_from_bits(bits: np.ndarray) -> np.ndarray:
    """The numbers whose bfloat16 bit patterns are `bits` (uint16, any shape), as float32."""
    wide = bits.astype(np.uint32)
    wide <<= 16  # in place: weights are large
    return wide.view(np.float32)


def bf16_rounded(x: np.ndarray) -> np.ndarray:
    """float32 values rounded to the nearest bfloat16 (ties to even), as float32. For finite values."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
