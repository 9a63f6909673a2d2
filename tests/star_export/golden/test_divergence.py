"""KL divergence and total variation of two models' draws: by hand, by simulation, and where supports
differ."""

from __future__ import annotations

import math

import numpy as np
import pytest

from engines.errors import InputError
from engines.runtime.sampler import filtered_probabilities, sample
from star_export.golden.divergence import Spread, divergence


def logits_of(*rows: list[float]) -> np.ndarray:
    """Logits [T, V] of these probabilities, off by a constant, as logits are."""
    return (np.log(np.array(rows)) + 3).astype(np.float32)


def noisy(rng: np.random.Generator, *, size: int, change: float) -> tuple[np.ndarray, np.ndarray]:
    first = 3 * rng.standard_normal((8, size), dtype=np.float32)
    return first + change * rng.standard_normal(first.shape, dtype=np.float32), first


def test_equal_models_are_not_apart() -> None:
    _, first = noisy(np.random.default_rng(1), size=50, change=0)
    apart = divergence(first + np.float32(2), first, top_k=20, top_p=0.9)
    assert apart.kl.shape == (8,) and apart.kl.max() < 1e-9 and apart.total_variation.max() < 1e-5


def test_a_case_by_hand() -> None:
    """Both keep the two likeliest ids: p is (3/4, 1/4) and (1/2, 1/2)."""
    first, candidate = logits_of([0.6, 0.2, 0.1, 0.1]), logits_of([0.4, 0.4, 0.1, 0.1])
    apart = divergence(candidate, first, top_k=2, top_p=1)
    assert apart.kl == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-5)
    assert apart.total_variation == pytest.approx(0.25, rel=1e-5)


def test_without_filters_it_is_that_of_the_whole_distributions() -> None:
    candidate, first = noisy(np.random.default_rng(2), size=300, change=0.3)
    p, q = (filtered_probabilities(x.astype(np.float64), top_k=0, top_p=1) for x in (first, candidate))
    apart = divergence(candidate, first, top_k=0, top_p=1)
    assert apart.kl == pytest.approx((p * np.log(p / q)).sum(-1), rel=1e-4)
    assert apart.total_variation == pytest.approx(np.abs(p - q).sum(-1) / 2, rel=1e-4)


def test_where_the_supports_differ_kl_is_finite_and_total_variation_sees_it() -> None:
    """The candidate leaves out the first one's second id and keeps the third: KL on the first one's ids."""
    first, candidate = logits_of([0.6, 0.25, 0.15]), logits_of([0.6, 0.15, 0.25])
    apart = divergence(candidate, first, top_k=2, top_p=1)
    p, q = (0.6 / 0.85, 0.25 / 0.85), (0.6 / 0.75, 0.15 / 0.75)
    assert apart.kl == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p, q)), rel=1e-5)
    assert apart.total_variation == pytest.approx(0.25 / 0.85, rel=1e-5)


def test_what_a_candidate_draws_beside_the_only_id_is_seen_by_total_variation_alone() -> None:
    apart = divergence(logits_of([0.5, 0.5, 1e-6]), logits_of([0.98, 0.01, 0.01]), top_k=3, top_p=0.9)
    assert apart.kl == 0 and apart.total_variation == pytest.approx(0.5, rel=1e-5)


def test_it_grows_with_the_change() -> None:
    found = [
        divergence(*noisy(np.random.default_rng(3), size=500, change=change), top_k=100, top_p=0.95)
        for change in (0.01, 0.1, 1.0)
    ]
    assert found[0].kl.mean() < found[1].kl.mean() / 30 < found[2].kl.mean() / 900
    assert found[0].total_variation.mean() < found[1].total_variation.mean() < found[2].total_variation.mean()


@pytest.mark.parametrize("change", [0.03, 0.3, 1.0])
def test_the_same_noise_draws_the_same_id_as_often_as_promised(change: float) -> None:
    rng, draws, filters = np.random.default_rng(4), 20_000, {"top_k": 30, "top_p": 0.9}
    candidate, first = noisy(rng, size=60, change=change)
    promised = 1 - divergence(candidate, first, **filters).total_variation
    promised = promised / (2 - promised)  # (1 - TV) / (1 + TV)
    for i in range(len(first)):
        noise = rng.gumbel(size=(draws, first.shape[1])).astype(np.float32)
        same = np.mean(
            sample(candidate[i], noise=noise, **filters) == sample(first[i], noise=noise, **filters)
        )
        assert same >= promised[i] - 4 * math.sqrt(promised[i] * (1 - promised[i]) / draws) - 1e-3


def test_a_spread_has_the_tail() -> None:
    spread = Spread.of(np.r_[np.zeros(94), np.ones(5), 7.0])
    assert (spread.mean, spread.percentile_95, spread.largest) == (pytest.approx(0.12), 1.0, 7.0)


@pytest.mark.parametrize(
    ("candidate", "said"),
    [
        (np.zeros((2, 4), np.float32), r"expected \[2, 5\], not empty, got \[2, 4\]"),
        (np.zeros((1, 5), np.float32), r"got \[1, 5\]"),
        (np.full((2, 5), np.nan, np.float32), "candidate: expected finite numbers, got 10 NaN or Inf of 10"),
        (np.array([[0, 0, 0, 0, 0], [0, 0, np.inf, 0, 0]], np.float32), "got 1 NaN or Inf of 10"),
    ],
)
def test_what_cannot_be_compared_is_refused(candidate: np.ndarray, said: str) -> None:
    with pytest.raises(InputError, match=said):
        divergence(candidate, np.zeros((2, 5), np.float32), top_k=2, top_p=0.9)
    with pytest.raises(InputError):
        divergence(np.zeros((2, 5), np.float32), candidate, top_k=2, top_p=0.9)
    with pytest.raises(InputError):
        divergence(np.zeros((0, 5)), np.zeros((0, 5)), top_k=2, top_p=0.9)
