"""GPTQ: codes of one weight that keep its products, not its numbers, near to what they were.

Rounding changes a product x W^T by x E^T, whose mean square over the inputs is tr(E H E^T) with their second
moments H = X^T X / n. The columns of W are rounded one after the other, those of the strongest inputs first,
and each error is taken back by the columns that are not rounded yet, as far as the inputs correlate.

Source: Frantar et al., GPTQ, 2023 (arXiv 2210.17323), with the order of columns of its later code. Scales are
chosen before, for every block by itself, so their layout does not depend on that order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..graph.formats import Encoded, Format

COLUMNS = 128  # that are rounded before their errors go to all others
SAMPLED = 256  # rows that an error is measured on
DAMPING = 0.01  # of the mean of H's diagonal, which is added to it
RATIOS = torch.linspace(1.0, 0.5, 13)  # of a block's largest magnitude that its largest code may stand for


class SingularError(ValueError):
    """The second moments have no inverse, even damped: the inputs are zero, or not finite."""


def quantised(weight: Tensor, moments: Tensor, format: Format, dtype: torch.dtype) -> Encoded:
    """Quantise `weight` [rows, K] for inputs of second moments `moments` [K, K], with scales in `dtype`.

    Raises SingularError.
    """
    weight = weight.float()
    scales = best_scales(weight, moments.diagonal(), format, dtype)
    block = weight.shape[1] // scales.shape[1]
    steps = torch.where(scales == 0, 1, scales.float()).repeat_interleave(block, 1)  # [rows, K]
    order = moments.diagonal().argsort(descending=True, stable=True)
    spread = _spread(moments[order][:, order])
    codes = _rounded(weight[:, order], steps[:, order], spread, format.top)
    return Encoded(codes[:, order.argsort()].to(torch.int8), scales)


def best_scales(weight: Tensor, power: Tensor, format: Format, dtype: torch.dtype) -> Tensor:
    """The scale of each block that rounds it with the least error, inputs weighted by their `power` [K].

    weight [rows, K] -> [rows, blocks] in `dtype`. Clipping the largest numbers is allowed if it helps the
    others more.
    """
    block = format.block(weight.shape[1])
    assert block, f"{format.name}: no block divides {weight.shape[1]} features"
    scales = []
    for rows in weight.split(max(1, (1 << 20) // weight.shape[1])):
        grouped, weights = rows.unflatten(1, (-1, block)), power.unflatten(0, (-1, block))
        largest = grouped.abs().amax(-1)
        found, least = largest.to(dtype), torch.full_like(largest, torch.inf)
        for ratio in RATIOS:
            tried = (largest * ratio / format.top).to(dtype)
            step = torch.where(tried == 0, 1, tried.float())[..., None]
            rounded = (grouped / step).round_().clamp_(-format.top, format.top).mul_(step)
            error = (rounded.sub_(grouped).square_() * weights).sum(-1)
            found, least = torch.where(error < least, tried, found), torch.minimum(error, least)
        scales.append(found)
    return torch.cat(scales)


def error_of(weight: Tensor, stored: Tensor, moments: Tensor) -> float:
    """The mean square of the change of products, over that of the products: both weights are [rows, K].

    It is 0 where all products are zero. Of more than SAMPLED rows, as many are taken, evenly spaced.
    """
    every = -(-len(weight) // SAMPLED)
    weight, change = weight[::every], (weight - stored)[::every]
    products = float((weight @ moments * weight).sum())
    return float((change @ moments * change).sum()) / products if products else 0.0


def _spread(moments: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped moments [K, K]."""
    damped = moments.clone()
    diagonal = damped.diagonal()
    diagonal += DAMPING * diagonal.mean()
    diagonal[diagonal == 0] = 1  # all inputs are zero, and so is every error
    # With the rows and columns in reverse, L L^T = H, and the inverse of L in reverse is the factor.
    factor, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if failed or not torch.isfinite(factor.diagonal()).all():
        raise SingularError(f"expected positive definite moments, got {tuple(moments.shape)} that are not")
    del damped
    identity = torch.eye(len(factor))
    return torch.linalg.solve_triangular(factor, identity, upper=False).flip(0, 1)


def _rounded(weight: Tensor, steps: Tensor, spread: Tensor, top: float) -> Tensor:
    """Codes in float32 [rows, K]; the columns are in the order in which they are rounded."""
    left, codes = weight.clone(), torch.empty_like(weight)
    for start in range(0, weight.shape[1], COLUMNS):
        stop = min(start + COLUMNS, weight.shape[1])
        # Columns are read and written one at a time, so they lie in rows here.
        part, step = left[:, start:stop].T.contiguous(), steps[:, start:stop].T.contiguous()
        near, errors = spread[start:stop, start:stop], torch.empty_like(part)
        for i in range(stop - start):
            code = (part[i] / step[i]).round_().clamp_(-top, top)
            errors[i] = (part[i] - code * step[i]) / near[i, i]
            part[i + 1 :].addr_(near[i, i + 1 :], errors[i], alpha=-1)
            codes[:, start + i] = code
        left[:, stop:].addmm_(errors.T, spread[start:stop, stop:], alpha=-1)
    return codes
