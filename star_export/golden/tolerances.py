"""How far an output may be from its golden tensor, by what the executor computes in.

In float32 (a fp32 bundle, or the fp32 twin of any other) the component table's tolerances hold: rounding level. An executor that computes
in 16 bits differs from the float32 reference by its own rounding, and how much that is depends on the weights. So the reference is run
in that type too when a bundle is exported; how far it is then from itself in float32 is recorded with each case as its noise, and an
executor may be MARGIN times as far. It rounds in other places (after fewer or more operations), not by other amounts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from engines.errors import InputError

from ..components import COMPONENTS
from .cases import Case

MARGIN = 3.0


def compute_type(precision: str, *, twin: bool) -> str:
    """`fp32`, `fp16` or `bf16`: what a bundle of `precision` is computed in, by its own graphs or by their fp32 `twin`."""
    return "fp32" if twin or precision == "fp32" else "fp16" if precision == "fp16" else "bf16"


def tolerances_of(component: str, compute: str, noise: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Limit per output of `component` when it computes in `compute`; caches share the key `present`. `noise` of the case, or of all
    (`largest_noise`). What is 0 in the table is exact in every type, but the ids that an encoder finds. Raises InputError where 16 bits
    are to be judged and no noise was recorded."""
    table = COMPONENTS[component].tolerances
    if compute == "fp32":
        return table
    measured = {name for name, tolerance in table.items() if tolerance > 0}
    if missing := sorted(measured - noise.keys()):
        raise InputError(
            "The golden set cannot prove anything in 16 bits",
            fix="export the bundle again",
            where=f"{component}: expected the reference's own noise in {compute} of {', '.join(missing)}, got none",
        )
    found = table | {name: MARGIN * float(noise[name]) for name in measured}
    return found | COMPONENTS[component].tolerances_16bit


def largest_noise(cases: Iterable[Case]) -> dict[str, np.ndarray]:
    """The noise of each output in the case where it is largest."""
    largest: dict[str, np.ndarray] = {}
    for case in cases:
        for name, value in case.noise.items():
            largest[name] = max(value, largest.get(name, value))
    return largest
