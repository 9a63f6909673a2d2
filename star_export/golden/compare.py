"""The gate: does `candidate` equal `reference`, tensor by tensor, within tolerances?

It knows nothing of models, files or sessions. It is written positively (`passed = value <= tolerance`), so
NaN fails; shapes and types must be equal, so nothing broadcasts; metrics are computed in float64. It refuses
a reference that cannot prove anything (empty, constant or all zero) instead of passing it. The gate is itself
tested with planted faults (tests/star_export/golden/test_compare.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from engines.errors import InputError, ParityError

FEW_IDS = 3


class VacuousError(InputError):
    """The reference cannot prove anything."""


@dataclass(frozen=True)
class Comparison:
    """The result for one tensor.

    `tolerance` bounds `value`: the largest absolute difference in units of the reference's standard
    deviation, or for integers the share of elements that differ. If the two cannot be compared, `fault` says
    why and `value` is NaN. `place` is where in a check the tensor occurs: a step, or a set of slots.

    `max_abs` is in the tensor's own unit, `rel_rms` = rms(difference) / rms(reference), and `psnr_db` is
    relative to the reference's largest magnitude. These three and `cosine` are reported, not bounded (NaN for
    integers).
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
    """Compare all tensors of both sides, in the reference's order.

    `tolerances` are by tensor name; the family `present.0.key`, `present.0.value`, ... shares the tolerance
    of `present`. Raises VacuousError for an empty or constant reference, because agreement with it proves
    nothing.
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
    """Raise ParityError for the failing result that exceeds its tolerance by the largest factor.

    `where` names the component and case.
    """
    failing = [r for r in results if not r.passed]
    if not failing:
        return
    worst = max(failing, key=excess)
    more = f" ({len(failing) - 1} more of {len(results)} tensors failed)" if len(failing) > 1 else ""
    raise ParityError(
        "The outputs differ from the reference",
        where=f"{where}: {verdict(worst)}{more}",
        fix="do not use this graph or plan; compare it with another precision or backend",
    )


def excess(result: Comparison) -> float:
    """The ratio of a result to its tolerance; infinite if nothing could be compared."""
    if result.fault or not math.isfinite(result.value):
        return math.inf
    if result.tolerance > 0:
        return result.value / result.tolerance
    return math.inf if result.value > 0 else 0.0


def verdict(result: Comparison) -> str:
    """Format one result as `place: tensor: expected ..., got ...`."""
    return f"{result.place}: {result.tensor}: ".removeprefix(": ") + (
        result.fault or f"expected at most {result.tolerance:.3g}, got {result.value:.3g}"
    )


def check_not_vacuous(name: str, reference: np.ndarray, *, where: str = "reference") -> None:
    """Raise VacuousError if `reference` is empty, all zero or constant.

    Up to `FEW_IDS` equal ids other than 0 do not count as constant: a large model's recorded runs have no
    more (`feeds.py`), and a model may well begin an image with one id.
    """
    if reference.size == 0:
        got = "no element"
    elif not reference.any():
        got = "only zeros"
    elif reference.min() == reference.max() and (_is_float(reference) or reference.size > FEW_IDS):
        got = f"only {reference.flat[0]}"
    else:
        return
    raise VacuousError(
        "The reference cannot prove anything",
        where=f"{where}: {name}: expected varied values, got {got}",
        fix="record the reference again, with inputs that give varied outputs",
    )


def _compare_one(
    name: str, candidate: np.ndarray | None, reference: np.ndarray, *, tolerance: float
) -> Comparison:
    if candidate is None:
        return Comparison(name, math.nan, tolerance, f"expected {_kind(reference)}, got nothing")
    if fault := _fault(candidate, reference):
        return Comparison(name, math.nan, tolerance, fault)
    check_not_vacuous(name, reference)
    if not _is_float(reference):
        return Comparison(name, float(np.mean(candidate != reference)), tolerance)
    got, wanted = candidate.astype(np.float64), reference.astype(np.float64)
    difference = got - wanted
    max_abs, rms, scale = np.abs(difference).max(), _rms(difference), _rms(wanted)
    norms = _rms(got) * scale
    return Comparison(
        name,
        float(max_abs / wanted.std()),
        tolerance,
        max_abs=float(max_abs),
        rel_rms=float(rms / scale),
        cosine=float(np.mean(got * wanted) / norms) if norms > 0 else math.nan,
        psnr_db=float(20 * np.log10(np.abs(wanted).max() / rms)) if rms > 0 else math.inf,
    )


def _fault(candidate: np.ndarray, reference: np.ndarray) -> str:
    """Why the two cannot be compared, or "". NaN and infinity are faults, even where both sides have them."""
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
