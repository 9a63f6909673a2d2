"""How far an output may be from its golden tensor, by what the executor computes in.

In float32 (a fp32 bundle, or the fp32 twin of any other) the component table's limits hold: rounding level. An executor that computes
in 16 bits differs from the float32 reference by its own rounding: the limits below are two to four times the largest difference of
the reference itself, run in that type on the miniature checkpoint. There, an id may flip where two candidates nearly tie.
"""
from __future__ import annotations

from .components import COMPONENTS

_BF16 = {"image_embeds": 0.12, "hidden_states": 0.1, "present": 0.1, "logits": 0.05, "image": 0.4}
_FP16_OVER_BF16 = 1 / 8  # three more bits of mantissa; measured: 1/7 to 1/12
FLIPPED_IDS = 0.25  # largest share of image ids of one picture or draw; measured: 0.0625 in bf16


def compute_type(precision: str, *, twin: bool) -> str:
    """`fp32`, `fp16` or `bf16`: what a bundle of `precision` is computed in, by its own graphs or by their fp32 `twin`."""
    return "fp32" if twin or precision == "fp32" else "fp16" if precision == "fp16" else "bf16"


def limits_of(component: str, compute: str) -> dict[str, float]:
    """Limit per output of `component` when it computes in `compute`; caches share the key `present`."""
    table = COMPONENTS[component].limits
    if compute == "fp32":
        return table
    factor = 1.0 if compute == "bf16" else _FP16_OVER_BF16
    wide = {name: limit * factor for name, limit in _BF16.items()} | {"image_ids": FLIPPED_IDS}
    return {name: wide.get(name, limit) for name, limit in table.items()}
