"""What `onnxruntime` does to activations before it multiplies them by int8 or int4 weights, on the reference.

It rounds them to int8 in blocks along the input features, each block by its own largest magnitude, and adds
the products in int32. Export runs the reference so, and records its distance from itself in float32 as the
noise of int8 arithmetic.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from engines.sessions.onnxruntime import ACTIVATION_BLOCK

from ..graph.precisions import Precision


@contextlib.contextmanager
def int8_activations(module: nn.Module, prefix: str, precision: Precision) -> Iterator[None]:
    """Within it, round the inputs of those linear layers of `module` that `precision` quantises.

    `prefix` is the module's name in `reference.model.Star`.
    """
    handles = []
    for name, linear in module.named_modules(prefix=prefix):
        if isinstance(linear, nn.Linear):
            shape = tuple(linear.weight.shape)
            if found := precision.format_of(f"{name}.weight", shape):
                size = min(found.block(shape[1]) or shape[1], ACTIVATION_BLOCK)
                hook = lambda _, given, size=size: (rounded_to_int8(given[0], size), *given[1:])  # noqa: E731
                handles.append(linear.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def rounded_to_int8(x: Tensor, block: int) -> Tensor:
    """Round x [..., K] in blocks to 127 steps of the block's largest magnitude; the last may be short."""
    padded = nn.functional.pad(x, (0, -x.shape[-1] % block)).unflatten(-1, (-1, block))
    scales = padded.abs().amax(-1, keepdim=True) / 127
    rounded = torch.where(scales > 0, (padded / scales).round() * scales, 0.0)
    return rounded.flatten(-2)[..., : x.shape[-1]]
