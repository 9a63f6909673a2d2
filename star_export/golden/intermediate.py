"""Every tensor inside the reference, by the names that a graph's values carry (`graph/modules.py`)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ..components import Part
from ..graph.modules import TAKES
from ..graph.wrappers import FoldedStar
from .cases import Tensors
from .record import outputs_of

FUNCTIONS = ("rotate", "attention")  # what a decoder's attention is given as functions, not as modules


def intermediate_tensors(part: Part, star: FoldedStar, feeds: Tensors) -> tuple[Tensors, Tensors]:
    """Run one graph's module of `star` on `feeds`: returns its outputs, and what every module of it returned
    and took, in float32 or the tensor's own type."""
    found: Tensors = {}
    with _recording(star, found):
        outputs = outputs_of(part, star, feeds)
    return outputs, found


@contextlib.contextmanager
def _recording(star: nn.Module, found: Tensors) -> Iterator[None]:
    """Within it, whatever modules and functions of `star` return goes into `found`."""

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

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

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


def _tensors(value: object) -> list[Tensor]:
    """The tensors in nested tuples, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for item in value for t in _tensors(item)] if isinstance(value, tuple | list) else []
