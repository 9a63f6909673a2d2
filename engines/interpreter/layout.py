"""Layers that move elements without computing, and layers on shapes.

Quotations are from TensorRT's NvInfer.h (11.1).
"""

from __future__ import annotations

import math

import numpy as np

from .numbers import held_dtype
from .parsed import Compute, Layer, Reader


def shape(layer: Layer) -> Compute:
    """IShapeLayer: the dimensions of the input, as int64."""
    return lambda x: np.array(x.shape, np.int64)


def shuffle(layer: Layer) -> Compute:
    """IShuffleLayer: "a transpose operation, a reshape operation and a second transpose operation".

    "The layer has an optional second input. If present, [...] the reshape dimensions are taken from it". A
    dimension of 0 copies the input's if `zero_is_placeholder`; -1 is inferred.
    """
    first, second, static, placeholder = (
        layer[name] for name in ("first_transpose", "second_transpose", "reshape_dims", "zero_is_placeholder")
    )
    if len(layer.inputs) == 2 and static is not None:
        raise layer.refuse(f"reshape dimensions {static} and a second input")

    def compute(x, dims=None):
        x = x.transpose(first[: x.ndim])
        dims = static if dims is None else dims.tolist()
        if dims is not None:
            x = x.reshape([x.shape[i] if size == 0 and placeholder else size for i, size in enumerate(dims)])
        return x.transpose(second[: x.ndim])

    return compute


def slice_(layer: Layer) -> Compute:
    """ISliceLayer: `size` elements from `start` on, `stride` apart.

    Inputs 1 to 5 (start, size, stride, fill value, axes) replace the static ones. The SampleMode decides
    what is read out of bounds.
    """
    static, mode = [layer["start"], layer["shape"], layer["stride"]], layer["mode"]
    if mode not in _OUTSIDE:
        raise layer.refuse(f"sample mode {mode}", f"one of {', '.join(_OUTSIDE)}")

    def compute(x, start=None, size=None, stride=None, fill=None, axes=None):
        starts, sizes, strides = (
            static[i] if given is None else given.tolist() for i, given in enumerate((start, size, stride))
        )
        chosen = layer["axes"] if axes is None else axes.tolist()
        chosen = range(x.ndim) if chosen is None else [axis % x.ndim for axis in chosen]
        inside = np.array(True)
        for axis, begin, count, step in zip(chosen, starts, sizes, strides, strict=True):
            length, at = x.shape[axis], begin + step * np.arange(count)
            within = (at >= 0) & (at < length)
            x = np.take(x, at if within.all() else _OUTSIDE[mode](at, length), axis=axis)
            inside = inside & within.reshape([-1 if i == axis else 1 for i in range(x.ndim)])
        return x if mode != "FILL" else np.where(inside, x, x.dtype.type(0) if fill is None else fill)

    return compute


def _strict(at: np.ndarray, length: int) -> np.ndarray:
    raise ValueError(f"a slice from {at.min()} to {at.max()} of {length} elements")


def _reflect(at: np.ndarray, length: int) -> np.ndarray:
    """Reflect at the edges.

    "The axis of reflection is the middle of the perimeter pixel"; "repeats values for a single pixel".
    """
    period = max(2 * (length - 1), 1)
    return (length - 1) - np.abs(at % period - (length - 1))


_OUTSIDE = {
    "STRICT_BOUNDS": _strict,
    "WRAP": lambda at, n: at % n,
    "CLAMP": lambda at, n: at.clip(0, n - 1),
    "FILL": lambda at, n: at.clip(0, n - 1),
    "REFLECT": _reflect,
}


def concatenation(layer: Layer) -> Compute:
    """IConcatenationLayer: the inputs joined along `axis`."""
    axis = layer["axis"]
    return lambda *inputs: np.concatenate(inputs, axis)


def squeeze(layer: Layer) -> Compute:
    """ISqueezeLayer: remove unit dimensions, all of them without a second input.

    "Removing unit dimensions of the first input tensor on a set of axes specified by the second input
    tensor".
    """

    def compute(x, axes=None):
        return np.squeeze(x, None if axes is None else tuple(axes.reshape(-1).tolist()))

    return compute


def unsqueeze(layer: Layer) -> Compute:
    """IUnsqueezeLayer: insert dimensions of 1.

    "Inserting unit-length dimensions to the output at the axes specified by the second input tensor".
    """
    return lambda x, axes: np.expand_dims(x, tuple(axes.reshape(-1).tolist()))


def fill(layer: Layer) -> Compute:
    """IFillLayer, LINSPACE: "Element [i,j] of the output is Alpha + Beta[0]*i + Beta[1]*j".

    The inputs are the dimensions, alpha and beta. Random fills are refused: they are not a function of the
    inputs.
    """
    if layer["operation"] != "LINSPACE":
        raise layer.refuse(f"operation {layer['operation']}", "LINSPACE")
    dtype, static = held_dtype(layer.outputs[0].kind), layer["shape"]
    alpha, beta = layer["alpha"], layer["beta"]

    def compute(dims=None, start=None, steps=None):
        sizes = static if dims is None else dims.tolist()
        result = np.full(sizes, alpha if start is None else start, dtype)
        deltas = [beta] if steps is None else steps.reshape(-1).tolist()
        for axis, delta in zip(range(len(sizes)), deltas, strict=True):
            steps_taken = dtype.type(delta) * np.arange(sizes[axis], dtype=dtype)
            result = result + steps_taken.reshape([-1 if i == axis else 1 for i in range(len(sizes))])
        return result

    return compute


def padding(layer: Layer) -> Compute:
    """IPaddingLayer: zeros around the last two dimensions.

    "Adds zero-padding at the start and end [...] only the last two dimensions. [...] negative padding
    results in cropping".
    """
    before, after = layer["pre_padding_nd"], layer["post_padding_nd"]

    def compute(x):
        crop = tuple(slice(max(-b, 0), size - max(-a, 0)) for b, a, size in zip(before, after, x.shape[-2:]))
        pads = [(0, 0)] * (x.ndim - 2) + [(max(b, 0), max(a, 0)) for b, a in zip(before, after)]
        return np.pad(x[(..., *crop)], pads)

    return compute


def resize(layer: Layer) -> Compute:
    """IResizeLayer: NEAREST and LINEAR.

    The output's shape comes from input 1, from `shape`, or is "floor(input dimension * scale)".
    """
    mode, single = layer["resize_mode"], layer["selector_for_single_pixel"]
    transformation, rounding = layer["coordinate_transformation"], layer["nearest_rounding"]
    origin, nearest = _ORIGINS.get(transformation), _NEAREST.get(rounding)
    if mode not in ("NEAREST", "LINEAR") or origin is None or nearest is None:
        raise layer.refuse(f"{mode} with {transformation} and {rounding}")
    scales, static = layer["scales"], layer["shape"]

    def sizes_of(shape: tuple[int, ...], dims: np.ndarray | None) -> list[int]:
        if dims is not None:
            return dims.tolist()
        return [math.floor(n * s) for n, s in zip(shape, scales)] if scales else static

    def compute(x, dims=None):
        for axis, (length, new) in enumerate(zip(x.shape, sizes_of(x.shape, dims), strict=True)):
            if length == new:
                continue
            at = origin(np.arange(new), length, new) if new > 1 or single == "FORMULA" else np.zeros(1)
            if mode == "NEAREST":
                x = np.take(x, nearest(at).astype(np.int64).clip(0, length - 1), axis=axis)
            else:
                x = _interpolated(x, at, axis)
        return x

    return compute


_ORIGINS: dict[str, Compute] = {  # enum ResizeCoordinateTransformation
    "ALIGN_CORNERS": lambda at, length, new: at * (length - 1) / max(new - 1, 1),
    "ASYMMETRIC": lambda at, length, new: at * (length / new),
    "HALF_PIXEL": lambda at, length, new: (at + 0.5) * (length / new) - 0.5,
}
_NEAREST: dict[str, Compute] = {  # enum ResizeRoundMode
    "HALF_UP": lambda at: np.floor(at + 0.5),
    "HALF_DOWN": lambda at: np.ceil(at - 0.5),
    "FLOOR": np.floor,
    "CEIL": np.ceil,
}


def _interpolated(x: np.ndarray, at: np.ndarray, axis: int) -> np.ndarray:
    at = at.clip(0, x.shape[axis] - 1)
    low = np.floor(at).astype(np.int64)
    high = np.minimum(low + 1, x.shape[axis] - 1)
    share = (at - low).astype(np.float32).reshape([-1 if i == axis else 1 for i in range(x.ndim)])
    return np.take(x, low, axis=axis) * (1 - share) + np.take(x, high, axis=axis) * share


READERS: dict[str, Reader] = {
    "SHAPE": shape,
    "SHUFFLE": shuffle,
    "SLICE": slice_,
    "CONCATENATION": concatenation,
    "SQUEEZE": squeeze,
    "UNSQUEEZE": unsqueeze,
    "FILL": fill,
    "PADDING": padding,
    "RESIZE": resize,
}
