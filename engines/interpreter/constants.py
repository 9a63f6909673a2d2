"""Constants of a network, in TensorRT's own memory.

A constant may be of a type that numpy lacks. Its bytes are then read through TensorRT's C++ object.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import MissingError
from .numbers import bytes_count

_NUMPY = {
    "float32": "FLOAT",
    "float16": "HALF",
    "int8": "INT8",
    "int32": "INT32",
    "int64": "INT64",
    "bool": "BOOL",
    "uint8": "UINT8",
}


@dataclass(frozen=True, eq=False)
class Constant:
    """`count` numbers of type `kind`. `data` is a uint8 view of TensorRT's own memory."""

    kind: str
    count: int
    data: np.ndarray


class _Weights(ctypes.Structure):
    """`nvinfer1::Weights` (NvInferRuntimeBase.h)."""

    _fields_ = [("type", ctypes.c_int32), ("values", ctypes.c_void_p), ("count", ctypes.c_int64)]


def _raw(weights: Any) -> _Weights:
    """The C++ object behind a Python one, whose pointer follows the Python object's header.

    `weights.numpy()` would give only the types that numpy itself has.
    """
    return _Weights.from_address(ctypes.c_size_t.from_address(id(weights) + object.__basicsize__).value)


@functools.cache
def check_weights_layout(trt: Any) -> None:
    """Check that `_raw` finds weights whose memory is known. Raises MissingError."""
    array = np.arange(7, dtype=np.float32)
    weights = trt.Weights(array)
    raw = _raw(weights)
    if (raw.type, raw.values, raw.count) != (int(trt.DataType.FLOAT), array.ctypes.data, 7):
        raise MissingError(
            "This TensorRT stores its weights in another form",
            fix="use CPython 3.11 or newer with TensorRT for RTX 1.7",
            where=f"{trt.__name__} {trt.__version__}: expected nvinfer1::Weights behind tensorrt.Weights",
        )


def constant_of(layer: Any, name: str) -> Constant:
    """The constant `name` of a layer, in TensorRT's memory.

    TensorRT gives a numpy view where numpy has the type, else a tensorrt.Weights.
    """
    weights = getattr(layer, name)
    if isinstance(weights, np.ndarray):
        return Constant(_NUMPY[weights.dtype.name], weights.size, weights.reshape(-1).view(np.uint8))
    raw, kind, count = _raw(weights), weights.dtype.name, weights.size
    assert (raw.type, raw.count) == (int(weights.dtype), count), f"{name}: {raw.type}, {raw.count}"
    if not count:
        return Constant(kind, 0, np.zeros(0, np.uint8))
    memory = (ctypes.c_uint8 * bytes_count(kind, count)).from_address(raw.values)
    return Constant(kind, count, np.ctypeslib.as_array(memory))
