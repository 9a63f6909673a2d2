"""The draw of a token, in numpy: what `image_head` computes in its graph, and what text answers need.

The filters and the draw are the readable definition of `image_head` (STAR.md 3.4; official `top_k_top_p_filtering`); the random
numbers and the repetition penalty are used at run time.
"""

from __future__ import annotations

import math

import numpy as np

from ..errors import UsageError


def uniforms(*, seed: int, tokens: int, num_images: int) -> np.ndarray:
    """The uniform numbers of `num_images` images: float32 [tokens, num_images] in [0, 1), a function of the seed alone.

    Counter-based (Philox), so any machine draws the same. Raises UsageError for a seed that is negative or has more than 128 bits.
    """
    if not 0 <= seed < 2**128:
        raise UsageError(
            "This seed cannot be used",
            where=f"seed: expected 0 <= seed < 2^128, got {seed}",
            fix="give another number",
        )
    return np.random.Generator(np.random.Philox(key=seed)).random((tokens, num_images), dtype=np.float32)


def check_sampling(*, guidance: float, top_k: int, top_p: float, top_k_limit: int) -> None:
    """Refuse settings that `image_head` does not define. Raises UsageError naming the first."""
    for name, value, passed, expected in (
        ("cfg", guidance, math.isfinite(guidance), "a finite number"),
        ("top_k", top_k, 1 <= top_k <= top_k_limit, f"1 to {top_k_limit}"),
        ("top_p", top_p, 0 < top_p <= 1, "more than 0, at most 1"),
    ):
        if not passed:
            raise UsageError(
                f"{name} is out of range",
                where=f"{name}: expected {expected}, got {value}",
                fix="leave it out to use the default",
            )


def guide(logits: np.ndarray, guidance: float) -> np.ndarray:
    """Classifier-free guidance u + w (c - u): logits [2N, V] in rows c, u, c, u, ... -> [N, V]."""
    cond, uncond = logits[0::2], logits[1::2]
    return uncond + np.float32(guidance) * (cond - uncond)


def filtered_probabilities(logits: np.ndarray, *, top_k: int, top_p: float) -> np.ndarray:
    """Softmax after top-k (0 is off; ties at rank k stay) and top-p (the first token above it stays): [N, V] -> [N, V] float32."""
    ranked, order = _ranked(logits, top_k=top_k, top_p=top_p)
    probabilities = np.zeros_like(ranked)
    np.put_along_axis(probabilities, order, ranked, axis=-1)
    return probabilities


def sample(logits: np.ndarray, *, top_k: int, top_p: float, uniform: np.ndarray) -> np.ndarray:
    """Inverse-CDF draw, most probable first (ties by lower id): logits [N, V], uniform [N] in [0, 1) -> ids [N] int64.

    The drawn rank is the number of cumulative sums not above uniform times their total, at most the last one kept.
    """
    ranked, order = _ranked(logits, top_k=top_k, top_p=top_p)
    sums = ranked.cumsum(-1)
    rank = np.minimum((sums <= uniform[:, None] * sums[:, -1:]).sum(-1), (ranked > 0).sum(-1) - 1)
    return np.take_along_axis(order, rank[:, None], axis=-1)[:, 0]


def penalise_repetition(logits: np.ndarray, seen: np.ndarray, penalty: float) -> None:
    """Weaken the ids in `seen` [any] in place: logits [V] are divided by `penalty` where positive, multiplied where negative.

    Source: transformers 4.51.0 `RepetitionPenaltyLogitsProcessor`; `seen` holds prompt and answer.
    """
    values = logits[seen]  # an id that stands twice in `seen` is weakened once
    logits[seen] = np.where(values < 0, values * np.float32(penalty), values / np.float32(penalty))


def _ranked(logits: np.ndarray, *, top_k: int, top_p: float) -> tuple[np.ndarray, np.ndarray]:
    """(kept probabilities in descending order, 0 where filtered; ids in that order), both [N, V]."""
    order = np.argsort(-logits, axis=-1, kind="stable")
    values = np.take_along_axis(logits, order, axis=-1).astype(np.float32)
    if top_k > 0:
        values = np.where(
            values >= values[:, min(top_k, values.shape[-1]) - 1, None], values, np.float32(-np.inf)
        )
    if top_p < 1:
        sums = _softmax(values).cumsum(-1)
        before = np.concatenate([np.zeros_like(sums[:, :1]), sums[:, :-1]], axis=-1)
        values = np.where(before <= np.float32(top_p), values, np.float32(-np.inf))
    return _softmax(values), order


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)
