"""GPTQ: codes of one weight that keep its products, not its numbers, near to what they were.

Rounding changes a product x W^T by x E^T, whose mean square over the inputs is tr(E H E^T) with their second
moments H = X^T X / n. The columns of W are rounded one after the other, those of the strongest inputs first,
and each error is taken back by the columns that are not rounded yet, as far as the inputs correlate.

Source: Frantar et al., GPTQ, 2023 (arXiv 2210.17323), with the order of columns of its later code. Scales are
chosen before, for every block by itself, so their layout does not depend on that order. They keep small what
remains after the errors were taken back; what the inputs' own strength weighs would lose more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..graph.formats import TRIED, Encoded, Format, codes_from_numbers

COLUMNS = 128  # that are rounded before their errors go to all others
TOGETHER = 2048  # rows that are rounded at once
PIECE = 1 << 18  # numbers whose scales are searched at once
SAMPLED = 256  # rows that an error is measured on
DAMPING = 0.01  # of the mean of H's diagonal, which is added to it
# Shares of a block's largest magnitude that its largest code may stand for. Those that clip little are closer
# to each other: int8 needs those, and int4 the others.
RATIOS = 1 - torch.linspace(0, 1, 16) ** 1.5 / 2


class SingularError(ValueError):
    """The second moments have no inverse, even damped: the inputs are zero, or not finite."""


@dataclass(frozen=True)
class Feedback:
    """How the columns of weights [rows, K] take back each other's errors, for inputs that they share.

    `order` int64 [K] is that in which the columns are rounded. In it, `shares` [K, K], strictly upper
    triangular, says how much each column takes over of the errors of those before it. What remains of an
    error e[k] is the mean square `power`[k] e[k]^2 of the products.
    """

    order: Tensor
    shares: Tensor
    power: Tensor

    def scaled(self, factors: Tensor) -> Feedback:
        """The same for weights whose columns are multiplied by `factors` [K], and their inputs divided."""
        in_order = factors[self.order]
        return Feedback(self.order, self.shares * in_order / in_order[:, None], self.power / factors.square())

    def solved(self, cross: Tensor) -> Tensor:
        """cross [rows, K] times the inverse of the damped moments, from the right."""
        power = self.power[self.order]
        solved = torch.linalg.solve_triangular(  # shares have zeros where the factor has ones
            self.shares, cross[:, self.order].T, upper=True, unitriangular=True
        ).T.div_(power)
        solved = torch.linalg.solve_triangular(
            self.shares, solved, upper=True, unitriangular=True, left=False
        )
        return solved[:, self.order.argsort()]


def feedback_of(moments: Tensor) -> Feedback:
    """The feedback of inputs with the second moments H = `moments` [K, K]. Raises SingularError.

    Damped and in order, H is (U + 1) D (U + 1)^T with the shares U and a diagonal D, the power. That gives
    the codes of GPTQ without the inverse that it is written with (Chee et al., QuIP, 2023, theorem 6).
    """
    order = moments.diagonal().argsort(descending=True, stable=True)
    reverse = order.flip(0)
    damped = moments[reverse][:, reverse]  # a Cholesky factor of it is one of the moments, in reverse
    diagonal = damped.diagonal()
    diagonal += DAMPING * diagonal.mean()
    diagonal[diagonal == 0] = 1  # all inputs are zero, and so is every error
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed or not torch.isfinite(factor.diagonal()).all():
        raise SingularError(f"expected positive definite moments, got {tuple(moments.shape)} that are not")
    del damped, diagonal
    factor = factor.flip(0, 1)
    root = factor.diagonal().clone()
    return Feedback(order, factor.div_(root).triu_(1), root.square()[order.argsort()])


def quantised(weight: Tensor, feedback: Feedback, format: Format, dtype: torch.dtype) -> Encoded:
    """Quantise `weight` [rows, K] for inputs of that feedback; scales that have no type are in `dtype`.

    Where a row has one scale, searched ones hardly differ from the largest, and which of both leaves less of
    a row's errors is chance: both are tried.
    """
    weight = weight.float()
    scales, whole = best_scales(weight, feedback.power, format, dtype)
    pieces = zip(weight.split(TOGETHER), scales.split(TOGETHER), strict=True)
    found = [_encoded(rows, given, whole, feedback, format) for rows, given in pieces]
    codes, scales = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Encoded(codes, scales, format.code, None if whole is None else whole.to(dtype))


def _encoded(
    weight: Tensor, scales: Tensor, whole: Tensor | None, feedback: Feedback, format: Format
) -> tuple[Tensor, Tensor]:
    """Codes and scales of some rows, whose searched scales are given."""
    order = feedback.order
    numbers, lost = _rounded(weight[:, order], scales, whole, feedback, format)
    if not format.blocks:
        largest = (weight.abs().amax(1, keepdim=True) / format.top).to(scales.dtype)
        others, others_lost = _rounded(weight[:, order], largest, None, feedback, format)
        better = (others_lost < lost)[:, None]
        scales, numbers = torch.where(better, largest, scales), torch.where(better, others, numbers)
    return codes_from_numbers(numbers[:, order.argsort()], format.code), scales


def best_scales(
    weight: Tensor, power: Tensor, format: Format, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """The scale of each block that rounds it with the least error, whose squares are weighted by `power` [K].

    weight [rows, K] -> [rows, blocks] in `dtype`, and None; or in the format's own type, and the scale of
    them all. Clipping the largest numbers is allowed if it helps the others more.
    """
    block, whole = format.block(weight.shape[1]), format.whole(weight)
    assert block, f"{format.name}: no block divides {weight.shape[1]} features"
    kind, ratios = (dtype, RATIOS) if whole is None else (torch.float8_e4m3fn, torch.tensor(TRIED))
    unit = torch.ones(()) if whole is None else whole
    scales = []
    for rows in weight.split(max(1, PIECE // weight.shape[1])):
        grouped, weights = rows.unflatten(1, (-1, block)), power.unflatten(0, (-1, block))
        largest = grouped.abs().amax(-1) / unit
        found = (largest * ratios[0] / format.top).to(kind).float()  # also where every error overflows
        least = torch.full_like(largest, torch.inf)
        for ratio in ratios:
            tried = (largest * ratio / format.top).to(kind).float()
            step = torch.where(tried == 0, 1, tried * unit)[..., None]
            rounded = format.nearest_(grouped / step).mul_(step)
            error = (rounded.sub_(grouped).square_() * weights).sum(-1)
            found, least = torch.where(error < least, tried, found), torch.minimum(error, least)
        scales.append(found.to(kind))
    return torch.cat(scales), whole


def steps_of(scales: Tensor, whole: Tensor | None, features: int) -> Tensor:
    """What a code of 1 stands for: scales [rows, blocks] -> [rows, features], 1 where a scale is 0."""
    steps = scales.float() if whole is None else scales.float() * whole
    return torch.where(steps == 0, 1, steps).repeat_interleave(features // scales.shape[1], 1)


def error_of(weight: Tensor, stored: Tensor, moments: Tensor) -> float:
    """The mean square of the change of products, over that of the products: both weights are [rows, K].

    It is 0 where all products are zero. Of more than SAMPLED rows, as many are taken, evenly spaced.
    """
    every = -(-len(weight) // SAMPLED)
    weight, change = weight[::every], (weight - stored)[::every]
    products = float((weight @ moments * weight).sum())
    return float((change @ moments * change).sum()) / products if products else 0.0


def _rounded(
    weight: Tensor, scales: Tensor, whole: Tensor | None, feedback: Feedback, format: Format
) -> tuple[Tensor, Tensor]:
    """Numbers of the code's type in float32 [rows, K] for `weight` [rows, K] with its columns in order, and
    the mean square of the errors of each row's products [rows]."""
    shares, power = feedback.shares, feedback.power[feedback.order]
    all_steps = steps_of(scales, whole, weight.shape[1])[:, feedback.order]
    codes, errors = torch.empty_like(weight), torch.empty_like(weight)
    lost = torch.zeros(len(weight))
    for start in range(0, weight.shape[1], COLUMNS):
        stop = min(start + COLUMNS, weight.shape[1])
        exact = weight[:, start:stop]
        before = exact + errors[:, :start] @ shares[:start, start:stop]
        # Columns are read and written one at a time, so they lie in rows here.
        part, step, near = (
            before.T.contiguous(),
            all_steps[:, start:stop].T.contiguous(),
            exact.T.contiguous(),
        )
        for i in range(stop - start):
            code = format.nearest_(part[i] / step[i])
            near[i] -= code * step[i]
            lost += power[start + i] * (part[i] - code * step[i]).square()
            part[i + 1 :].addr_(shares[start + i, start + i + 1 : stop], near[i])
            part[i] = code
        codes[:, start:stop], errors[:, start:stop] = part.T, near.T
    return codes, lost
