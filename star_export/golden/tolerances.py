"""How far an output may be from its golden tensor, given the type that the executor computes in.

In float32 (an fp32 bundle, or the fp32 twin of any other) the component table's tolerances hold: rounding
level. An executor that computes in 16 bits differs from the float32 reference by its own rounding, whose size
depends on the weights. So export also runs the reference in that type, and records its distance from itself
in float32 as the noise of each case; an executor may be MARGIN times as far away. It rounds at other places
(after fewer or more operations), but not by other amounts.

Backend `onnxruntime` multiplies int8 and int4 weights by activations in int8, and computes all else in
float32. Export records the noise of that in the same way (`activations`), with the same margin.

An nvfp4 graph rounds activations so coarsely that a difference at rounding level gives one of them the next
number now and then, and more after it. In float32, its decoders may be off by FP4_SHARE of what all of that
rounding changes: leaving it out, or another block, exceeds that. Ids may then differ as in 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from engines.bundle.manifest import component_of
from engines.errors import InputError
from engines.sessions import ON_CPU

from ..components import COMPONENTS
from .cases import Case

MARGIN = 3.0
FP4_SHARE = 0.5


def compute_type(precision: str, *, twin: bool) -> str:
    """The type that a bundle of `precision`, or its fp32 `twin`, computes in: `fp32`, `fp16` or `bf16`.

    That of an nvfp4 bundle's twin is `fp4`: float32, with activations rounded to nvfp4.
    """
    if twin and precision == "nvfp4":
        return "fp4"
    return "fp32" if twin or precision == "fp32" else "fp16" if precision == "fp16" else "bf16"


def compute_of(backend: str, precision: str) -> str:
    """The arithmetic of a bundle of `precision` on `backend`: a type, or `int8` for activations in int8."""
    if backend in ON_CPU:
        fast = backend == "onnxruntime" and precision in ("int8", "int4", "mixed")
        return "int8" if fast else compute_type(precision, twin=True)
    return compute_type(precision, twin=False)


def tolerances_of(component: str, compute: str, noise: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The tolerance of each output of `component`, or a part, when it computes in `compute`. Caches share
    `present`.

    `noise` is one case's, or the `largest_noise` of all. Outputs that only other parts of the component have
    are left out. Outputs whose tolerance in the table is 0 are exact in every type, except the ids that an
    encoder finds. Raises InputError for 16 bits without recorded noise.
    """
    row = COMPONENTS[component_of(component)]
    table = row.tolerances
    if noise and row.stack and row.stack.before:  # whose first and last parts have outputs of their own
        table = {name: tolerance for name, tolerance in table.items() if name in noise}
    found = bounded_in(table, compute, noise, where=component)
    return found if compute in ("fp32", "int8", "fp4") else found | row.tolerances_16bit


def bounded_in(
    table: dict[str, float], compute: str, noise: Mapping[str, np.ndarray], *, where: str
) -> dict[str, float]:
    """The tolerances of `table`, which hold in float32, in another arithmetic of that `noise`.

    None becomes smaller than in float32: what a coarser arithmetic leaves alone has no noise at all. Raises
    InputError for 16 bits without recorded noise.
    """
    if compute == "fp32" or (compute in ("int8", "fp4") and not noise):  # no such products
        return table
    measured = {name for name, tolerance in table.items() if tolerance > 0}
    if missing := sorted(measured - noise.keys()):
        raise InputError(
            f"The golden set cannot prove anything in {compute}",
            where=f"{where}: expected the reference's own noise in {compute} "
            f"of {', '.join(missing)}, got none",
            fix="export the bundle again",
        )
    share = FP4_SHARE if compute == "fp4" else MARGIN
    return table | {name: max(table[name], share * float(noise[name])) for name in measured}


def largest_noise(cases: Iterable[Case], compute: str) -> dict[str, np.ndarray]:
    """The largest noise in `compute` of each output over all cases."""
    largest: dict[str, np.ndarray] = {}
    for case in cases:
        for name, value in case.noise_in(compute).items():
            largest[name] = max(value, largest.get(name, value))
    return largest
