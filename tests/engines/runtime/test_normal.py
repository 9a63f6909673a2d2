"""The diffusion decoder's noise: normal, the same on every machine, and another for each seed and image."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest

from engines.errors import UsageError
from engines.runtime.normal import PAINT, SOURCE, normal_noise, sizes

SHAPE = (16, 64, 64)


def test_its_distribution_is_normal() -> None:
    found = normal_noise(3, images=2, shape=SHAPE, what=PAINT)
    assert found.dtype == np.float32 and found.shape == (2, *SHAPE)
    count, moments = found.size, [float((found.astype(np.float64) ** n).mean()) for n in (1, 2, 3, 4)]
    for moment, expected, variance in zip(moments, (0, 1, 0, 3), (1, 2, 15, 96)):
        assert abs(moment - expected) < 5 * math.sqrt(variance / count)
    for bound in (0.5, 1.0, 2.0, 3.0):
        share, expected = float((np.abs(found) > bound).mean()), math.erfc(bound / math.sqrt(2))
        assert abs(share - expected) < 5 * math.sqrt(expected / count)


def test_neighbours_seeds_images_and_purposes_are_independent() -> None:
    first = normal_noise(3, images=2, shape=SHAPE, what=PAINT)
    others = [
        first[1],
        normal_noise(4, images=1, shape=SHAPE, what=PAINT)[0],
        normal_noise(3, images=1, shape=SHAPE, what=SOURCE)[0],
        np.roll(first[0], 1, axis=2),
        np.roll(first[0], 1, axis=1),
    ]
    for other in others:
        assert abs(float((first[0] * other).mean())) < 5 / math.sqrt(first[0].size)


def test_an_images_noise_does_not_depend_on_the_number_of_images() -> None:
    one, three = (normal_noise(9, images=n, shape=SHAPE, what=PAINT) for n in (1, 3))
    assert np.array_equal(one[0], three[0])


def test_the_numbers_are_fixed_for_all_time() -> None:
    found = normal_noise(100, images=2, shape=(16, 8, 8), what=PAINT)
    assert hashlib.sha256(found.tobytes()).hexdigest()[:16] == "34243bdda8059a2e"
    assert hashlib.sha256(sizes().tobytes()).hexdigest()[:16] == "685d91f5abecc637"


def test_the_table_falls_from_the_largest_number_to_zero() -> None:
    assert (np.diff(sizes()) <= 0).all() and sizes()[-1] >= 0 and 5.5 < sizes()[0] < 5.6


@pytest.mark.parametrize("seed", [-1, 2**128])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(UsageError, match="seed"):
        normal_noise(seed, images=1, shape=(16, 8, 8), what=PAINT)
