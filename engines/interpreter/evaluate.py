"""Evaluate a parsed network in numpy, layer by layer, as TensorRT's documentation defines each layer.

Every layer's result is rounded to the type that the network gives it, so a bf16 network computes in bf16.
With `wide`, everything stays float32, which separates what the network means from what its types cost. The
type and the fixed sizes that TensorRT declares for a result are checked. A tensor is freed after its last
use, and a KV cache is updated in place. What depends on no input is computed once and kept, the smallest
first, as far as the room for it goes; the rest, such as the dequantised weights of a large decoder, is
computed in every run where it is read, and freed again.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import InputError
from . import attention, elementwise, indexing, layout, quantize, reductions
from .numbers import REALS, held_dtype, rounded, unpacked
from .parsed import Layer, Parsed, Tensor

READERS = (
    elementwise.READERS
    | quantize.READERS
    | layout.READERS
    | reductions.READERS
    | indexing.READERS
    | attention.READERS
)
EXACT = {  # layers whose results need no rounding
    "CONSTANT",
    "SELECT",
    "TOPK",
    "KV_CACHE_UPDATE",
    "ATTENTION_OUTPUT",
    "QUANTIZE",
    "DYNAMIC_QUANTIZE",
    *(layout.READERS.keys() - {"FILL", "RESIZE"}),
    *indexing.READERS,
}
KEEP_BYTES = 1 << 30  # constants that all networks of the process keep between runs
_kept_bytes: weakref.WeakKeyDictionary[Network, int] = weakref.WeakKeyDictionary()
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class _Step:
    layer: Layer
    compute: Callable
    reads: tuple[str | None, ...]
    frees: tuple[str, ...]  # tensors that no later step reads


class Network:
    """A parsed network that runs, with its `inputs` and `outputs`.

    `wide` computes in float32 throughout instead of in the network's types. `ties` says which of equal
    elements TopK lists first: the one with the `first` or the `last` index. Raises InputError naming the
    first layer that cannot be interpreted.
    """

    def __init__(self, parsed: Parsed, *, wide: bool = False, ties: str = "first"):
        self.parsed, self.inputs, self.outputs, self.wide = parsed, parsed.inputs, parsed.outputs, wide
        needed = _needed(parsed.layers, {tensor.name for tensor in parsed.outputs})
        _check_caches(parsed, needed)
        fixed = _constant_names(needed)
        boundary = {
            t.name: math.prod(t.shape) * held_dtype(t.kind).itemsize
            for layer in needed
            if layer.outputs[0].name not in fixed
            for t in layer.inputs
            if t and t.name in fixed
        }
        boundary |= {t.name: 0 for t in parsed.outputs if t.name in fixed}
        keep = self._room_for(boundary)
        self._kept: dict[str, np.ndarray] | None = None
        compute = {id(layer): self._compute(layer, ties) for layer in needed}
        early = _needed([layer for layer in needed if layer.outputs[0].name in fixed], keep)
        inner = {t.name for layer in needed for t in layer.outputs} - fixed
        late = _needed(needed, inner | boundary.keys(), known=keep)
        ends = {t.name for t in (*parsed.outputs, *parsed.inputs)}
        self._early = _steps(early, compute, keep=keep)
        self._late = _steps(late, compute, keep=ends | keep)

    def _room_for(self, sizes: Mapping[str, int]) -> set[str]:
        """The constants of `sizes`, in bytes by name, that this network may keep: the smallest ones first."""
        room = left = KEEP_BYTES - sum(_kept_bytes.values())
        keep = set()
        for name, size in sorted(sizes.items(), key=lambda item: item[1]):
            if size <= left:
                keep.add(name)
                left -= size
        _kept_bytes[self] = room - left
        return keep

    def run(self, feeds: Arrays) -> dict[str, np.ndarray]:
        """Run once on `feeds`, all inputs by name, and return the outputs by name.

        Outputs of real numbers are float32; a cache keeps its memory, which must be writable, and its type.
        Raises InputError naming the layer whose values TensorRT does not define, or whose result does not
        have the declared shape.
        """
        with np.errstate(all="ignore"):
            if self._kept is None:
                self._kept = self._run(self._early, {})
            values = self._run(self._late, dict(self._kept) | dict(feeds))
        return {tensor.name: values[tensor.name] for tensor in self.outputs}

    def _run(self, steps: list[_Step], values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        for step in steps:
            arguments = [None if name is None else values[name] for name in step.reads]
            try:
                results = step.compute(*arguments)
            except (ValueError, IndexError, TypeError) as error:
                raise step.layer.refuse(str(error), "values that TensorRT defines") from error
            results = results if isinstance(results, tuple) else (results,)
            for tensor, result in zip(step.layer.outputs, results, strict=True):
                values[tensor.name] = self._checked(step.layer, tensor, result)
            for name in step.frees:
                del values[name]
        return values

    def _checked(self, layer: Layer, tensor: Tensor, result: np.ndarray) -> np.ndarray:
        """`result` rounded to the type of `tensor`, after a check of its shape and dtype."""
        fits = all(d in (-1, n) for d, n in zip(tensor.shape, result.shape))
        if result.ndim != len(tensor.shape) or not fits:
            expected = f"shape {tensor.shape} of {tensor.name}, as TensorRT inferred it"
            raise layer.refuse(f"shape {result.shape}", expected)
        if layer.kind == "KV_CACHE_UPDATE":
            return result
        held = held_dtype(tensor.kind)
        if result.dtype != held:
            both_real = np.issubdtype(result.dtype, np.floating) and tensor.kind in REALS
            if not both_real and layer.kind != "TOPK":
                raise layer.refuse(f"{result.dtype} values", f"{tensor.kind} for {tensor.name}")
            result = result.astype(held)
        if self.wide or tensor.kind not in REALS or layer.kind in EXACT:
            return result
        return rounded(result, tensor.kind)

    def _compute(self, layer: Layer, ties: str) -> Callable:
        if layer.kind == "CONSTANT":
            return functools.partial(_constant, layer)
        if layer.kind == "TOPK":
            return _widened(reductions.top_k(layer, ties))
        compute = READERS[layer.kind](layer)
        return compute if layer.kind == "KV_CACHE_UPDATE" else _widened(compute)


def _widened(compute: Callable) -> Callable:
    """Let `compute` see float16 caches as float32, like every other array of real numbers."""

    def widened(*arguments):
        return compute(
            *(a.astype(np.float32) if a is not None and a.dtype == np.float16 else a for a in arguments)
        )

    return widened


def _constant(layer: Layer) -> np.ndarray:
    """IConstantLayer: the weights, in the layer's shape."""
    weights = layer["weights"]
    return unpacked(weights.data, weights.kind, weights.count).reshape(layer["shape"])


def _needed(layers: Sequence[Layer], wanted: Iterable[str], known: Iterable[str] = ()) -> list[Layer]:
    """The layers that the tensors `wanted` depend on, in order, where those of `known` are there already."""
    known = set(known)
    missing = set(wanted) - known
    needed: list[Layer] = []
    for layer in reversed(layers):
        if any(tensor.name in missing for tensor in layer.outputs):
            needed.append(layer)
            missing |= {tensor.name for tensor in layer.inputs if tensor is not None} - known
    return needed[::-1]


def _constant_names(layers: Iterable[Layer]) -> set[str]:
    """The names of the tensors that depend on no input."""
    names: set[str] = set()
    for layer in layers:
        if all(tensor is None or tensor.name in names for tensor in layer.inputs):
            names |= {tensor.name for tensor in layer.outputs}
    return names


def _check_caches(parsed: Parsed, layers: list[Layer]) -> None:
    """Check that only its update reads a cache's values, because the update overwrites them. Raises
    InputError.
    """
    caches = {layer.input(0).name for layer in layers if layer.kind == "KV_CACHE_UPDATE"}
    if outside := caches - {tensor.name for tensor in parsed.inputs}:
        raise InputError(
            "TensorRT's network cannot be interpreted",
            fix="export again: every cache must be an input of the graph",
            where=f"cache {min(outside)}: expected an input of the network, got a tensor inside it",
        )
    for layer in layers:
        if layer.kind == "SHAPE":  # reads no values
            continue
        read = layer.inputs[1:] if layer.kind == "KV_CACHE_UPDATE" else layer.inputs
        if named := [tensor.name for tensor in read if tensor is not None and tensor.name in caches]:
            got = f"the cache {named[0]} read beside its update"
            raise layer.refuse(got, "a cache that only its update reads")


def _steps(layers: list[Layer], compute: Mapping[int, Callable], keep: Iterable[str]) -> list[_Step]:
    """The layers as steps, each with the tensors that it reads and those that no later step reads."""
    live, steps = set(keep), []
    for layer in reversed(layers):
        reads = tuple(None if tensor is None else tensor.name for tensor in layer.inputs)
        frees = {name for name in (*reads, *(t.name for t in layer.outputs)) if name is not None} - live
        live |= {name for name in reads if name is not None}
        steps.append(_Step(layer, compute[id(layer)], reads, tuple(sorted(frees))))
    return steps[::-1]
