"""Write weights into a graph: one traced graph, several formats.

A traced graph has the compute type bfloat16 and empty initializers. `set_precision` replaces the type, and
`attach_weights` gives every initializer a lazy tensor, which is read, transposed, rounded or quantised only
when the data file is written, one at a time. A quantised weight becomes codes and scales with a
`DequantizeLinear` after them; the scales of nvfp4 have one themselves. `Precision.rounded` applies the same
rounding and returns float32, for the reference that records golden tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch

from reference.containers import LazyTensor

from . import nvfp4, ops
from .formats import Encoded, Format, packed
from .modules import hand_on
from .precisions import Precision

INLINE_BYTES = 1024  # smaller tensors are shapes and scalars, and stay in model.onnx
TRANSPOSED = "transposed"  # metadata of an initializer that stores the transpose of its checkpoint tensor
CODES, SCALES, WHOLE = (
    ".codes",
    ".scales",
    ".whole",
)  # what a quantised weight's initializers are called, after its name


def set_precision(model: ir.Model, compute: ir.DataType) -> None:
    """Replace bfloat16 by `compute` everywhere in a traced graph: in values, casts and small constants."""
    if compute == ir.DataType.BFLOAT16:
        return
    for value in _values(model):
        if value.dtype == ir.DataType.BFLOAT16:
            value.type = ir.TensorType(compute)  # a new object: clones of a graph share the old one
            if value.const_value is not None:
                value.const_value = ir.tensor(
                    value.const_value.numpy().astype(compute.numpy()), name=value.name
                )
    for node in list(model.graph):
        to = node.attributes.get("to")
        if node.op_type == "Cast" and to is not None and to.value == ir.DataType.BFLOAT16:
            node.attributes["to"] = ir.AttrInt64("to", compute.value)
        if (
            node.op_type == "Cast"
            and node.inputs[0].dtype == node.outputs[0].dtype
            and not node.outputs[0].is_graph_output()
        ):
            hand_on(node.outputs[0], node.inputs[0])
            node.outputs[0].replace_all_uses_with(node.inputs[0])
            model.graph.remove(node, safe=True)


def _values(model: ir.Model):
    yield from model.graph.inputs
    yield from model.graph.initializers.values()
    for node in model.graph:
        yield from node.outputs


def attach_weights(model: ir.Model, tensors: Mapping[str, LazyTensor], precision: Precision) -> None:
    """Give each empty initializer its lazy weight from `tensors`, in the format of `precision`."""
    for name, value in list(model.graph.initializers.items()):
        if value.const_value is not None:
            continue
        tensor, transposed = tensors[name], TRANSPOSED in value.metadata_props
        found = precision.format_of(name, tuple(tensor.shape))
        if found is None:
            value.const_value = _lazy(name, value.dtype, value.shape, _dense(tensor, transposed, precision))
        else:
            _insert_dequantize(model, value, tensor, precision, found)


def _dense(tensor: LazyTensor, transposed: bool, precision: Precision) -> Callable[[], torch.Tensor]:
    return lambda: (tensor.load().T.contiguous() if transposed else tensor.load()).to(precision.torch_dtype)


def _insert_dequantize(
    model: ir.Model, weight: ir.Value, tensor: LazyTensor, precision: Precision, found: Format
) -> None:
    """Replace `weight` by `weight.codes` and `weight.scales` with a DequantizeLinear after them.

    A linear layer's weight is stored transposed, [in, out], and a row of the format is a column of it. Every
    other keeps its layout: kernels of convolutions, and tables, which a head may multiply by as well.
    """
    rows, features = tensor.shape[0], math.prod(tensor.shape[1:])
    transposed = TRANSPOSED in weight.metadata_props
    layout: dict[str, int] = {"axis": 1 if transposed else 0}
    shape = [rows]
    if found.blocks:
        size = found.block(features) or features
        layout = {"axis": 0 if transposed else 1, "block_size": size}
        shape = [features // size, rows] if transposed else [rows, features // size]

    encoded = _Encoded(tensor, found, precision.torch_dtype)
    codes = ir.Value(
        name=f"{weight.name}{CODES}", type=ir.TensorType(found.code), shape=ir.Shape(list(weight.shape))
    )
    kind = found.scale or precision.compute
    scales = ir.Value(name=f"{weight.name}{SCALES}", type=ir.TensorType(kind), shape=ir.Shape(shape))
    codes.const_value = _lazy(codes.name, found.code, codes.shape, lambda: encoded.codes(transposed))
    scales.const_value = _lazy(
        scales.name, kind, scales.shape, lambda: encoded.scales(transposed).reshape(shape)
    )
    first = next(iter(weight.uses())).node
    steps = _scaled_scales(model, first, scales, encoded, precision) if found.scale else scales
    node = ir.node("DequantizeLinear", [codes, steps], layout, name=f"{weight.name}.dequantize")
    dense = node.outputs[0]
    dense.name, dense.dtype, dense.shape = f"{weight.name}.dense", precision.compute, weight.shape
    model.graph.insert_before(first, node)
    weight.replace_all_uses_with(dense)
    del model.graph.initializers[weight.name]
    model.graph.initializers.add(codes)
    model.graph.initializers.add(scales)
    for user, _ in list(dense.uses()):
        if user.op_type == "Gemm":
            _multiply_transposed(model, user)
        elif found.scale:
            nvfp4.round_activations(model, user)


def _scaled_scales(
    model: ir.Model, before: ir.Node, scales: ir.Value, encoded: _Encoded, precision: Precision
) -> ir.Value:
    """The output of a DequantizeLinear of `scales` by a scale of their own, in the compute type."""
    dtype, name = precision.compute, scales.name
    whole = ir.Value(name=f"{name}{WHOLE}", type=ir.TensorType(dtype), shape=ir.Shape([]))
    whole.const_value = _lazy(whole.name, dtype, whole.shape, encoded.whole)
    model.graph.initializers.add(whole)
    node = ir.node("DequantizeLinear", [scales, whole], name=f"{name}.dequantize")
    (steps,) = node.outputs
    steps.name, steps.type, steps.shape = f"{name}.dense", whole.type, scales.shape
    model.graph.insert_before(before, node)
    return steps


def _multiply_transposed(model: ir.Model, gemm: ir.Node) -> None:
    """Replace `Gemm(x, weight, bias, transB=1)` by `MatMul(x, Transpose(weight))` and `Add`.

    Executors fuse that product with the DequantizeLinear of the weight. A dense weight keeps the `Gemm`,
    because ONNX Runtime would hold its transpose in memory as well.
    """
    x, weight, *bias = gemm.inputs
    plain = {"transA": 0, "alpha": 1.0, "beta": 1.0, "transB": 1}
    other = {name: a.value for name, a in gemm.attributes.items() if a.value != plain[name]}
    assert x is not None and weight is not None and "transB" in gemm.attributes and not other, gemm
    turn = ir.node("Transpose", [weight], {"perm": [1, 0]}, name=f"{weight.name}.transpose")
    product = ir.node("MatMul", [x, turn.outputs[0]], name=gemm.name)
    made = [turn, product, *(ir.node("Add", [product.outputs[0], b], name=f"{gemm.name}.bias") for b in bias)]
    turned, old, new = turn.outputs[0], gemm.outputs[0], made[-1].outputs[0]
    product.outputs[0].name, product.outputs[0].type = f"{gemm.name}.product", old.type
    turned.name, turned.type = f"{weight.name}.transposed", weight.type
    turned.shape = ir.Shape(list(weight.shape)[::-1])
    new.name, new.type, new.shape = old.name, old.type, old.shape
    hand_on(old, new)
    model.graph.insert_before(gemm, made)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    model.graph.remove(gemm, safe=True)


@dataclass(frozen=True)
class StoredTensor(LazyTensor):
    """A weight whose codes were chosen already: `load` gives what they stand for, in float32."""

    encoded: Callable[[], Encoded]


class _Encoded:
    """The codes and scales of one weight, quantised once for both, and the scale of the scales."""

    def __init__(self, tensor: LazyTensor, found: Format, dtype: torch.dtype):
        self.tensor, self.format, self.dtype = tensor, found, dtype
        self.made: Encoded | None = None

    def codes(self, transposed: bool) -> torch.Tensor:
        """int8 of the weight's shape, or [features, rows]."""
        codes = self._take().codes
        return codes.T if transposed else codes.reshape(self.tensor.shape)

    def scales(self, transposed: bool) -> torch.Tensor:
        """[rows, blocks], or [blocks, rows]."""
        scales = self._take().scales
        return scales.T if transposed else scales

    def whole(self) -> torch.Tensor:
        """A scalar in the compute type."""
        if isinstance(self.tensor, StoredTensor):
            found = self.tensor.encoded().whole
        else:
            found = self.format.whole(self.tensor.load())
        assert found is not None
        return found.to(self.dtype)

    def _take(self) -> Encoded:
        made, self.made = self.made, None  # the second of the two calls frees it
        if made is None:
            if isinstance(self.tensor, StoredTensor):
                made = self.tensor.encoded()
            else:
                made = self.format.encode(self.tensor.load(), self.dtype)
            self.made = made
        return made


def _lazy(name: str, dtype: ir.DataType, shape: ir.Shape, load: Callable[[], torch.Tensor]) -> ir.LazyTensor:
    def evaluate() -> ir.TensorProtocol:
        tensor = load().contiguous()
        if tuple(tensor.shape) != tuple(shape):
            raise AssertionError(
                f"{name}: the graph expects shape {tuple(shape)}, the checkpoint has {tuple(tensor.shape)}"
            )
        if dtype.bitwidth == 4:
            return ir.PackedTensor(packed(tensor), dtype=dtype, shape=shape, name=name)
        return ir.Tensor(_numpy(tensor, dtype), dtype=dtype, name=name)

    return ir.LazyTensor(evaluate, dtype=dtype, shape=shape, name=name)


def _numpy(tensor: torch.Tensor, dtype: ir.DataType) -> np.ndarray:
    if dtype == ir.DataType.BFLOAT16:
        return tensor.to(torch.bfloat16).view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    if dtype == ir.DataType.FLOAT8E4M3FN:  # bits, or numbers
        return tensor.view(torch.int8).numpy().view(ml_dtypes.float8_e4m3fn)
    return tensor.numpy()


def twin_from_graph(model: ir.Model) -> ir.Model:
    """Turn a stored 16-bit graph into its fp32 twin: it casts the same rounded weights to float32.

    Its attention is written for the CPU. nvfp4 weights and activations are written in operators that ONNX
    Runtime has.
    """
    nvfp4.unpack_activations(model)
    nvfp4.unpack_weights(model)
    for node in [node for node in model.graph if node.op_type == "DequantizeLinear"]:
        scale_apart(model, node)
    compute = next(v.dtype for v in _values(model) if v.dtype in (ir.DataType.BFLOAT16, ir.DataType.FLOAT16))
    for value in list(model.graph.initializers.values()):
        if value.dtype == compute:
            cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT.value}, name=f"{value.name}.widen")
            wide = cast.outputs[0]
            wide.name, wide.dtype, wide.shape = f"{value.name}.wide", ir.DataType.FLOAT, value.shape
            value.replace_all_uses_with(wide)
            cast.replace_input_with(0, value)
            model.graph.insert_before(model.graph[0], cast)
    stored = set(model.graph.initializers.values())
    for value in _values(model):
        if value.dtype == compute and value not in stored:
            value.type = ir.TensorType(ir.DataType.FLOAT)
    for node in model.graph:
        if node.op_type == "Cast" and node.attributes["to"].value == compute:
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT.value)
    attend_on_cpu(model)
    return model


def runnable_from_graph(model: ir.Model) -> ir.Model:
    """Turn any stored graph, of either dialect and type, into one in float32 that ONNX Runtime's CPU runs.

    A classic graph's call of the plugin gets the body of its function, and then the opset of that body.
    """
    calls = [node for node in model.graph if node.op_type == ops.NAME]
    if calls and not model.functions:
        for node in calls:
            node.attributes.clear()
        model.opset_imports[""] = ops.OPSET
    if any(value.dtype in (ir.DataType.BFLOAT16, ir.DataType.FLOAT16) for value in _values(model)):
        return twin_from_graph(model)
    attend_on_cpu(model)
    return model


def attend_on_cpu(model: ir.Model) -> None:
    """Give `star::KVCacheAttention` the body for the CPU, in a graph that calls it."""
    call = next((node for node in model.graph if node.op_type == ops.NAME), None)
    if call is not None:
        heads, kv_heads = (int(call.inputs[i].shape[1]) for i in (0, 3))
        body = ops.cpu_function_body(heads=heads, kv_heads=kv_heads)
        model.functions[body.identifier()] = body


def scale_apart(model: ir.Model, dequantize: ir.Node) -> None:
    """Write a `DequantizeLinear` that ONNX Runtime does not fuse as a product of codes and scales.

    It fuses those of products only. The kernel of a convolution is scaled once, while it is loaded.
    """
    codes, scales = dequantize.inputs[:2]
    (dense,) = dequantize.outputs
    assert codes is not None and codes.shape is not None and scales is not None
    for user, _ in list(dense.uses()):
        if user.op_type in ("MatMul", "Transpose"):
            continue
        scaled = _scaled(user, codes, scales)
        user.replace_input_with(list(user.inputs).index(dense), scaled)
    if not dense.uses():
        model.graph.remove(dequantize, safe=True)


def _scaled(at: ir.Node, codes: ir.Value, scales: ir.Value) -> ir.Value:
    """codes [n, ...] times scales [n], in the type of the scales, before the node `at`."""
    assert codes.shape is not None
    axes = list(range(1, len(codes.shape)))
    places = ir.Value(
        name=f"{at.name}.axes", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([len(axes)])
    )
    places.const_value = ir.tensor(axes, dtype=ir.DataType.INT64, name=places.name)
    assert at.graph is not None and scales.dtype is not None
    at.graph.initializers.add(places)
    wide = _node_before(at, "Cast", [codes], scales, ".wide", to=scales.dtype.value)
    column = _node_before(at, "Unsqueeze", [scales, places], scales, ".column")
    return _node_before(at, "Mul", [wide, column], scales, ".scaled")


def _node_before(
    at: ir.Node, op: str, inputs: list[ir.Value | None], like: ir.Value, suffix: str, **attributes: int
) -> ir.Value:
    """The output of a new node before `at`, named after it, of the type of `like`."""
    node = ir.node(op, inputs, attributes, name=f"{at.name}{suffix}")
    (value,) = node.outputs
    value.name, value.type = f"{node.name}.out", like.type
    assert at.graph is not None
    at.graph.insert_before(at, node)
    return value
