"""The numpy sampler is the official filter, the reference's draw, and reproducible."""

import numpy as np
import pytest
import torch

from engines.errors import UsageError
from engines.runtime.sampler import (
    check_sampling,
    filtered_probabilities,
    guide,
    penalise_repetition,
    sample,
)
from reference import tasks


@pytest.mark.parametrize("name", ["samp0", "samp1", "samp2"])
def test_the_filters_are_the_official_ones(official, name):
    got = filtered_probabilities(
        official[f"{name}.logits"], top_k=int(official[f"{name}.k"]), top_p=float(official[f"{name}.p"])
    )
    expected = official[f"{name}.probs"]
    np.testing.assert_array_equal(got > 0, expected > 0)
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=1e-9)


def test_ties_stay_and_one_token_always_remains():
    logits = np.float32([[0, 3, 3, 3, 1]])
    assert (filtered_probabilities(logits, top_k=2, top_p=1.0) > 0).tolist() == [
        [False, True, True, True, False]
    ]
    assert (filtered_probabilities(logits, top_k=0, top_p=1e-9) > 0).tolist() == [
        [False, True, True, True, False]
    ]
    assert (filtered_probabilities(logits[:, 3:], top_k=0, top_p=1e-9) > 0).tolist() == [[True, False]]


@pytest.mark.parametrize("top_k, top_p", [(1, 1.0), (20, 0.9), (100, 1.0), (0, 0.5), (0, 1.0)])
def test_the_draw_is_the_references(top_k, top_p):
    rng = np.random.default_rng(0)
    logits = np.round(rng.standard_normal((400, 100)) * 2, 1).astype(np.float32)  # with ties
    noise = rng.gumbel(size=logits.shape).astype(np.float32)
    expected = tasks.sample(torch.tensor(logits), top_k=top_k, top_p=top_p, noise=torch.tensor(noise))
    got = sample(logits, top_k=top_k, top_p=top_p, noise=noise)
    assert (got == expected.numpy()).mean() > 0.99  # cumulative sums round differently


def test_a_draw_without_noise_is_the_lowest_of_the_largest():
    logits = np.float32([[1, 5, 3, 5]])
    assert sample(logits, top_k=4, top_p=1.0, noise=np.zeros_like(logits)).tolist() == [1]


def test_noise_decides_among_what_the_filters_keep():
    logits = np.float32([[1, 5, 4, 3]])
    noise = np.float32([[99, 0, 2, 9]])
    assert sample(logits, top_k=2, top_p=1.0, noise=noise).tolist() == [2]
    assert sample(logits, top_k=3, top_p=1.0, noise=noise).tolist() == [3]
    assert sample(logits, top_k=4, top_p=0.5, noise=noise).tolist() == [1]


def test_what_ties_with_the_last_of_top_p_is_kept():
    kept = filtered_probabilities(np.float32([[2, 3, 2, 2, 0]]), top_k=0, top_p=0.6) > 0
    assert kept.tolist() == [[True, True, True, True, False]]


def test_guidance_is_the_official_one():
    logits = np.float32([[1, 2], [0, 4], [3, 3], [1, 1]])
    assert guide(logits, 3.0).tolist() == [[3, -2], [7, 7]] and guide(logits, 1.0).tolist() == [
        [1, 2],
        [3, 3],
    ]


def test_repetition_is_penalised_once_per_id():
    logits = np.float32([2.1, -1, 0.5, 0])
    penalise_repetition(logits, np.array([0, 1, 1, 0, 3]), 1.05)
    np.testing.assert_allclose(logits, np.float32([2.0, -1.05, 0.5, 0]))


def test_repetition_penalty_is_that_of_transformers():
    from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

    rng = np.random.default_rng(0)
    logits, seen = rng.standard_normal(50).astype(np.float32), rng.integers(0, 50, 30)
    expected = RepetitionPenaltyLogitsProcessor(1.05)(torch.tensor(seen)[None], torch.tensor(logits)[None])[
        0
    ].numpy()
    penalise_repetition(logits, seen, 1.05)
    np.testing.assert_array_equal(logits, expected)


@pytest.mark.parametrize(
    "change, name",
    [
        ({"top_k": 0}, "top_k"),
        ({"top_k": 1001}, "top_k"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"guidance": float("nan")}, "cfg"),
        ({"guidance": float("inf")}, "cfg"),
    ],
)
def test_settings_out_of_range_are_refused(change, name):
    good = {"guidance": 1.1, "top_k": 1000, "top_p": 0.8}
    check_sampling(**good, top_k_limit=1000)
    with pytest.raises(UsageError, match=f"{name}: expected"):
        check_sampling(**good | change, top_k_limit=1000)
