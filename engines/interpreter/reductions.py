"""Layers that reduce, multiply, normalise or convolve, with sums in float32.

Quotations are from TensorRT's NvInfer.h (11.1).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np

from .numbers import REALS, unpacked
from .parsed import Compute, Layer, Reader


def axes_of(mask: int) -> tuple[int, ...]:
    """The axes of a bitmask: "the bit in position i of bitmask corresponds to explicit dimension i"."""
    return tuple(i for i in range(32) if mask >> i & 1)


def _average(x: np.ndarray, axis, keepdims: bool) -> np.ndarray:
    if not np.issubdtype(x.dtype, np.floating):
        raise ValueError("an average of integers, whose rounding TensorRT does not define")
    return x.mean(axis, keepdims=keepdims)


_REDUCTIONS: dict[str, Compute] = {
    "SUM": np.sum,
    "PROD": np.prod,
    "MAX": np.max,
    "MIN": np.min,
    "AVG": _average,
}


def reduce(layer: Layer) -> Compute:
    """IReduceLayer: a reduction over the axes of the bitmask."""
    if layer["op"] not in _REDUCTIONS:
        raise layer.refuse(f"operation {layer['op']}", f"one of {', '.join(_REDUCTIONS)}")
    function, axes, keep = _REDUCTIONS[layer["op"]], axes_of(layer["axes"]), layer["keep_dims"]
    return lambda x: np.asarray(function(x, axis=axes, keepdims=keep)).astype(x.dtype, copy=False)


def softmax(layer: Layer) -> Compute:
    """ISoftMaxLayer: softmax along the one axis of the bitmask."""
    (axis,) = axes_of(layer["axes"])
    return lambda x: softmax_of(x, axis)


def softmax_of(x: np.ndarray, axis: int = -1) -> np.ndarray:
    """Softmax along `axis`; NaN where all values are minus infinity."""
    with np.errstate(invalid="ignore"):
        powers = np.exp(x - x.max(axis, keepdims=True))
        return powers / powers.sum(axis, keepdims=True)


def cumulative(layer: Layer) -> Compute:
    """ICumulativeLayer: cumulative sums along the axis that input 1 gives.

    "Inclusive forward 0..j, reverse j..n-1, exclusive forward 0..j-1, reverse j+1..n-1".
    """
    if layer["op"] != "SUM":
        raise layer.refuse(f"operation {layer['op']}", "SUM")
    exclusive, reverse = layer["exclusive"], layer["reverse"]

    def compute(x, axis):
        axis = int(axis)
        x = np.flip(x, axis) if reverse else x
        sums = np.cumsum(x, axis, dtype=x.dtype)
        if exclusive:
            first, rest = np.split(np.roll(sums, 1, axis), [1], axis)
            sums = np.concatenate([np.zeros_like(first), rest], axis)
        return np.flip(sums, axis) if reverse else sums

    return compute


def top_k(layer: Layer, ties: str = "first") -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """ITopKLayer: the k largest or smallest elements; k comes from input 1 if there is one.

    "Output values are sorted, largest first for operation kMAX and smallest first for operation kMIN". The
    order of equal elements is not defined: `ties` puts the lower index first (`first`) or the higher one
    (`last`).
    """
    (axis,), static, largest = axes_of(layer["axes"]), layer["k"], layer["op"] == "MAX"

    def compute(x, k=None):
        k = static if k is None else int(np.reshape(k, -1)[0])
        if not 1 <= k <= x.shape[axis]:
            raise ValueError(f"the top {k} of {x.shape[axis]} elements")
        order = _order(x, axis, descending=largest, last=ties == "last")
        indices = np.take(order, np.arange(k), axis=axis)
        return np.take_along_axis(x, indices, axis), indices

    return compute


def _order(x: np.ndarray, axis: int, *, descending: bool, last: bool) -> np.ndarray:
    """The indices that sort `x`, with the lower index first among equals, or the higher one if `last`.

    Reversing a stable sort reverses its ties too.
    """
    if descending == last:
        order = np.argsort(x, axis, kind="stable")
    else:
        order = x.shape[axis] - 1 - np.argsort(np.flip(x, axis), axis, kind="stable")
    return np.flip(order, axis) if descending else order


def matrix_multiply(layer: Layer) -> Compute:
    """IMatrixMultiplyLayer: op(A) op(B).

    TRANSPOSE swaps the last two axes; a VECTOR lacks the second one. Other axes are broadcast.
    """
    operations = layer["op0"], layer["op1"]
    if any(layer.input(i).kind not in REALS for i in range(2)):
        raise layer.refuse(f"matrices of {layer.input(0).kind}")

    def compute(x, y):
        x, y = (m.swapaxes(-1, -2) if op == "TRANSPOSE" else m for m, op in zip((x, y), operations))
        x = x[..., None, :] if operations[0] == "VECTOR" else x
        y = y[..., None] if operations[1] == "VECTOR" else y
        if x.ndim != y.ndim:
            raise ValueError(f"ranks {x.ndim} and {y.ndim}")
        product = _product(x, y)
        product = product[..., 0] if operations[1] == "VECTOR" else product
        return product.squeeze(x.ndim - 2) if operations[0] == "VECTOR" else product

    return compute


def _product(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """x @ y, as one multiplication where one matrix y serves all of x."""
    if math.prod(y.shape[:-2]) == 1 and x.ndim > 2:
        return (x.reshape(-1, x.shape[-1]) @ y.reshape(y.shape[-2:])).reshape(*x.shape[:-1], y.shape[-1])
    return x @ y


def normalization(layer: Layer) -> Compute:
    """INormalizationLayer: "Y = (X - Mean(X, axes)) / Sqrt(Variance(X) + epsilon) * S + B".

    With groups, "the input tensor channels are divided into nbGroups groups, and normalization is performed
    per group"; S and B are [1,C,1,1], or [1,G,1,1] in the layer's older version.
    """
    axes, groups, epsilon = axes_of(layer["axes"]), layer["num_groups"], np.float32(layer["epsilon"])
    rank = len(layer.input(0).shape)
    if groups != 1 and axes != tuple(range(2, rank)):
        raise layer.refuse(f"axes {axes} with {groups} groups", f"axes {tuple(range(2, rank))}")

    def compute(x, scale, bias):
        if groups == 1:
            return _normalized(x, axes, epsilon) * scale + bias
        grouped = x.reshape(x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])
        if scale.shape[1] == groups and not layer["is_v2"]:
            scale, bias = (np.repeat(s, x.shape[1] // groups, axis=1) for s in (scale, bias))
        return _normalized(grouped, tuple(range(2, grouped.ndim)), epsilon).reshape(x.shape) * scale + bias

    return compute


def _normalized(x: np.ndarray, axes: tuple[int, ...], epsilon: np.float32) -> np.ndarray:
    centred = x - x.mean(axes, keepdims=True)
    return centred / np.sqrt(np.square(centred).mean(axes, keepdims=True) + epsilon)


def convolution(layer: Layer) -> Compute:
    """IConvolutionLayer: "a correlation operation".

    The kernel [K, C/groups, ...] and the bias [K] are the layer's own weights, or inputs 1 and 2.
    """
    stride, dilation, size = layer["stride_nd"], layer["dilation_nd"], layer["kernel_size_nd"]
    groups, maps, mode = layer["num_groups"], layer["num_output_maps"], layer["padding_mode"]
    if mode not in ("EXPLICIT_ROUND_DOWN", "SAME_UPPER", "SAME_LOWER"):
        raise layer.refuse(f"padding mode {mode}")
    own = layer["kernel"], layer["bias"]
    extent = [(n - 1) * d + 1 for n, d in zip(size, dilation)]

    def padding(lengths: tuple[int, ...]) -> list[tuple[int, int]]:
        if mode == "EXPLICIT_ROUND_DOWN":
            return list(zip(layer["pre_padding"], layer["post_padding"]))
        return [_same(n, e, s, lower=mode == "SAME_LOWER") for n, e, s in zip(lengths, extent, stride)]

    def compute(x, kernel=None, bias=None):
        kernel, bias = (  # the layer's own weights are widened for this call only
            unpacked(w.data, w.kind, w.count) if given is None and w.count else given
            for given, w in zip((kernel, bias), own)
        )
        x = np.pad(x, [(0, 0), (0, 0), *padding(x.shape[2:])])
        new = [(n - e) // s + 1 for n, e, s in zip(x.shape[2:], extent, stride)]
        result = np.zeros((len(x), groups, maps // groups, math.prod(new)), np.float32)
        taps = kernel.reshape(groups, maps // groups, -1, *size)
        for tap in itertools.product(*map(range, size)):  # one matrix product per element of the kernel
            window = tuple(
                slice(t * d, t * d + (n - 1) * s + 1, s) for t, d, n, s in zip(tap, dilation, new, stride)
            )
            result += taps[(..., *tap)] @ x[(..., *window)].reshape(len(x), groups, x.shape[1] // groups, -1)
        result = result.reshape(len(x), maps, *new)
        return result if bias is None else result + bias.reshape(-1, *[1] * len(new))

    return compute


def _same(length: int, extent: int, stride: int, *, lower: bool) -> tuple[int, int]:
    """The padding before and after: "P = floor((I - 1) / S) * S + F - I".

    The larger half comes after the data for SAME_UPPER, before it for SAME_LOWER.
    """
    whole = max((length - 1) // stride * stride + extent - length, 0)
    half = whole // 2
    return (whole - half, half) if lower else (half, whole - half)


READERS: dict[str, Reader] = {
    "REDUCE": reduce,
    "SOFTMAX": softmax,
    "CUMULATIVE": cumulative,
    "TOPK": top_k,
    "MATRIX_MULTIPLY": matrix_multiply,
    "NORMALIZATION": normalization,
    "CONVOLUTION": convolution,
}
