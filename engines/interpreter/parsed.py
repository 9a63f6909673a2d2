"""The network that TensorRT parsed, as plain data: every layer, attribute, tensor and constant, in an order that can be computed.

TensorRT hands out layers as `ILayer`; the class of a layer's type is set on it to reach the attributes. A layer kind, an
attribute or a type that is not in the tables here is refused by name: what is not known is not guessed. Constants are read
from TensorRT's own bytes.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from ..errors import InputError, MissingError
from .numbers import BITS, bytes_count

BUILDERS = ("tensorrt_rtx",)  # the modules whose networks are known here, as of version 1.7
ATTRIBUTES = {  # of each layer kind, all that the class has beyond those of every layer
    "ACTIVATION": ("alpha", "beta"),
    "ATTENTION_INPUT": ("attention",),
    "ATTENTION_OUTPUT": ("attention",),
    "CAST": ("to_type",),
    "CONCATENATION": ("axis",),
    "CONSTANT": ("shape", "weights"),
    "CONVOLUTION": (
        "bias",
        "dilation_nd",
        "kernel",
        "kernel_size_nd",
        "num_groups",
        "num_output_maps",
        "padding_mode",
        "padding_nd",
        "post_padding",
        "pre_padding",
        "stride_nd",
    ),
    "CUMULATIVE": ("exclusive", "op", "reverse"),
    "DEQUANTIZE": ("axis", "block_shape", "to_type"),
    "ELEMENTWISE": ("op",),
    "FILL": ("alpha", "beta", "is_alpha_beta_int64", "operation", "shape", "to_type"),
    "GATHER": ("axis", "mode", "num_elementwise_dims"),
    "IDENTITY": (),
    "KV_CACHE_UPDATE": ("cache_mode", "update_form", "update_lengths"),
    "MATRIX_MULTIPLY": ("op0", "op1"),
    "NORMALIZATION": ("axes", "epsilon", "is_v2", "num_groups"),
    "ONE_HOT": ("axis",),
    "PADDING": ("post_padding_nd", "pre_padding_nd"),
    "QUANTIZE": ("axis", "block_shape", "to_type"),
    "REDUCE": ("axes", "keep_dims", "op"),
    "RESIZE": (
        "coordinate_transformation",
        "cubic_coeff",
        "exclude_outside",
        "nearest_rounding",
        "resize_mode",
        "scales",
        "selector_for_single_pixel",
        "shape",
    ),
    "ROTARY_EMBEDDING": ("interleaved", "rotary_embedding_dim"),
    "SCATTER": ("axis", "mode"),
    "SELECT": (),
    "SHAPE": (),
    "SHUFFLE": ("first_transpose", "reshape_dims", "second_transpose", "zero_is_placeholder"),
    "SLICE": ("axes", "mode", "shape", "start", "stride"),
    "SOFTMAX": ("axes",),
    "SQUEEZE": (),
    "TOPK": ("axes", "indices_type", "k", "op"),
    "UNARY": ("op",),
    "UNSQUEEZE": (),
}
ATTENTION = (
    "causal",
    "causal_kind",
    "decomposable",
    "key_value_form",
    "key_value_lengths",
    "mask",
    "metadata",
    "name",
    "norm_op",
    "normalization_quantize_scale",
    "normalization_quantize_to_type",
    "num_ranks",
    "query_form",
    "query_lengths",
)
_HIDING = {"ACTIVATION": ("type",)}  # an attribute that hides one of ILayer
_CLASSES = {
    "TOPK": "ITopKLayer",
    "SOFTMAX": "ISoftMaxLayer",
    "KV_CACHE_UPDATE": "IKVCacheUpdateLayer",
    "ELEMENTWISE": "IElementWiseLayer",
}  # the others are named by rule
_METHODS = {"get_input", "get_output", "num_inputs", "num_outputs", "set_input"}  # of IAttention


@dataclass(frozen=True)
class Tensor:
    """`kind` is TensorRT's type (`BF16`), a dynamic size is -1."""

    name: str
    kind: str
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Constant:
    """`count` numbers of `kind` in TensorRT's own memory: `data`, uint8."""

    kind: str
    count: int
    data: np.ndarray


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer. An input may be absent. Attributes are names of enumerators, numbers, tuples of sizes, tensor names or
    Constants."""

    kind: str
    name: str
    inputs: tuple[Tensor | None, ...]
    outputs: tuple[Tensor, ...]
    attributes: dict[str, object] = field(default_factory=dict)

    def __getitem__(self, attribute: str):
        return self.attributes[attribute]

    def refuse(self, got: str, expected: str = "what this version evaluates") -> InputError:
        """The error for what is not known of this layer."""
        return InputError(
            "TensorRT's network cannot be read back",
            where=f"{self.kind} {self.name}: expected {expected}, got {got}",
            fix="use TensorRT for RTX 1.7, or export again; if it fails again, report this graph",
        )


@dataclass(frozen=True, eq=False)
class Parsed:
    """A network: its boundary, and its layers such that each comes after those it reads. `owner` keeps TensorRT's memory
    alive."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    layers: tuple[Layer, ...]
    owner: object = None


def parsed_from_network(trt, network, *, owner: object = None) -> Parsed:
    """Read a network. `owner` is what its memory belongs to (builder, parser). Raises InputError for what is not known, and
    MissingError for another TensorRT: before 10.16, arrays of its constants are wrong with numpy 2."""
    if trt.__name__ not in BUILDERS:
        raise MissingError(
            "This TensorRT's networks cannot be read back",
            fix="use TensorRT for RTX 1.7",
            where=f"expected one of {', '.join(BUILDERS)}, got {trt.__name__} {trt.__version__}",
        )
    _check_weights_layout(trt)
    layers = [_layer(trt, network.get_layer(i)) for i in range(network.num_layers)]
    inputs = tuple(_tensor(network.get_input(i)) for i in range(network.num_inputs))
    outputs = tuple(_tensor(network.get_output(i)) for i in range(network.num_outputs))
    return Parsed(inputs, outputs, tuple(_ordered(layers, inputs)), (network, owner))


def _layer(trt, layer) -> Layer:
    kind = layer.type.name  # before the class is set: IActivationLayer has another `type`
    known = Layer(
        kind,
        layer.name,
        tuple(_tensor(layer.get_input(i)) for i in range(layer.num_inputs)),
        tuple(_tensor(layer.get_output(i)) for i in range(layer.num_outputs)),
    )
    if kind not in ATTRIBUTES:
        raise known.refuse("a layer of this kind", f"one of {', '.join(ATTRIBUTES)}")
    cls, names = _class_and_attributes(trt, kind)
    if names != set(ATTRIBUTES[kind]):
        raise known.refuse(
            f"attributes {', '.join(sorted(names)) or 'none'}",
            f"attributes {', '.join(ATTRIBUTES[kind]) or 'none'}",
        )
    layer.__class__ = cls
    for name in (*ATTRIBUTES[kind], *_HIDING.get(kind, ())):
        known.attributes.update(
            _attention(trt, known, layer.attention)
            if name == "attention"
            else {name: _value(trt, known, layer, name)}
        )
    return known


@functools.cache
def _class_and_attributes(trt, kind: str) -> tuple[type, frozenset[str]]:
    """The class of layers of `kind`, and what it has beyond every layer."""
    cls = getattr(
        trt,
        _CLASSES.get(kind) or f"I{''.join(word.capitalize() for word in kind.split('_'))}Layer",
        trt.ILayer,
    )
    return cls, frozenset(name for name in set(dir(cls)) - set(dir(trt.ILayer)) if not name.startswith("__"))


def _attention(trt, known: Layer, attention) -> dict[str, object]:
    """The attributes of the `IAttention` that a boundary layer belongs to."""
    names = {name for name in dir(attention) if not name.startswith("_")} - _METHODS
    if names != set(ATTENTION):
        raise known.refuse(f"attributes {', '.join(sorted(names))}", f"attributes {', '.join(ATTENTION)}")
    return {name: _value(trt, known, attention, name) for name in ATTENTION}


def _value(trt, known: Layer, owner, name: str) -> object:
    try:
        value = getattr(owner, name)
    except RuntimeError:  # an empty Dims, as of a block shape that is not set
        return None
    value = value() if callable(value) else value
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if name in ("weights", "kernel", "bias"):
        return _constant(owner, name)
    if isinstance(value, trt.ITensor):
        return value.name
    if hasattr(value, "name"):
        return value.name
    try:
        return tuple(float(v) if isinstance(v, float) else int(v) for v in value)
    except TypeError:
        raise known.refuse(f"{name} of type {type(value).__name__}") from None


def _tensor(tensor) -> Tensor | None:
    if tensor is None:
        return None
    kind = tensor.dtype.name
    if kind not in BITS:
        raise InputError(
            "TensorRT's network cannot be read back",
            fix="use TensorRT for RTX 1.7",
            where=f"tensor {tensor.name}: expected one of {', '.join(BITS)}, got type {kind}",
        )
    return Tensor(tensor.name, kind, tuple(tensor.shape) if len(tensor.shape) >= 0 else ())


def _ordered(layers: list[Layer], inputs: tuple[Tensor, ...]) -> Iterator[Layer]:
    """The layers, each after those it reads, else as they stand. Raises InputError for two tensors of one name, or a circle."""
    producers: dict[str, Layer | None] = {tensor.name: None for tensor in inputs}
    for layer in layers:
        for tensor in layer.outputs:
            if tensor.name in producers:
                raise layer.refuse(f"a second tensor named {tensor.name}", "every tensor's name once")
            producers[tensor.name] = layer
    done: set[int] = set()
    for first in layers:
        stack = [first]
        while stack:
            layer = stack[-1]
            if unknown := [t.name for t in layer.inputs if t is not None and t.name not in producers]:
                raise layer.refuse(f"an input {unknown[0]} that nothing computes")
            before = [
                producer
                for t in layer.inputs
                if t is not None and (producer := producers[t.name]) and id(producer) not in done
            ]
            if id(layer) in done or not before:
                stack.pop()
                if id(layer) not in done:
                    done.add(id(layer))
                    yield layer
            elif any(producer in stack for producer in before):
                raise layer.refuse("a layer that reads its own result")
            else:
                stack.extend(before)


class _Weights(ctypes.Structure):
    """`nvinfer1::Weights` (NvInferRuntimeBase.h)."""

    _fields_ = [("type", ctypes.c_int32), ("values", ctypes.c_void_p), ("count", ctypes.c_int64)]


def _raw(weights) -> _Weights:
    """The C++ object behind a Python one: its pointer follows the object's header. numpy() has no types but numpy's own."""
    return _Weights.from_address(ctypes.c_void_p.from_address(id(weights) + object.__basicsize__).value)


@functools.cache
def _check_weights_layout(trt) -> None:
    """Weights whose memory is known must be found where `_raw` looks. Raises MissingError."""
    array = np.arange(7, dtype=np.float32)
    weights = trt.Weights(array)
    raw = _raw(weights)
    if (raw.type, raw.values, raw.count) != (int(trt.DataType.FLOAT), array.ctypes.data, 7):
        raise MissingError(
            "This TensorRT keeps its weights in another form",
            fix="use CPython 3.11 or newer with TensorRT for RTX 1.7",
            where=f"{trt.__name__} {trt.__version__}: expected nvinfer1::Weights behind tensorrt.Weights",
        )


def _constant(layer, name: str) -> Constant:
    """The constant `name` of a layer, in TensorRT's memory: a numpy view where numpy has the type, else behind a
    tensorrt.Weights."""
    weights = getattr(layer, name)
    if isinstance(weights, np.ndarray):
        return Constant(_NUMPY[weights.dtype.name], weights.size, weights.reshape(-1).view(np.uint8))
    raw, kind, count = _raw(weights), weights.dtype.name, weights.size
    assert (raw.type, raw.count) == (int(weights.dtype), count), f"{name}: {raw.type}, {raw.count}"
    if not count:
        return Constant(kind, 0, np.zeros(0, np.uint8))
    return Constant(
        kind,
        count,
        np.ctypeslib.as_array((ctypes.c_uint8 * bytes_count(kind, count)).from_address(raw.values)),
    )


_NUMPY = {
    "float32": "FLOAT",
    "float16": "HALF",
    "int8": "INT8",
    "int32": "INT32",
    "int64": "INT64",
    "bool": "BOOL",
    "uint8": "UINT8",
}
