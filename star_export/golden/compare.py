"""The gate: is `candidate` what `reference` is, tensor by tensor, within tolerances.

Knows nothing of models, files or sessions. Written positively (`passed = value <= tolerance`), so NaN fails; shapes and types must be
equal, so nothing broadcasts; metrics are float64. A reference that cannot prove anything (empty, constant, all zero) is refused
instead of passed. The gate is itself tested with planted faults (tests/star_export/test_parity.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from engines.errors import InputError, ParityError


class VacuousError(InputError):
    """A reference that cannot prove anything."""


@dataclass(frozen=True)
class Comparison:
    """One tensor. `value` is what `tolerance` bounds: the largest absolute difference in units of the reference's standard deviation,
    or for integers the share of elements that differ. Where the two could not be compared, `fault` says why and `value` is NaN.
    `place` is where within a check the tensor was seen: a step, a set of slots.

    `max_abs` in the tensor's own unit, `rel_rms` = rms(difference) / rms(reference), `psnr_db` against the reference's largest
    magnitude; these three and `cosine` are reported, not bounded (NaN for integers).
    """

    tensor: str
    value: float
    tolerance: float
    fault: str = ""
    max_abs: float = math.nan
    rel_rms: float = math.nan
    cosine: float = math.nan
    psnr_db: float = math.nan
    place: str = ""

    @property
    def passed(self) -> bool:
        return not self.fault and self.value <= self.tolerance


def compare(
    candidate: Mapping[str, np.ndarray],
    reference: Mapping[str, np.ndarray],
    *,
    tolerances: Mapping[str, float],
) -> list[Comparison]:
    """One result per name of either side, in the reference's order.

    `tolerances` by tensor name; the tensors of a family `present.0.key`, `present.0.value`, ... share the tolerance of `present`. Raises
    VacuousError when a reference is empty or constant: agreement with it would prove nothing.
    """
    results = [
        _compare_one(name, candidate.get(name), array, tolerance=tolerance_of(name, tolerances))
        for name, array in reference.items()
    ]
    extra = [name for name in candidate if name not in reference]
    return results + [
        Comparison(name, math.nan, 0.0, f"expected no such tensor, got {_kind(candidate[name])}")
        for name in extra
    ]


def tolerance_of(name: str, tolerances: Mapping[str, float]) -> float:
    """The tolerance of tensor `name`: its own, or that of its family (the part before the first dot)."""
    return tolerances[name] if name in tolerances else tolerances[name.partition(".")[0]]


def check(results: list[Comparison], *, where: str) -> None:
    """Raise ParityError for the failing result that is furthest beyond its tolerance; `where` names the component and case."""
    failing = [r for r in results if not r.passed]
    if not failing:
        return
    worst = max(failing, key=excess)
    more = f" ({len(failing) - 1} more of {len(results)} tensors failed)" if len(failing) > 1 else ""
    raise ParityError(
        "What runs is not what the reference computes",
        where=f"{where}: {verdict(worst)}{more}",
        fix="compare with another precision or backend; a graph or plan that fails must not be used",
    )


def excess(result: Comparison) -> float:
    """How many times its tolerance a result is; infinite where nothing could be compared."""
    if result.fault or not math.isfinite(result.value):
        return math.inf
    return (
        result.value / result.tolerance if result.tolerance > 0 else (math.inf if result.value > 0 else 0.0)
    )


def verdict(result: Comparison) -> str:
    """`place: tensor: expected ..., got ...` of one result."""
    return f"{result.place}: {result.tensor}: ".removeprefix(": ") + (
        result.fault or f"expected at most {result.tolerance:.3g}, got {result.value:.3g}"
    )


def check_not_vacuous(name: str, reference: np.ndarray, *, where: str = "reference") -> None:
    """Raise VacuousError when `reference` is empty, all zero or constant (a single id other than 0 is no constant)."""
    if reference.size == 0:
        got = "no element"
    elif not reference.any():
        got = "only zeros"
    elif reference.min() == reference.max() and (_is_float(reference) or reference.size > 2):
        got = f"only {reference.flat[0]}"
    else:
        return
    raise VacuousError(
        "The reference cannot prove anything",
        where=f"{where}: {name}: expected values that differ, got {got}",
        fix="record the reference again, with inputs that give different outputs",
    )


def _compare_one(
    name: str, candidate: np.ndarray | None, reference: np.ndarray, *, tolerance: float
) -> Comparison:
    if fault := _fault(candidate, reference):
        return Comparison(name, math.nan, tolerance, fault)
    check_not_vacuous(name, reference)
    if not _is_float(reference):
        return Comparison(name, float(np.mean(candidate != reference)), tolerance)
    wanted = reference.astype(np.float64)
    difference = candidate.astype(np.float64) - wanted
    max_abs, rms, scale = np.abs(difference).max(), _rms(difference), _rms(wanted)
    norms = _rms(candidate.astype(np.float64)) * scale
    return Comparison(
        name,
        float(max_abs / wanted.std()),
        tolerance,
        max_abs=float(max_abs),
        rel_rms=float(rms / scale),
        cosine=float(np.mean(candidate.astype(np.float64) * wanted) / norms) if norms > 0 else math.nan,
        psnr_db=float(20 * np.log10(np.abs(wanted).max() / rms)) if rms > 0 else math.inf,
    )


def _fault(candidate: np.ndarray | None, reference: np.ndarray) -> str:
    """Why the two cannot be compared, or nothing. NaN and infinities are faults on either side, at the same place too."""
    if candidate is None:
        return f"expected {_kind(reference)}, got nothing"
    if candidate.shape != reference.shape or candidate.dtype != reference.dtype:
        return f"expected {_kind(reference)}, got {_kind(candidate)}"
    for side, array in (("the candidate", candidate), ("the reference", reference)):
        if count := array.size - int(np.isfinite(array).sum()):
            return f"expected finite numbers, got {count} NaN or Inf in {side}"
    return ""


def _is_float(array: np.ndarray) -> bool:
    return np.issubdtype(array.dtype, np.floating)


def _kind(array: np.ndarray) -> str:
    return f"{array.dtype}{list(array.shape)}"


def _rms(array: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(array))))
