"""The diffusion decoder's noise: normal numbers that are a function of seed, image and place alone.

As in `gumbel.py`, integers of a counter-based generator are looked up in a table of quantiles, so that every
machine gets the same bits.
"""

from __future__ import annotations

import functools
from statistics import NormalDist

import numpy as np

from .gumbel import check_seed

CODE_BITS, OCTAVE_BITS = 24, 11  # random bits of a size; log2 of the bins between a code and its double
ROUNDING = 1 << 16  # quantiles are multiples of 1 / ROUNDING, so every libm gives the same table
PAINT, SOURCE = 1, 2  # what the numbers are for: the last word of the generator's counter
_FLOAT_ONE = 127 << OCTAVE_BITS  # the upper bits of 1.0 in float32
_SIGN_BIT = 7  # of a number of 32 bits, below those of its size


@functools.cache
def sizes() -> np.ndarray:
    """The table: float32 [24 * 2^11 + 1], the size of a normal number for each bin of codes.

    A code c, 1 to 2^24, stands for a probability between (c - 1) and c of 2^24 that a number is larger in
    size. Codes share a bin if they agree in their leading 12 bits, so large numbers are as fine as others.
    """
    octave, step = np.divmod(np.arange(CODE_BITS << OCTAVE_BITS), 1 << OCTAVE_BITS)
    edges = np.append(np.ldexp(1 + step / (1 << OCTAVE_BITS), octave), [1 << CODE_BITS, (1 << CODE_BITS) + 1])
    edges = np.ceil(edges)  # the first code of each bin; a bin without codes is empty
    larger = (edges[:-1] + edges[1:] - 2) / 2 / (1 << CODE_BITS)  # the middle of the bin
    quantile = NormalDist().inv_cdf
    table = np.array([-quantile(p / 2) for p in larger.tolist()])
    return (np.rint(table * ROUNDING) / ROUNDING).astype(np.float32)


def normal_noise(seed: int, *, images: int, shape: tuple[int, ...], what: int) -> np.ndarray:
    """Standard normal numbers, float32 [images, *shape]; `what` is PAINT or SOURCE.

    The generator's key is the seed, and its counter (block, 0, image, what) gives four words of 64 bits, low
    halves first, for eight consecutive places. Raises UsageError for an invalid seed.
    """
    check_seed(seed)
    count = int(np.prod(shape))
    generators = (np.random.Philox(key=seed, counter=i << 128 | what << 192) for i in range(images))
    words = np.stack([generator.random_raw(4 * -(-count // 8)) for generator in generators])
    numbers = words.astype("<u8", copy=False).view("<u4")[:, :count]
    codes = ((numbers >> np.uint32(32 - CODE_BITS)) + np.uint32(1)).astype(np.float32)  # exact
    found = sizes()[(codes.view(np.uint32) >> np.uint32(23 - OCTAVE_BITS)) - np.uint32(_FLOAT_ONE)]
    negative = (numbers >> np.uint32(_SIGN_BIT) & np.uint32(1)).astype(bool)
    return np.where(negative, -found, found).reshape(images, *shape)
