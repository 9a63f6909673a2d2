"""Sampling in numpy: the reference for `image_head`, and the repetition penalty of text answers.

The filters and the draw define what `image_head` computes in its graph (docs/star.md 3.4; official
`top_k_top_p_filtering`). The random numbers and the repetition penalty are used at run time.
"""

from __future__ import annotations

import math

import numpy as np

from ..errors import UsageError


def uniforms(*, seed: int, tokens: int, num_images: int) -> np.ndarray:
    """Uniform random numbers for `num_images` images: float32 [tokens, num_images] in [0, 1).

    They depend on the seed alone: the generator is counter-based (Philox), so every machine draws the same
    numbers. Raises UsageError for a seed that is negative or has more than 128 bits.
    """
    if not 0 <= seed < 2**128:
        raise UsageError(
            "The seed is out of range",
            where=f"seed: expected 0 <= seed < 2^128, got {seed}",
            fix="use another seed",
        )
    return np.random.Generator(np.random.Philox(key=seed)).random((tokens, num_images), dtype=np.float32)


def check_sampling(*, guidance: float, top_k: int, top_p: float, top_k_limit: int) -> None:
    """Raise UsageError for the first setting that is outside of the domain of `image_head`."""
    for name, value, passed, expected in (
        ("cfg", guidance, math.isfinite(guidance), "a finite number"),
        ("top_k", top_k, 1 <= top_k <= top_k_limit, f"1 to {top_k_limit}"),
        ("top_p", top_p, 0 < top_p <= 1, "more than 0, at most 1"),
    ):
        if not passed:
            raise UsageError(
                f"{name} is out of range",
                where=f"{name}: expected {expected}, got {value}",
                fix="omit it to use the default",
            )


def guide(logits: np.ndarray, guidance: float) -> np.ndarray:
    """Apply classifier-free guidance u + w (c - u): logits [2N, V] in rows c, u, c, u, ... -> [N, V]."""
    cond, uncond = logits[0::2], logits[1::2]
    return uncond + np.float32(guidance) * (cond - uncond)


def filtered_probabilities(logits: np.ndarray, *, top_k: int, top_p: float) -> np.ndarray:
    """Softmax after top-k and top-p filtering: logits [N, V] -> float32 [N, V].

    Ties at rank k are kept, and a `top_k` of 0 keeps all; top-p keeps the first token above it.
    """
    ranked, order = _ranked(logits, top_k=top_k, top_p=top_p)
    probabilities = np.zeros_like(ranked)
    np.put_along_axis(probabilities, order, ranked, axis=-1)
    return probabilities


def sample(logits: np.ndarray, *, top_k: int, top_p: float, uniform: np.ndarray) -> np.ndarray:
    """Draw by the inverse CDF over descending probabilities: logits [N, V], uniform [N] in [0, 1) -> ids
    int64 [N].

    Ties rank by lower id. The drawn rank is the number of cumulative sums that do not exceed uniform times
    their total, and at most the last kept rank.
    """
    ranked, order = _ranked(logits, top_k=top_k, top_p=top_p)
    sums = ranked.cumsum(-1)
    rank = np.minimum((sums <= uniform[:, None] * sums[:, -1:]).sum(-1), (ranked > 0).sum(-1) - 1)
    return np.take_along_axis(order, rank[:, None], axis=-1)[:, 0]


def penalise_repetition(logits: np.ndarray, seen: np.ndarray, penalty: float) -> None:
    """Divide positive logits [V] of the ids in `seen` by `penalty`, and multiply negative ones, in place.

    `seen` [any] holds the ids of prompt and answer. Source: transformers 4.51.0
    `RepetitionPenaltyLogitsProcessor`.
    """
    values = logits[seen]  # an id that occurs twice in `seen` is penalised once
    logits[seen] = np.where(values < 0, values * np.float32(penalty), values / np.float32(penalty))


def _ranked(logits: np.ndarray, *, top_k: int, top_p: float) -> tuple[np.ndarray, np.ndarray]:
    """(probabilities in descending order, 0 where filtered; ids in that order), both [N, V]."""
    order = np.argsort(-logits, axis=-1, kind="stable")
    values = np.take_along_axis(logits, order, axis=-1).astype(np.float32)
    if top_k > 0:
        lowest = values[:, min(top_k, values.shape[-1]) - 1, None]
        values = np.where(values >= lowest, values, np.float32(-np.inf))
    if top_p < 1:
        sums = _softmax(values).cumsum(-1)
        before = np.concatenate([np.zeros_like(sums[:, :1]), sums[:, :-1]], axis=-1)
        values = np.where(before <= np.float32(top_p), values, np.float32(-np.inf))
    return _softmax(values), order


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)
