"""How far a model's draws of image tokens are from another's: KL divergence and total variation per token.

Both models are given the same tokens (they are teacher-forced), and at each position their guided logits are
compared as they are drawn from: after top-k and top-p. The module works on plain arrays and knows nothing of
bundles or sessions, so any two sets of logits can be compared.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engines.errors import InputError
from engines.runtime.sampler import filtered


@dataclass(frozen=True)
class Divergence:
    """`kl` in nats and `total_variation` from 0 to 1, both float64 [...]: one number per position."""

    kl: np.ndarray
    total_variation: np.ndarray


@dataclass(frozen=True)
class Spread:
    """The mean, the 95th percentile and the largest of some numbers."""

    mean: float
    percentile_95: float
    largest: float

    @classmethod
    def of(cls, values: np.ndarray) -> Spread:
        """Summarise `values` [...], at least one."""
        return cls(float(values.mean()), float(np.percentile(values, 95)), float(values.max()))


def divergence(candidate: np.ndarray, first: np.ndarray, *, top_k: int, top_p: float) -> Divergence:
    """Compare guided, unfiltered logits [..., V] of two models at the same positions.

    Let K be the ids that the filters keep of `first`, and p its probabilities on K, which it draws from.

    * `kl` is KL(p || q), where q are the candidate's probabilities renormalised on the same K. The
      candidate's own filters do not enter: where they leave out an id of K, the divergence would be infinite,
      however small the change of a logit that moved the threshold. What the candidate draws outside of K is
      not seen.
    * `total_variation` is half the sum of |p - r|, where r is what the candidate draws from: its own
      probabilities after its own filters. It sees ids that either model leaves out. A Gumbel-max draw with
      the same noise gives both models the same id with a probability of at least (1 - TV) / (1 + TV)
      (Moulton and Jiang 2018, "Maximally consistent sampling and the Jaccard index of probability
      distributions": the exact probability is never below the Jaccard index).

    With a `top_k` of 0 and a `top_p` of 1 nothing is left out, and `kl` is that of the whole distributions.
    Computed in float64, but for the thresholds of the filters, which are the sampler's. Raises InputError for
    arrays of different or empty shapes, and for logits that are not finite.
    """
    _check(candidate, first)
    kept = filtered(first, top_k=top_k, top_p=top_p) > -np.inf
    kept_by_candidate = filtered(candidate, top_k=top_k, top_p=top_p) > -np.inf
    log_p, log_q = _log_probabilities(first, kept), _log_probabilities(candidate, kept)
    ratio = np.subtract(log_p, log_q, out=np.zeros_like(log_p), where=kept)
    p, r = np.exp(log_p), np.exp(_log_probabilities(candidate, kept_by_candidate))
    kl, total_variation = (p * ratio).sum(-1), np.abs(p - r).sum(-1) / 2
    return Divergence(np.maximum(kl, 0), np.minimum(total_variation, 1))  # rounding may leave -1e-17


def _log_probabilities(logits: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Logarithms of the softmax over the `kept` ids, -inf for the others: [..., V] -> float64 [..., V]."""
    shifted = np.where(kept, logits.astype(np.float64), -np.inf)
    shifted -= shifted.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _check(candidate: np.ndarray, first: np.ndarray) -> None:
    fix = "give the logits of both models for the same positions, as the image head returns them"
    if candidate.shape != first.shape or not first.size:
        raise InputError(
            "These logits cannot be compared",
            where=f"candidate: expected {list(first.shape)}, not empty, got {list(candidate.shape)}",
            fix=fix,
        )
    for side, logits in (("first", first), ("candidate", candidate)):
        if count := int((~np.isfinite(logits)).sum()):
            raise InputError(
                "These logits cannot be compared",
                where=f"{side}: expected finite numbers, got {count} NaN or Inf of {logits.size}",
                fix="find the component that gives them: star-export validate BUNDLE",
            )
