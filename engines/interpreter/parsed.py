"""The network that TensorRT parsed, as plain data: its layers, attributes, tensors and constants.

TensorRT returns every layer as `ILayer`; setting the class of the layer's type on it gives access to the
attributes. A layer kind, an attribute or a type that is not in the tables here is an error that names it:
nothing is guessed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import InputError, MissingError
from .constants import check_weights_layout, constant_of
from .numbers import BITS

BUILDERS = ("tensorrt_rtx",)  # the modules whose networks can be interpreted, as of version 1.7
ATTRIBUTES = {  # the attributes of each layer kind, beyond those of ILayer
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
    "DYNAMIC_QUANTIZE": ("axis", "block_shape", "block_size", "scale_type", "to_type"),
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
_HIDING = {"ACTIVATION": ("type",)}  # attributes that hide one of ILayer's
_CLASSES = {  # names of classes that do not follow the rule
    "TOPK": "ITopKLayer",
    "SOFTMAX": "ISoftMaxLayer",
    "KV_CACHE_UPDATE": "IKVCacheUpdateLayer",
    "ELEMENTWISE": "IElementWiseLayer",
}
_METHODS = {"get_input", "get_output", "num_inputs", "num_outputs", "set_input"}  # of IAttention


@dataclass(frozen=True)
class Tensor:
    """A tensor of the network. `kind` is TensorRT's type, such as `BF16`; a dynamic size is -1."""

    name: str
    kind: str
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer.

    An optional input that is not given is None. An attribute is the name of an enumerator or of a tensor, a
    number, a tuple of sizes, or a Constant.
    """

    kind: str
    name: str
    inputs: tuple[Tensor | None, ...]
    outputs: tuple[Tensor, ...]
    attributes: dict[str, object] = field(default_factory=dict)

    def __getitem__(self, attribute: str) -> Any:
        return self.attributes[attribute]

    def input(self, index: int) -> Tensor:
        """An input that the layer must have. Raises InputError where it is absent."""
        tensor = self.inputs[index]
        if tensor is None:
            raise self.refuse(f"no input {index}", f"an input {index}")
        return tensor

    def refuse(self, got: str, expected: str = "what this version evaluates") -> InputError:
        """The error for a property of this layer that cannot be interpreted."""
        return InputError(
            "TensorRT's network cannot be interpreted",
            where=f"{self.kind} {self.name}: expected {expected}, got {got}",
            fix="use TensorRT for RTX 1.7, or export again; if it fails again, report this graph",
        )


Compute = Callable[..., np.ndarray]  # what a layer computes from its inputs
Reader = Callable[[Layer], Callable]  # from a layer to its Compute, or to a function with several results


@dataclass(frozen=True, eq=False)
class Parsed:
    """A network: its inputs and outputs, and its layers, each after those whose results it reads.

    `owner` keeps TensorRT's memory alive.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    layers: tuple[Layer, ...]
    owner: object = None


def parsed_from_network(trt: Any, network: Any, *, owner: object = None) -> Parsed:
    """Turn TensorRT's network into data. `owner` is what the network's memory belongs to (builder, parser).

    Raises InputError for a layer, attribute or type that is not known, and MissingError for another
    TensorRT: before 10.16, it gives numpy 2 wrong arrays for its constants.
    """
    if trt.__name__ not in BUILDERS:
        raise MissingError(
            "Networks of this TensorRT cannot be interpreted",
            fix="use TensorRT for RTX 1.7",
            where=f"expected one of {', '.join(BUILDERS)}, got {trt.__name__} {trt.__version__}",
        )
    check_weights_layout(trt)
    layers = [_layer(trt, network.get_layer(i)) for i in range(network.num_layers)]
    inputs = tuple(_tensor(network.get_input(i)) for i in range(network.num_inputs))
    outputs = tuple(_tensor(network.get_output(i)) for i in range(network.num_outputs))
    return Parsed(inputs, outputs, tuple(_ordered(layers, inputs)), (network, owner))


def _layer(trt: Any, layer: Any) -> Layer:
    kind = layer.type.name  # read before the class is set, because IActivationLayer has another `type`
    inputs = [layer.get_input(i) for i in range(layer.num_inputs)]
    known = Layer(
        kind,
        layer.name,
        tuple(None if tensor is None else _tensor(tensor) for tensor in inputs),
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
def _class_and_attributes(trt: Any, kind: str) -> tuple[type, frozenset[str]]:
    """The class of layers of `kind`, and its attributes beyond those of ILayer."""
    by_rule = f"I{''.join(word.capitalize() for word in kind.split('_'))}Layer"
    cls = getattr(trt, _CLASSES.get(kind, by_rule), trt.ILayer)
    return cls, frozenset(name for name in set(dir(cls)) - set(dir(trt.ILayer)) if not name.startswith("__"))


def _attention(trt: Any, known: Layer, attention: Any) -> dict[str, object]:
    """The attributes of the `IAttention` that an ATTENTION_INPUT or ATTENTION_OUTPUT layer belongs to."""
    names = {name for name in dir(attention) if not name.startswith("_")} - _METHODS
    if names != set(ATTENTION):
        raise known.refuse(f"attributes {', '.join(sorted(names))}", f"attributes {', '.join(ATTENTION)}")
    return {name: _value(trt, known, attention, name) for name in ATTENTION}


def _value(trt: Any, known: Layer, owner: Any, name: str) -> object:
    try:
        value = getattr(owner, name)
    except RuntimeError:  # an empty Dims, such as a block shape that is not set
        return None
    value = value() if callable(value) else value
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if name in ("weights", "kernel", "bias"):
        return constant_of(owner, name)
    if isinstance(value, trt.ITensor):
        return value.name
    if hasattr(value, "name"):
        return value.name
    try:
        return tuple(float(v) if isinstance(v, float) else int(v) for v in value)
    except TypeError:
        raise known.refuse(f"{name} of type {type(value).__name__}") from None


def _tensor(tensor: Any) -> Tensor:
    kind = tensor.dtype.name
    if kind not in BITS:
        raise InputError(
            "TensorRT's network cannot be interpreted",
            fix="use TensorRT for RTX 1.7",
            where=f"tensor {tensor.name}: expected one of {', '.join(BITS)}, got type {kind}",
        )
    return Tensor(tensor.name, kind, tuple(tensor.shape) if len(tensor.shape) >= 0 else ())


def _ordered(layers: list[Layer], inputs: tuple[Tensor, ...]) -> Iterator[Layer]:
    """Yield the layers in their own order, but each after those whose results it reads.

    Raises InputError for two tensors of one name, and for a cycle.
    """
    producers: dict[str, Layer | None] = {tensor.name: None for tensor in inputs}
    for layer in layers:
        for tensor in layer.outputs:
            if tensor.name in producers:
                raise layer.refuse(f"a second tensor named {tensor.name}", "tensors of different names")
            producers[tensor.name] = layer
    done: set[int] = set()
    for first in layers:
        stack = [first]
        while stack:
            layer = stack[-1]
            if unknown := [t.name for t in layer.inputs if t is not None and t.name not in producers]:
                raise layer.refuse(f"an input {unknown[0]} that no layer computes")
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
