"""The paired difference of two scores: the published interval, its coverage, and its edges."""

from __future__ import annotations

import numpy as np
import pytest

from reference.nano.benchmark.score import paired_difference


def sides(both: int, ours: int, others: int, neither: int) -> tuple[list[bool], list[bool]]:
    """The results of two sides, by how many items each of them got right."""
    return (
        [True] * (both + ours) + [False] * (others + neither),
        [True] * both + [False] * ours + [True] * others + [False] * neither,
    )


def test_the_interval_is_newcombes() -> None:
    """Airway hyper-responsiveness before and after a transplantation (Bentur et al. 2009), as computed by
    Fagerland, Lydersen and Laake 2014, "Recommended tests and confidence intervals for paired binomial
    proportions"."""
    assert paired_difference(*sides(1, 1, 7, 12)) == pytest.approx((-0.286, -0.507, -0.026), abs=5e-4)


def test_exchanging_the_sides_turns_the_interval_around() -> None:
    difference, low, high = paired_difference(*sides(14, 5, 1, 22))
    assert paired_difference(*sides(14, 1, 5, 22)) == pytest.approx((-difference, -high, -low))


def test_results_that_agree_still_leave_room_for_chance() -> None:
    for both, neither in ((9, 0), (0, 9), (90, 10)):
        difference, low, high = paired_difference(*sides(both, 0, 0, neither))
        assert difference == 0 and -high == pytest.approx(low) and high > 0.01


def test_pairing_narrows_the_interval() -> None:
    """The same two shares, 32 and 30 of 36, once by the same items and once by others."""
    paired, apart = paired_difference(*sides(30, 2, 0, 4)), paired_difference(*sides(26, 6, 4, 0))
    assert paired[0] == pytest.approx(apart[0]) and paired[2] - paired[1] < 0.8 * (apart[2] - apart[1])


@pytest.mark.parametrize(("items", "most"), [(36, 0.99), (900, 0.965)])
def test_it_holds_the_truth_in_95_of_100_samples(items: int, most: float) -> None:
    """Of few items in some more, since they can differ in few ways."""
    shares = {"both": 0.82, "ours": 0.03, "others": 0.06, "neither": 0.09}
    counts = np.random.default_rng(5).multinomial(items, list(shares.values()), size=2000)
    intervals = [paired_difference(*sides(*row))[1:] for row in counts]
    held = np.mean([low <= shares["ours"] - shares["others"] <= high for low, high in intervals])
    assert 0.94 <= held <= most
