"""Every tensor inside the reference, by the names that a graph's values carry (`graph/modules.py`).

Arithmetic that rounds elsewhere, even in float32, now and then gives an activation in nvfp4 the next number
of E2M1 or a block the next scale, and all after it differs. So the reference takes the numbers of the
candidate that it is compared with where these are a rounding of its own activation too, and nearly all equal
to its own; from then on both compute with the same numbers again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from ..components import Part
from ..graph.formats import E2M1
from ..graph.modules import TAKES
from ..graph.nvfp4 import BLOCK
from ..graph.wrappers import FoldedStar
from .cases import Tensors
from .record import outputs_of

OTHERS = 0.01  # the share of a tensor's rounded numbers that may be others, or one block
SAME = 1e-3  # in units of a block's largest magnitude; numbers of E2M1 are a twelfth apart or more
# How far a number may be from its rounding, in units of a block's largest magnitude: half of the largest gap
# between numbers of E2M1, of a scale that was itself rounded up by a sixteenth; and of a row's largest, for
# blocks so small that their scale has few digits or none.
APART, APART_IN_ROW = 17 / 16 * (E2M1[-1] - E2M1[-2]) / 2 / E2M1[-1], 1e-5
FUNCTIONS = ("rotate", "attention")  # what a decoder's attention is given as functions, not as modules


def intermediate_tensors(
    part: Part, star: FoldedStar, feeds: Tensors, rounded: Mapping[str, np.ndarray] | None = None
) -> tuple[Tensors, Tensors]:
    """Run one graph's module of `star` on `feeds`: returns its outputs, and what every module of it returned
    and took, in float32 or the tensor's own type.

    `rounded` maps a name to what a candidate made of this tensor by rounding it to nvfp4.
    """
    found: Tensors = {}
    with _recording(star, found, rounded or {}):
        outputs = outputs_of(part, star, feeds)
    return outputs, found


@contextlib.contextmanager
def _recording(star: nn.Module, found: Tensors, rounded: Mapping[str, np.ndarray]) -> Iterator[None]:
    """Within it, whatever modules and functions of `star` return goes into `found`, and its linear layers
    read what is `rounded` where `_taken` says so."""

    def keep(name: str, tensors: list[Tensor], *, first: int = 0) -> None:
        for i, tensor in enumerate(tensors):
            array = tensor.detach().float() if tensor.is_floating_point() else tensor.detach()
            found[f"{name}:{first + i}"] = array.numpy().copy()
            if i == 0 and not first:
                found[name] = found[f"{name}:0"]

    def hooked(name: str, module: nn.Module) -> list:
        def before(_: nn.Module, given: tuple) -> None:
            keep(f"{name}{TAKES}", _tensors(given)[:1])

        def after(_: nn.Module, given: tuple, result: object) -> None:
            keep(name, _tensors(result))

        def read(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = found[f"{name}{TAKES}"]
            others = [
                array for key, array in rounded.items() if key in found and np.array_equal(found[key], x)
            ]
            return (_taken(given[0], torch.from_numpy(x), others), *given[1:])

        hooks = [
            module.register_forward_pre_hook(before, prepend=True),  # before it is rounded
            module.register_forward_hook(after),
        ]
        if rounded and isinstance(module, nn.Linear):
            hooks.append(module.register_forward_pre_hook(read))
        return hooks

    def wrapped(name: str, function: Callable) -> Callable:
        count = 0

        def call(*given: object) -> object:
            nonlocal count
            result = function(*given)
            tensors = _tensors(result)
            keep(name, tensors, first=count)
            count += len(tensors)
            return result

        return call

    handles, replaced = [], []
    for name, module in star.named_modules():
        handles += hooked(name, module) if name else []
        for key in FUNCTIONS:
            function = vars(module).get(key)
            if callable(function):
                replaced.append((module, key, function))
                setattr(module, key, wrapped(f"{name}.{key}", function))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, key, function in replaced:
            setattr(module, key, function)


def _taken(own: Tensor, x: Tensor, others: list[np.ndarray]) -> Tensor:
    """What a linear layer takes of activations x [..., K], which the reference rounded to `own`: those of
    `others` that are roundings of `x` as well, or else its own."""
    blocks = x.unflatten(-1, (-1, BLOCK)) if others else x
    largest = blocks.abs().amax(-1, keepdim=True)
    bound = 1.001 * APART * largest + APART_IN_ROW * largest.amax(-2, keepdim=True)
    for array in others:
        other = torch.from_numpy(array).reshape(own.shape)
        near = (other.unflatten(-1, (-1, BLOCK)) - blocks).abs() <= bound
        differing = (other - own).unflatten(-1, (-1, BLOCK)).abs() > SAME * largest
        if near.all() and differing.sum() <= max(BLOCK, OTHERS * differing.numel()):
            return other
    return own


def _tensors(value: object) -> list[Tensor]:
    """The tensors in nested tuples, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for item in value for t in _tensors(item)] if isinstance(value, tuple | list) else []
