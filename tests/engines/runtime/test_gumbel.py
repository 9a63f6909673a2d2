"""The noise is what it says: Philox, Gumbel quantiles, the same bits everywhere, and the right draws."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from engines.errors import UsageError
from engines.runtime import gumbel
from engines.runtime.gumbel import Noise, gumbel_noise, quantiles
from engines.runtime.sampler import filtered_probabilities, sample
from reference.gumbel import noise_of_image, philox

DRAWS, IDS, SIZE = 1_000_000, 4096, 1 << 16


@pytest.mark.parametrize(
    "seed, image, step, size",
    [(7, 0, 3, 65536), (2**127 + 5, 3, 575, 1001), (0, 1, 0, 13), (2**128 - 1, 127, 9, 4096)],
)
def test_the_noise_is_the_references(seed, image, step, size):
    """numpy's generator and its table against Philox and the quantiles written out."""
    got = gumbel_noise(seed, image=image, steps=[step], size=size)
    assert got.shape == (1, size) and got.dtype == np.float32
    np.testing.assert_array_equal(got[0], noise_of_image(seed, image, step, size))


def test_philox_is_the_published_one():
    """A known answer of Random123's `kat_vectors`, philox4x64 with 10 rounds: counter and key all ones."""
    ones = 2**64 - 1
    words = philox(np.array([ones], np.uint64), ones, ones, 2**128 - 1, fourth=ones)
    assert [int(word[0]) for word in words] == [
        0x87B092C3013FE90B,
        0x438C3C67BE8D0224,
        0x9CC7D7C69CD777B6,
        0xA09CAEBF594F0BA0,
    ]


def test_the_table_is_the_same_on_every_machine():
    """Its hash, for ever: another libm must round to the same multiples of 1 / 65536."""
    table = quantiles()
    assert hashlib.sha256(table.astype("<f4").tobytes()).hexdigest() == (
        "51c0723cef4e14203405919998d4a06b04b4565f872527e3742afcf1d9b6bd97"
    )
    np.testing.assert_array_equal(table * 65536, np.rint(table * 65536))
    assert (np.diff(table) <= 0).all()


def test_the_noise_has_gumbels_distribution():
    """Its deciles, and those of the largest of 1,000, which decides a draw."""
    noise = np.sort(gumbel_noise(1, image=0, steps=range(64), size=IDS).ravel())
    shares = np.arange(1, 10) / 10
    np.testing.assert_allclose(np.quantile(noise, shares), -np.log(-np.log(shares)), atol=0.02)
    largest = gumbel_noise(2, image=0, steps=range(4000), size=1000).max(1)
    wanted = -np.log(-np.log(shares)) + np.log(1000)
    np.testing.assert_allclose(np.quantile(largest, shares), wanted, atol=0.15)
    assert len(np.unique(largest)) > 2000  # of 4,000: equal steps of the probability would leave about 60


@pytest.mark.parametrize(
    "ids, top_k, top_p", [(64, 0, 1.0), (64, 20, 1.0), (256, 150, 0.8), (512, 512, 0.95)]
)
def test_draws_have_the_filtered_distribution(ids, top_k, top_p):
    """Chi-square of a million draws against the filtered probabilities; ids that are left out never come.

    A row of noise decides many draws here, each with ids of its own.
    """
    logits = np.random.default_rng(ids + top_k).standard_normal((1, ids)).astype(np.float32)
    probabilities = filtered_probabilities(logits, top_k=top_k, top_p=top_p)[0].astype(np.float64)
    kept = np.flatnonzero(probabilities)
    counts, steps, size = np.zeros(ids), range(DRAWS * ids // SIZE), SIZE
    for step in steps:
        noise = gumbel_noise(5, image=0, steps=[step], size=size).reshape(-1, ids)
        drawn = kept[(logits[:, kept] + noise[:, kept]).argmax(-1)]
        counts += np.bincount(drawn, minlength=ids)
        if step < 3:
            np.testing.assert_array_equal(drawn, sample(logits, top_k=top_k, top_p=top_p, noise=noise))
    expected = probabilities[kept] / probabilities.sum() * counts.sum()
    freedom = len(kept) - 1
    chi_square = ((counts[kept] - expected) ** 2 / expected).sum()
    assert counts.sum() > 0.99 * DRAWS and chi_square <= freedom + 4 * np.sqrt(2 * freedom)


def test_every_argument_counts():
    one = {"image": 0, "steps": [5], "size": 64}
    first = gumbel_noise(7, **one)
    np.testing.assert_array_equal(first, gumbel_noise(7, **one))
    np.testing.assert_array_equal(first[:, :9], gumbel_noise(7, **one | {"size": 9}))
    others = gumbel_noise(8, **one), gumbel_noise(7 + 2**64, **one)
    for other in (*others, gumbel_noise(7, **one | {"image": 1}), gumbel_noise(7, **one | {"steps": [6]})):
        assert (first != other).mean() > 0.9
    np.testing.assert_array_equal(
        gumbel_noise(7, image=0, steps=[5], size=3)[0],
        np.float32([0.52294921875, 0.60443115234375, -0.651458740234375]),
    )


def test_rows_that_are_kept_are_those_that_are_made(monkeypatch):
    made = []
    monkeypatch.setattr(
        gumbel, "gumbel_noise", lambda *a, **k: made.append(list(k["steps"])) or gumbel_noise(*a, **k)
    )
    noise = Noise(3, images=2, window=4, size=16)
    for steps in ((0, 0), (2, 1), (2, 5), (9, 5), (1, 0)):
        rows = noise.at(np.array(steps))
        for image, step in enumerate(steps):
            wanted = gumbel_noise(3, image=image, steps=range(step, step + 4), size=16)
            np.testing.assert_array_equal(rows[image], wanted)
    assert made[:4] == [[0, 1, 2, 3], [0, 1, 2, 3], [4, 5], [4]]


@pytest.mark.parametrize("seed", [-1, 2**128])
def test_seeds_out_of_range_are_refused(seed):
    with pytest.raises(UsageError, match="seed"):
        gumbel_noise(seed, image=0, steps=[0], size=8)
