"""The noise of the draw: standard Gumbel numbers that are a function of seed, image, step and id alone.

The largest of log p + G is a draw from p (Gumbel 1954), and with G fixed a small change of p seldom changes
which is largest. An integer of a counter-based generator, Philox4x64-10 (Salmon et al. 2011), is looked up in
a table of quantiles. So no executor computes a logarithm, and all of them add the same bits.

A step's numbers are made when the step comes: one row of float32 per image and position.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import numpy as np

from ..errors import UsageError
from ..ranges import is_whole

CODE_BITS, OCTAVE_BITS = 24, 11  # random bits of a number; log2 of the bins between a code and its double
ROUNDING = 1 << 16  # quantiles are multiples of 1 / ROUNDING, so every libm gives the same table
_FLOAT_ONE = 127 << OCTAVE_BITS  # the upper bits of 1.0 in float32


@functools.cache
def quantiles() -> np.ndarray:
    """The table: float32 [24 * 2^11 + 1], the Gumbel quantile of each bin of codes.

    A code c, 1 to 2^24, stands for a probability between (c - 1) and c of 2^24 that a number is larger. Codes
    share a bin if they agree in their leading 12 bits, so the large numbers, among which the draw is decided,
    are as fine as the others: equal steps of the probability would leave a thousand ids about sixty numbers
    to decide by.
    """
    octave, step = np.divmod(np.arange(CODE_BITS << OCTAVE_BITS), 1 << OCTAVE_BITS)
    edges = np.append(np.ldexp(1 + step / (1 << OCTAVE_BITS), octave), [1 << CODE_BITS, (1 << CODE_BITS) + 1])
    edges = np.ceil(edges)  # the first code of each bin; a bin without codes is empty
    larger = (edges[:-1] + edges[1:] - 2) / 2 / (1 << CODE_BITS)  # the middle of the bin
    table = -np.log(-np.log1p(-larger))
    return (np.rint(table * ROUNDING) / ROUNDING).astype(np.float32)


def check_seed(seed: int) -> None:
    """Raise UsageError for a seed that is no whole number, is negative or has more than 128 bits."""
    if not (is_whole(seed) and 0 <= seed < 2**128):
        raise UsageError(
            "The seed is out of range",
            where=f"seed: expected a whole number from 0 to 2^128 - 1, got {seed!r:.60}",
            fix="use another seed",
        )


def gumbel_noise(seed: int, *, image: int, steps: Iterable[int], size: int) -> np.ndarray:
    """The numbers for the ids 0 to `size` - 1 when the tokens `steps` of image `image` are drawn: float32 [n,
    size].

    The generator's key is the seed, and its counter (block, step, image, 0) gives four words of 64 bits, low
    halves first, for eight consecutive ids; blocks count from 1. Raises UsageError for an invalid seed.
    """
    check_seed(seed)
    blocks = -(-size // 8)
    generators = (np.random.Philox(key=seed, counter=step << 64 | image << 128) for step in steps)
    words = np.stack([generator.random_raw(4 * blocks) for generator in generators])
    numbers = words.astype("<u8", copy=False).view("<u4")[:, :size]
    codes = ((numbers >> np.uint32(32 - CODE_BITS)) + np.uint32(1)).astype(np.float32)  # exact
    return quantiles()[(codes.view(np.uint32) >> np.uint32(23 - OCTAVE_BITS)) - np.uint32(_FLOAT_ONE)]


class Noise:
    """The numbers of N images at W consecutive steps each, float32 [N, W, size] in `rows`.

    One seed numbers its images from 0 on. With N seeds, each image is the first one of its own seed, so it is
    the same whatever it is drawn together with. A step's numbers are made once, as long as the steps of an
    image only grow.
    """

    def __init__(self, seed: int | Sequence[int], *, images: int, window: int, size: int):
        self.streams = (
            [(seed, i) for i in range(images)] if isinstance(seed, int) else [(own, 0) for own in seed]
        )
        for own, _ in self.streams:
            check_seed(own)
        self.rows = np.zeros((images, window, size), np.float32)
        self.steps = np.full(images, -window)  # the first step of each image

    def at(self, steps: np.ndarray) -> np.ndarray:
        """`rows` for the steps from `steps` [N] on."""
        for image, step in enumerate(steps.tolist()):
            rows, moved = self.rows[image], step - int(self.steps[image])
            kept = max(0, len(rows) - moved) if moved >= 0 else 0
            rows[:kept] = rows[len(rows) - kept :]
            if kept < len(rows):
                new = range(step + kept, step + len(rows))
                seed, number = self.streams[image]
                rows[kept:] = gumbel_noise(seed, image=number, steps=new, size=rows.shape[1])
        self.steps = steps.copy()
        return self.rows
