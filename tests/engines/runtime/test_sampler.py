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
    uniforms,
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


def test_ties_at_rank_k_stay_and_one_token_always_remains():
    logits = np.float32([[0, 3, 3, 3, 1]])
    assert (filtered_probabilities(logits, top_k=2, top_p=1.0) > 0).tolist() == [
        [False, True, True, True, False]
    ]
    assert (filtered_probabilities(logits, top_k=0, top_p=1e-9) > 0).tolist() == [
        [False, True, False, False, False]
    ]


@pytest.mark.parametrize("top_k, top_p", [(1, 1.0), (20, 0.9), (100, 1.0), (0, 0.5), (0, 1.0)])
def test_the_draw_is_the_references(top_k, top_p):
    rng = np.random.default_rng(0)
    logits = np.round(rng.standard_normal((400, 100)) * 2, 1).astype(np.float32)  # with ties
    uniform = rng.random(400, dtype=np.float32)
    expected = tasks.sample(
        torch.tensor(logits), top_k=top_k, top_p=top_p, uniform=torch.tensor(uniform)
    ).numpy()
    assert (
        sample(logits, top_k=top_k, top_p=top_p, uniform=uniform) == expected
    ).mean() > 0.99  # sums round differently


def test_the_draw_follows_the_probabilities():
    logits = np.log(np.float32([[0.5, 0.3, 0.2]])).repeat(20_000, 0)
    uniform = uniforms(seed=1, tokens=1, num_images=20_000)[0]
    shares = np.bincount(sample(logits, top_k=0, top_p=1.0, uniform=uniform), minlength=3) / 20_000
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.2], atol=0.01)


def test_the_ends_of_the_draw():
    logits = np.float32([[1, 5, 3]])
    assert sample(logits, top_k=3, top_p=1.0, uniform=np.float32([0])).tolist() == [1]  # greedy: uniform 0
    assert sample(logits, top_k=3, top_p=1.0, uniform=np.float32([np.nextafter(1, 0)])).tolist() == [0]
    assert sample(np.float32([[5, 5, 5]]), top_k=1, top_p=1.0, uniform=np.float32([0])).tolist() == [0]


def test_uniforms_are_a_function_of_the_seed():
    first = uniforms(seed=100, tokens=16, num_images=2)
    assert first.shape == (16, 2) and first.dtype == np.float32 and first.min() >= 0 and first.max() < 1
    np.testing.assert_array_equal(first, uniforms(seed=100, tokens=16, num_images=2))
    assert (first != uniforms(seed=101, tokens=16, num_images=2)).any()
    np.testing.assert_array_equal(first[:8], uniforms(seed=100, tokens=8, num_images=2))
    np.testing.assert_allclose(
        uniforms(seed=100, tokens=1, num_images=3)[0], [0.62765962, 0.87402433, 0.50604415], rtol=1e-6
    )  # for ever


@pytest.mark.parametrize("seed", [-1, 2**128])
def test_seeds_out_of_range_are_refused(seed):
    with pytest.raises(UsageError, match="seed"):
        uniforms(seed=seed, tokens=1, num_images=1)


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
