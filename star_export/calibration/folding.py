"""AWQ: channels that carry strong inputs are scaled up before rounding, and their inputs down.

A weight's column times s and its input over s give the same product, but the column is rounded more finely.
The input is divided where it comes from: in the weight of the norm before it, or in the rows of the layer
before it. Every s is a power of two, so that nothing is rounded by folding it in, in any format.

Source: Lin et al., AWQ, 2023 (arXiv 2306.00978); powers of two are ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..graph.formats import Format
from .gptq import best_scales, steps_of

ALPHAS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.75, 1.0)  # how far the scales follow the power
ROWS = 512  # of each weight that are tried


def channel_exponents(weights: Sequence[Tensor], power: Tensor, format: Format, dtype: torch.dtype) -> Tensor:
    """The exponents e int64 [K] for which weights [rows, K] times 2^e, rounded, keep their products best.

    `power` [K] is that of the feedback of the inputs that the weights share: what their errors do once GPTQ
    has taken back what it can. Exponents are 0 if no scaling helps.
    """
    strength = power.clamp(min=1e-20).log2() / 2
    strength = strength - strength.mean()
    chosen = [weight[:: max(1, len(weight) // ROWS)].float() for weight in weights]
    best, least = torch.zeros_like(strength), float("inf")
    for alpha in ALPHAS:
        exponents = (alpha * strength).round().clamp(-8, 8)
        factors = exponents.exp2()
        error = sum(_error(weight * factors, power / factors.square(), format, dtype) for weight in chosen)
        if error < least:
            best, least = exponents, error
    return best.long()


def _error(weight: Tensor, power: Tensor, format: Format, dtype: torch.dtype) -> float:
    """What rounding to nearest leaves, with the scales that GPTQ would begin with."""
    scales, whole = best_scales(weight, power, format, dtype)
    steps = steps_of(scales, whole, weight.shape[1])
    stored = format.nearest_(weight / steps).mul_(steps)
    return float((stored.sub_(weight).square_() * power).sum())
