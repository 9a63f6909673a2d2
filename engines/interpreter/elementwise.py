"""Layers that compute every element by itself.

A reader takes a layer (`parsed.Layer`) and returns the function of its inputs. Real numbers are float32
arrays, and the caller rounds the result to the output's type. Quotations are from TensorRT's NvInfer.h
(11.1), at the class or enumeration named.
"""

from __future__ import annotations

import math

import numpy as np

from .numbers import REALS, held_dtype
from .parsed import Compute, Layer, Reader

_erf = np.frompyfunc(math.erf, 1, 1)


def erf(x: np.ndarray) -> np.ndarray:
    """The Gauss error function, which numpy lacks."""
    return np.asarray(_erf(x)).astype(np.float32)


def _divided(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    if not np.issubdtype(x.dtype, np.integer):
        return x / y
    quotient, rest = np.divmod(x, y)
    if ((rest != 0) & ((x < 0) != (y < 0))).any():
        raise ValueError(
            "an inexact quotient of integers of different signs, whose rounding TensorRT does not define"
        )
    return quotient


ELEMENTWISE: dict[str, Compute] = {  # enum ElementWiseOperation
    "SUM": np.add,
    "PROD": np.multiply,
    "MAX": np.maximum,
    "MIN": np.minimum,
    "SUB": np.subtract,
    "DIV": _divided,
    "POW": np.power,
    "FLOOR_DIV": np.floor_divide,
    "AND": np.logical_and,
    "OR": np.logical_or,
    "XOR": np.logical_xor,
    "EQUAL": np.equal,
    "GREATER": np.greater,
    "LESS": np.less,
}

UNARY: dict[str, Compute] = {  # enum UnaryOperation
    "EXP": np.exp,
    "LOG": np.log,
    "SQRT": np.sqrt,
    "RECIP": lambda x: np.float32(1) / x,
    "ABS": np.abs,
    "NEG": np.negative,
    "SIN": np.sin,
    "COS": np.cos,
    "TAN": np.tan,
    "SINH": np.sinh,
    "COSH": np.cosh,
    "ASIN": np.arcsin,
    "ACOS": np.arccos,
    "ATAN": np.arctan,
    "ASINH": np.arcsinh,
    "ACOSH": np.arccosh,
    "ATANH": np.arctanh,
    "CEIL": np.ceil,
    "FLOOR": np.floor,
    "ERF": erf,
    "NOT": np.logical_not,
    "SIGN": np.sign,
    "ROUND": np.rint,
    "ISINF": np.isinf,
    "ISNAN": np.isnan,
}


ACTIVATION: dict[str, Compute] = {  # enum ActivationType, of x, alpha and beta
    "RELU": lambda x, a, b: np.maximum(x, 0),
    "SIGMOID": lambda x, a, b: np.float32(1) / (1 + np.exp(-x)),
    "TANH": lambda x, a, b: np.tanh(x),
    "LEAKY_RELU": lambda x, a, b: np.where(x >= 0, x, a * x),
    "ELU": lambda x, a, b: np.where(x >= 0, x, a * np.expm1(x)),
    "SELU": lambda x, a, b: np.where(x > 0, b * x, b * (a * np.exp(x) - a)),
    "SOFTSIGN": lambda x, a, b: x / (1 + np.abs(x)),
    "SOFTPLUS": lambda x, a, b: a * np.log(np.exp(b * x) + 1),
    "CLIP": lambda x, a, b: np.maximum(a, np.minimum(b, x)),
    "HARD_SIGMOID": lambda x, a, b: np.maximum(0, np.minimum(1, a * x + b)),
    "SCALED_TANH": lambda x, a, b: a * np.tanh(b * x),
    "THRESHOLDED_RELU": lambda x, a, b: np.where(x > a, x, 0),
    "GELU_ERF": lambda x, a, b: 0.5 * x * (1 + erf(np.float32(0.5**0.5) * x)),
    "GELU_TANH": lambda x, a, b: (
        0.5 * x * (1 + np.tanh(np.float32((2 / np.pi) ** 0.5) * (np.float32(0.044715) * x**3 + x)))
    ),
}


def elementwise(layer: Layer) -> Compute:
    """IElementWiseLayer: "The input tensors must have the same rank"; dimensions of 1 are broadcast."""
    operation = _of(layer, ELEMENTWISE, layer["op"])

    def compute(x, y):
        if x.ndim != y.ndim:
            raise ValueError(f"ranks {x.ndim} and {y.ndim}")
        return operation(x, y)

    return compute


def unary(layer: Layer) -> Compute:
    """IUnaryLayer: a function of every element."""
    return _of(layer, UNARY, layer["op"])


def activation(layer: Layer) -> Compute:
    """IActivationLayer: "a per-element activation function"."""
    function = _of(layer, ACTIVATION, layer["type"])
    alpha, beta = np.float32(layer["alpha"]), np.float32(layer["beta"])
    return lambda x: function(x, alpha, beta)


def select(layer: Layer) -> Compute:
    """ISelectLayer: elements of the first input where the condition is true, else of the second."""

    def compute(condition: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.where(condition, x, y)

    return compute


def identity(layer: Layer) -> Compute:
    """IIdentityLayer, which casts where its types differ."""
    return cast_to(layer, layer.outputs[0].kind)


def cast(layer: Layer) -> Compute:
    """ICastLayer: "casts a given tensor to the datatype specified by toType"."""
    if layer["to_type"] != layer.outputs[0].kind:
        raise layer.refuse(f"a cast to {layer['to_type']} with an output of {layer.outputs[0].kind}")
    return cast_to(layer, layer["to_type"])


def cast_to(layer: Layer, kind: str) -> Compute:
    """Cast to `kind`. A cast to reals leaves the rounding to the caller; one to integers truncates, as C
    does.

    A number that is out of the integers' range is an error at run time, because its result is not defined.
    """
    dtype, source = held_dtype(kind), layer.input(0).kind
    if kind in ("FP8", "FP4", "E8M0", "INT4"):
        raise layer.refuse(f"a cast to {kind}")

    def compute(x):
        if source in REALS and kind not in REALS and kind != "BOOL":
            bounds = np.iinfo(dtype)
            if not ((x > bounds.min - 1.0) & (x < bounds.max + 1.0)).all():
                raise ValueError(f"a cast of {x.min()} to {x.max()} to {kind}")
        return x.astype(dtype)

    return compute


def _of(layer: Layer, table: dict[str, Compute], name: str) -> Compute:
    if name not in table:
        raise layer.refuse(f"operation {name}", f"one of {', '.join(table)}")
    return table[name]


READERS: dict[str, Reader] = {
    "ELEMENTWISE": elementwise,
    "UNARY": unary,
    "ACTIVATION": activation,
    "SELECT": select,
    "IDENTITY": identity,
    "CAST": cast,
}
