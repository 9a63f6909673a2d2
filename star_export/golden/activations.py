"""Activations that are rounded before products with quantised weights, on the reference.

`onnxruntime` rounds them to int8 before it multiplies them by int8 or int4 weights, in blocks along the input
features, each block by its own largest magnitude, and adds the products in int32. Export runs the reference
so, and records its distance from itself in float32 as the noise of int8 arithmetic.

An nvfp4 graph rounds them to nvfp4 (`graph/nvfp4.py`), so the reference of such a bundle does so always.
Arithmetic that rounds elsewhere, even in float32, gives some activation the next number of E2M1. How far all
rounding moves the reference is recorded, and a part of that is the tolerance.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from engines.sessions.onnxruntime import ACTIVATION_BLOCK

from ..graph.formats import NVFP4, nearest_
from ..graph.nvfp4 import BLOCK, LEAST, TOP, WHOLE
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


def round_activations(star: nn.Module, precision: Precision) -> None:
    """From now on, round the inputs of those linear layers of `star` whose weights `precision` stores in
    nvfp4, except within `unrounded`."""

    def hook(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return None if getattr(module, "unrounded", False) else (rounded_to_nvfp4(given[0]), *given[1:])

    for name, linear in star.named_modules():
        if isinstance(linear, nn.Linear):
            found = precision.format_of(f"{name}.weight", tuple(linear.weight.shape))
            if found is not None and found.scale is not None:
                linear.register_forward_pre_hook(hook)


@contextlib.contextmanager
def unrounded(module: nn.Module) -> Iterator[None]:
    """Within it, the linear layers of `module` take their inputs as they are."""
    inner = list(module.modules())
    try:
        for one in inner:
            one.unrounded = True  # type: ignore[assignment]
        yield
    finally:
        for one in inner:
            del one.unrounded


def rounded_to_nvfp4(x: Tensor) -> Tensor:
    """Round rows x [..., K] to nvfp4, each divided by its largest magnitude, and multiply by it again."""
    largest = x.abs().amax(-1, keepdim=True).clamp_min(LEAST)
    blocks = (x / largest).float().unflatten(-1, (-1, BLOCK))
    scales = blocks.abs().amax(-1, keepdim=True) / TOP / WHOLE
    steps = scales.to(torch.float8_e4m3fn).float() * WHOLE
    numbers = (blocks / torch.where(steps > 0, steps, 1)).clamp(-TOP, TOP)
    return (nearest_(numbers, NVFP4.code) * steps).flatten(-2).to(x.dtype) * largest
