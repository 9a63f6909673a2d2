"""The random numbers of the draw, written out: Philox4x64-10, and Gumbel quantiles of its integers.

docs/star.md 3.4 defines them. Sources: Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy
as 1, 2, 3"; Gumbel 1954, "Statistical theory of extreme values".
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

MULTIPLIERS = 0xD2E7470EE14C6C93, 0xCA5A826395121157
WEYL = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B  # what is added to the two keys from round to round
ROUNDS, IDS_PER_BLOCK = 10, 8
MASK = 2**64 - 1


def gumbel_noise(seeds: Sequence[int], step: int, size: int) -> Tensor:
    """The numbers for the ids 0 to `size` - 1 at token `step` of the first image of each seed: float32 [N,
    size]."""
    return torch.from_numpy(np.stack([noise_of_image(seed, 0, step, size) for seed in seeds]))


def noise_of_image(seed: int, image: int, step: int, size: int) -> np.ndarray:
    """The numbers for token `step` of image `image` of one seed: float32 [size].

    A block of the generator has four words of 64 bits, and a word two numbers of 32 bits, the low one first.
    """
    blocks = np.arange(1, -(-size // IDS_PER_BLOCK) + 1, dtype=np.uint64)
    words = np.stack(philox(blocks, step, image, seed), axis=1).ravel()
    numbers = np.stack([words & np.uint64(2**32 - 1), words >> np.uint64(32)], axis=1).ravel()[:size]
    return quantile(numbers >> np.uint64(8))


def philox(block: np.ndarray, second: int, third: int, key: int, *, fourth: int = 0) -> list[np.ndarray]:
    """Four words uint64 for each counter (block, second, third, fourth) under a key of 128 bits."""
    words = [block, *(np.full_like(block, value) for value in (second, third, fourth))]
    low, high = key & MASK, key >> 64
    for _ in range(ROUNDS):
        products = [multiply(words[0], MULTIPLIERS[0]), multiply(words[2], MULTIPLIERS[1])]
        words = [
            products[1][0] ^ words[1] ^ np.uint64(low),
            products[1][1],
            products[0][0] ^ words[3] ^ np.uint64(high),
            products[0][1],
        ]
        low, high = low + WEYL[0] & MASK, high + WEYL[1] & MASK
    return words


def multiply(a: np.ndarray, b: int) -> tuple[np.ndarray, np.ndarray]:
    """The upper and the lower half of the 128-bit products of a uint64 and b."""
    half, rest = np.uint64(32), np.uint64(2**32 - 1)
    b_high, b_low = np.uint64(b >> 32), np.uint64(b & 2**32 - 1)
    middle = (a >> half) * b_low + ((a & rest) * b_low >> half)  # cannot overflow
    carried = (a & rest) * b_high + (middle & rest)
    return (a >> half) * b_high + (middle >> half) + (carried >> half), a * np.uint64(b)


def quantile(codes: np.ndarray) -> np.ndarray:
    """The Gumbel quantile of each 24-bit code, float32; equal for codes that share a bin.

    A code c means that a number is larger with a probability between c and c + 1 of 2^24. c + 1 is cut after
    12 significant bits, which gives the bin, and the middle of the bin the quantile, rounded to 1 / 65536.
    """
    octave = np.frexp((codes + np.uint64(1)).astype(np.float64))[1] - 1
    width = np.maximum(np.ldexp(1.0, octave - 11), 1.0)
    first = np.floor((codes + np.uint64(1)).astype(np.float64) / width) * width
    last = np.minimum(first + width, 2.0**24 + 1)
    larger = (first + last - 2) / 2 / 2.0**24
    return (np.rint(-np.log(-np.log1p(-larger)) * 65536) / 65536).astype(np.float32)
