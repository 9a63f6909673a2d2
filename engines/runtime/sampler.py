"""Sampling in numpy: the reference for `image_head`, and the repetition penalty of text answers.

The filters and the draw define what `image_head` computes in its graph (docs/star.md 3.4; official
`top_k_top_p_filtering`). The repetition penalty is used at run time.
"""

from __future__ import annotations

import numpy as np

from ..errors import UsageError
from ..ranges import is_whole

GUIDANCE_LIMIT = 1e3  # with logits of any model's size, sums stay far from the end of float32


def check_sampling(*, guidance: float, top_k: int, top_p: float, top_k_limit: int) -> None:
    """Raise UsageError for the first setting that is outside of the domain of `image_head`."""
    for name, value, passed, expected in (
        ("cfg", guidance, abs(guidance) <= GUIDANCE_LIMIT, f"at most {GUIDANCE_LIMIT:g}"),
        ("top_k", top_k, is_whole(top_k) and 1 <= top_k <= top_k_limit, f"1 to {top_k_limit}"),
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
    """Softmax after top-k and top-p filtering: logits [..., V] -> float32 [..., V]."""
    return _softmax(filtered(logits, top_k=top_k, top_p=top_p))


def filtered(logits: np.ndarray, *, top_k: int, top_p: float) -> np.ndarray:
    """Logits float32 [..., V] with -inf for those that the filters leave out.

    A `top_k` of 0 keeps all; top-p keeps the first one above it. Whatever ties with a kept one is kept, so
    nothing depends on the order of equal logits.
    """
    logits = logits.astype(np.float32, copy=False)
    ranked = -np.sort(-logits, axis=-1)
    if top_k > 0:
        ranked = np.where(ranked >= ranked[..., min(top_k, ranked.shape[-1]) - 1, None], ranked, -np.inf)
    if top_p < 1:
        sums = _softmax(ranked).cumsum(-1)
        before = np.concatenate([np.zeros_like(sums[..., :1]), sums[..., :-1]], axis=-1)
        ranked = np.where(before <= np.float32(top_p), ranked, -np.inf)
    lowest = np.where(ranked > -np.inf, ranked, np.inf).min(-1, keepdims=True)
    return np.where(logits >= lowest, logits, np.float32(-np.inf))


def sample(logits: np.ndarray, *, top_k: int, top_p: float, noise: np.ndarray) -> np.ndarray:
    """Draw from the filtered distribution: logits [..., V], noise float32 [..., V] (`gumbel.py`) -> ids int64
    [...].

    The id is the arg-max of log p + G over the kept ids, the lowest of equal ones. log p is the logit but for
    a constant, so the noise is added to the logits. Without noise, this is the arg-max.
    """
    return (filtered(logits, top_k=top_k, top_p=top_p) + noise).argmax(-1)


def penalise_repetition(logits: np.ndarray, seen: np.ndarray, penalty: float) -> None:
    """Divide positive logits [V] of the ids in `seen` by `penalty`, and multiply negative ones, in place.

    `seen` [any] holds the ids of prompt and answer. Source: transformers 4.51.0
    `RepetitionPenaltyLogitsProcessor`.
    """
    values = logits[seen]  # an id that occurs twice in `seen` is penalised once
    logits[seen] = np.where(values < 0, values * np.float32(penalty), values / np.float32(penalty))


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)
