"""Layers that read and write by index. Quotations are from TensorRT's NvInfer.h (11.1)."""

from __future__ import annotations

import numpy as np

from .parsed import Compute, Layer, Reader


def gather(layer: Layer) -> Compute:
    """IGatherLayer: DEFAULT, ELEMENT and ND, "similar to ONNX Gather, GatherElements and GatherND".

    "Zero will be stored for OOB access". A negative index counts from the end, except along an axis of
    dynamic length, where it "has undefined behavior": this is an error here.
    """
    mode, axis, shared = layer["mode"], layer["axis"], layer["num_elementwise_dims"]
    sizes = layer.input(0).shape
    if mode not in _GATHER:
        raise layer.refuse(f"mode {mode}", f"one of {', '.join(_GATHER)}")
    function = _GATHER[mode]

    def compute(data, indices):
        return function(data, indices, axis, shared, sizes)

    return compute


def _index(indices: np.ndarray, length: int, declared: int) -> tuple[np.ndarray, np.ndarray]:
    """The indices with those out of bounds replaced by 0, and which of them are within bounds."""
    if declared < 0 and (indices < 0).any():
        raise ValueError("a negative index along an axis of dynamic length, which TensorRT does not define")
    indices = np.where(indices < 0, indices + length, indices)
    inside = (indices >= 0) & (indices < length)
    return np.where(inside, indices, 0), inside


def _gather_default(data, indices, axis, shared, sizes):
    indices, inside = _index(indices, data.shape[axis], sizes[axis])
    if not shared:
        return _take(data, indices, inside, axis)
    # "First nbElementwiseDims of output are computed by applying broadcast rules"; there is at most one
    rows = range(max(len(data), len(indices)))
    parts = [(data[i % len(data)], indices[i % len(indices)], inside[i % len(inside)]) for i in rows]
    return np.stack([_take(d, i, o, axis - 1) for d, i, o in parts])


def _take(data, indices, inside, axis):
    taken = np.take(data, indices, axis=axis)
    if inside.all():
        return taken
    within = inside.reshape([1] * axis + list(inside.shape) + [1] * (data.ndim - axis - 1))
    return np.where(within, taken, data.dtype.type(0))


def _gather_element(data, indices, axis, shared, sizes):
    """Compute "output[J] = data[K]", where K is J with [axis] replaced by the index."""
    indices, inside = _index(indices, data.shape[axis], sizes[axis])
    return np.where(inside, data[_places(indices, axis)], data.dtype.type(0))


def _gather_nd(data, indices, axis, shared, sizes):
    """Compute "output[i_1, ..., i_{q-1}] = data[indices[i_1, ..., i_{q-1}]]".

    The first `shared` dimensions of data and indices are common to both.
    """
    depth = indices.shape[-1]
    at, within = zip(
        *(_index(indices[..., i], data.shape[shared + i], sizes[shared + i]) for i in range(depth))
    )
    leading = np.ogrid[tuple(slice(n) for n in indices.shape[:-1])][:shared]
    taken, inside = data[(*leading, *at)], np.logical_and.reduce(within)
    inside = inside.reshape(inside.shape + (1,) * (taken.ndim - inside.ndim))
    return np.where(inside, taken, data.dtype.type(0))


_GATHER = {"DEFAULT": _gather_default, "ELEMENT": _gather_element, "ND": _gather_nd}


def _places(indices: np.ndarray, axis: int) -> tuple[np.ndarray, ...]:
    """The subscripts of every element of `indices`, with the one along `axis` replaced by the element."""
    places = list(np.ogrid[tuple(slice(n) for n in indices.shape)])
    places[axis] = indices
    return tuple(places)


def scatter(layer: Layer) -> Compute:
    """IScatterLayer: ELEMENT "output[K] = updates[J]", ND "output[indices[slice]] = updates[slice]".

    Two writes to one element "cause undefined behavior": this is an error here, like an index out of bounds.
    """
    mode, axis, sizes = layer["mode"], layer["axis"], layer.input(0).shape
    if mode not in ("ELEMENT", "ND"):
        raise layer.refuse(f"mode {mode}", "ELEMENT or ND")

    def compute(data, indices, updates):
        parts = [indices] if mode == "ELEMENT" else [indices[..., i] for i in range(indices.shape[-1])]
        first = axis if mode == "ELEMENT" else 0
        at, inside = zip(
            *(_index(part, data.shape[first + i], sizes[first + i]) for i, part in enumerate(parts))
        )
        places = _places(at[0], axis) if mode == "ELEMENT" else at
        counts = np.zeros(data.shape[: len(places)], np.int64)
        np.add.at(counts, places, 1)
        if counts.max(initial=0) > 1 or not np.logical_and.reduce(inside).all():
            raise ValueError(
                "two writes to one element, or one out of bounds, which TensorRT does not define"
            )
        result = data.copy()
        result[places] = updates
        return result

    return compute


def one_hot(layer: Layer) -> Compute:
    """IOneHotLayer: "copying off_values to all output elements, then setting on_value on the indices".

    The inputs are the indices, the values [off, on] and the depth. The attribute `axis` is the new axis.
    """
    axis = layer["axis"]

    def compute(indices, values, depth):
        count = int(depth)
        if ((indices < 0) | (indices >= count)).any():
            found = f"indices of {indices.min()} to {indices.max()}"
            raise ValueError(f"{found} for a depth of {count}, which TensorRT does not define")
        place = axis % (indices.ndim + 1)
        classes = np.arange(count).reshape([-1 if i == place else 1 for i in range(indices.ndim + 1)])
        return np.where(np.expand_dims(indices, place) == classes, values[1], values[0])

    return compute


READERS: dict[str, Reader] = {"GATHER": gather, "SCATTER": scatter, "ONE_HOT": one_hot}
