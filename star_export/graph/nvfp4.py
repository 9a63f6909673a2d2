"""Activations in nvfp4: the one form in which TensorRT for RTX reads nvfp4 weights as they are stored.

With activations in bf16 it writes the whole weight out as bf16 at every step (docs/targets.md). So the inputs
x [B,S,K] of a product are rounded too: each row is divided by its largest magnitude [B,S,1], then each block
of 16 by a scale in E4M3, and rounded to E2M1. The product is multiplied by the row's magnitude afterwards.
Thus the scale of the scales is a constant without any calibration, and TensorRT fuses what is done to a row
into neighbouring kernels.

TensorRT's parser has an operator for the blocks. ONNX Runtime has neither it nor FP4: in the fp32 twin it is
the local function `star::RoundToNvfp4`, in standard operators. `golden/activations.py` rounds the reference's
activations alike.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx import NodeProto, TensorProto, helper, numpy_helper

from .formats import E2M1, LARGEST, NVFP4
from .modules import MODULE
from .ops import DOMAIN, OPSET, VERSION

NAME = "RoundToNvfp4"
QUANTIZE = "trt", "TRT_FP4DynamicQuantize"  # an operator of TensorRT's parser, which has no other
(BLOCK,) = NVFP4.blocks
TOP, TOP_OF_SCALES = LARGEST[NVFP4.code], LARGEST[ir.DataType.FLOAT8E4M3FN]
# The scale of the scales of rows whose largest magnitude is 1: a power of two, so that it is exact in bf16.
WHOLE = 2.0 ** np.ceil(np.log2(1 / TOP / TOP_OF_SCALES))
Size = int | ir.SymbolicDim
OF_ROWS, ROUNDED = ".largest", ".rounded"  # what is read of a tensor instead of it, after its name
LEAST = 2.0**-100  # instead of the largest magnitude of a row of zeros


def round_activations(model: ir.Model, product: ir.Node) -> None:
    """Let `product`, a MatMul of activations and weights, read its first input rounded to nvfp4.

    Products that share an input share the rounding.
    """
    x, graph = product.inputs[0], model.graph
    assert product.op_type == "MatMul" and x is not None and x.shape is not None and len(x.shape) == 3
    largest, rounded = _rounded(model, x)
    old = product.outputs[0]
    scaled = ir.node("Mul", [old, largest], name=f"{product.name}.scaled")
    new = scaled.outputs[0]
    new.type, new.shape, new.name = old.type, old.shape, old.name
    if MODULE in old.metadata_props:  # the product alone is no tensor of the reference any more
        new.metadata_props[MODULE] = old.metadata_props.pop(MODULE)
    product.replace_input_with(0, rounded)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    scaled.replace_input_with(0, old)
    old.name = f"{new.name}.unscaled"
    graph.insert_after(product, scaled)


def _rounded(model: ir.Model, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The largest magnitudes of the rows of `x`, and its rows divided by them and rounded."""
    graph, dtype, before = model.graph, x.dtype, x.producer()
    assert dtype is not None and x.shape is not None and before is not None, x.name
    made = {value.name: value for node in graph for value in node.outputs}
    if f"{x.name}{ROUNDED}" in made:
        return made[f"{x.name}{OF_ROWS}"], made[f"{x.name}{ROUNDED}"]
    batch, length, features = x.shape
    nodes: list[ir.Node] = []

    def add(suffix: str, op: str, *inputs: ir.Value, last: Size = features, **attributes) -> ir.Value:
        node = ir.node(op, inputs, attributes, name=f"{x.name}{suffix}")
        (value,) = node.outputs
        value.name, value.type, value.shape = node.name, x.type, ir.Shape([batch, length, last])
        nodes.append(node)
        return value

    axis, least, whole = (
        _constant(model, f"{x.name}.{suffix}", array)
        for suffix, array in (
            ("axis", np.array([-1])),
            ("least", np.array(LEAST, dtype.numpy())),
            ("whole", np.array(WHOLE, dtype.numpy())),
        )
    )
    found = add(".row_largest", "ReduceMax", add(".magnitudes", "Abs", x), axis, last=1, keepdims=1)
    largest = add(OF_ROWS, "Max", found, least, last=1)
    scaled = add(".scaled", "Div", x, largest)
    quantise = ir.node(
        QUANTIZE[1],
        [scaled, whole],
        {"axis": -1, "block_size": BLOCK, "scale_type": ir.DataType.FLOAT8E4M3FN.value},
        domain=QUANTIZE[0],
        num_outputs=2,
        name=f"{x.name}.quantise",
    )
    codes, scales = quantise.outputs
    for value, suffix, kind, width in (
        (codes, "codes", NVFP4.code, features),
        (scales, "scales", ir.DataType.FLOAT8E4M3FN, features // BLOCK),
    ):
        value.name, value.type = f"{x.name}.{suffix}", ir.TensorType(kind)
        value.shape = ir.Shape([batch, length, width])
    nodes.append(quantise)
    steps = add(".steps", "DequantizeLinear", scales, whole, last=features // BLOCK)
    rounded = add(ROUNDED, "DequantizeLinear", codes, steps, axis=-1, block_size=BLOCK)
    graph.insert_after(before, nodes)
    model.opset_imports[QUANTIZE[0]] = VERSION
    return largest, rounded


def is_rounded(value: ir.Value | None) -> bool:
    """Whether `value` was rounded by `round_activations`."""
    node = value.producer() if value is not None else None
    codes = node.inputs[0].producer() if node is not None and node.inputs and node.inputs[0] else None
    return codes is not None and (codes.domain, codes.op_type) == QUANTIZE


def unpack_activations(model: ir.Model) -> None:
    """Let a stored graph round activations by `star::RoundToNvfp4`, in float32, for ONNX Runtime."""
    found = [node for node in model.graph if (node.domain, node.op_type) == QUANTIZE]
    for quantise in found:
        (codes, scales), whole = quantise.outputs, quantise.inputs[1]
        ((steps, _),), ((dequantise, _),) = scales.uses(), codes.uses()
        call = ir.node(NAME, [quantise.inputs[0]], domain=DOMAIN, name=quantise.name)
        rounded, old = call.outputs[0], dequantise.outputs[0]
        rounded.name, rounded.type, rounded.shape = old.name, old.type, old.shape
        model.graph.insert_before(quantise, call)
        old.replace_all_uses_with(rounded)
        model.graph.remove([dequantise, steps, quantise], safe=True)
        del model.graph.initializers[str(whole.name)]
    if found:
        del model.opset_imports[QUANTIZE[0]]
        model.functions[(DOMAIN, NAME, "")] = function_body()
        model.opset_imports[DOMAIN] = VERSION


def function_body() -> ir.Function:
    """`star::RoundToNvfp4(x) -> rounded`: x [B,S,K] in float32, of rows whose largest magnitude is 1.

    Numbers of E2M1 have steps of 0.5 up to 2, of 1 up to 4 and of 2 up to 6, so the parts of a number are
    rounded apart.
    """
    numbers = {"zero": 0, "half": 0.5, "one": 1, "two": 2, "four": 4, "top": TOP, "whole": WHOLE}
    arrays = {name: np.array(number, np.float32) for name, number in numbers.items()}
    arrays |= {"last": np.array([-1]), "blocked": np.array([0, 0, -1, BLOCK])}
    nodes = [
        helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array))
        for name, array in arrays.items()
    ]
    nodes += [
        _node("Reshape", ["x", "blocked"], "blocks"),
        _node("Abs", ["blocks"], "magnitudes"),
        _node("ReduceMax", ["magnitudes", "last"], "largest", keepdims=1),
        _node("Div", ["largest", "top"], "wanted"),
        _node("Div", ["wanted", "whole"], "wide_scales"),
        _node("Cast", ["wide_scales"], "scales", to=TensorProto.FLOAT8E4M3FN),
        _node("Cast", ["scales"], "rounded_scales", to=TensorProto.FLOAT),
        _node("Mul", ["rounded_scales", "whole"], "steps"),
        _node("Greater", ["steps", "zero"], "any"),
        _node("Where", ["any", "steps", "one"], "safe"),
        _node("Div", ["blocks", "safe"], "numbers"),
        _node("Abs", ["numbers"], "size"),
        _node("Sub", ["size", "two"], "above_two"),
        _node("Sub", ["size", "four"], "above_four"),
    ]
    for part, step in (("size", "half"), ("above_two", "one"), ("above_four", "two")):
        nodes += [
            _node("Clip", [part, "zero", "two"], f"{part}.part"),
            _node("Div", [f"{part}.part", step], f"{part}.steps"),
            _node("Round", [f"{part}.steps"], f"{part}.whole"),
            _node("Mul", [f"{part}.whole", step], f"{part}.rounded"),
        ]
    nodes += [
        _node("Sum", ["size.rounded", "above_two.rounded", "above_four.rounded"], "rounded_size"),
        _node("Sign", ["numbers"], "sign"),
        _node("Mul", ["sign", "rounded_size"], "rounded_numbers"),
        _node("Mul", ["rounded_numbers", "steps"], "rounded_blocks"),
        _node("Shape", ["x"], "shape"),
        _node("Reshape", ["rounded_blocks", "shape"], "rounded"),
    ]
    what = "Round to nvfp4: numbers of E2M1, in blocks of 16 with scales in E4M3."
    imports = [helper.make_opsetid("", OPSET)]
    return ir.serde.deserialize_function(
        helper.make_function(DOMAIN, NAME, ["x"], ["rounded"], nodes, imports, doc_string=what)
    )


def unpack_weights(model: ir.Model) -> None:
    """Write the nvfp4 weights of a stored graph for ONNX Runtime: a table looked up by codes of type UINT4.

    The codes stay where they are stored; the numbers are float32.
    """
    for codes in [v for v in model.graph.initializers.values() if v.dtype == NVFP4.code]:
        ((dequantize, _),), stored = codes.uses(), codes.const_value
        assert stored is not None
        codes.const_value = _as_uint4(stored)
        codes.type = ir.TensorType(ir.DataType.UINT4)
        _look_up(model, dequantize)


def _as_uint4(stored: ir.TensorProtocol) -> ir.TensorProtocol:
    """The same bytes, at the same place, declared as UINT4."""
    if not isinstance(stored, ir.ExternalTensor):
        data = np.frombuffer(stored.tobytes(), np.uint8)
        return ir.PackedTensor(data, ir.DataType.UINT4, shape=stored.shape, name=stored.name)
    return ir.ExternalTensor(
        stored.location,
        stored.offset,
        stored.length,
        ir.DataType.UINT4,
        shape=stored.shape,
        name=str(stored.name),
        base_dir=stored.base_dir,
    )


def _look_up(model: ir.Model, dequantize: ir.Node) -> None:
    """Replace the two DequantizeLinear, of codes and of scales, of a weight [K,N] with blocks along K."""
    codes, steps = dequantize.inputs[:2]
    dense = dequantize.outputs[0]
    assert codes is not None and steps is not None and codes.shape is not None and dense.name is not None
    inner = steps.producer()
    assert inner is not None
    scales, whole = inner.inputs[:2]
    features, rows = codes.shape
    nodes: list[ir.Node] = []

    def add(
        op: str, *inputs: ir.Value | None, dtype: ir.DataType = ir.DataType.FLOAT, **attributes
    ) -> ir.Value:
        node = ir.node(op, inputs, attributes, name=f"{dense.name}.{len(nodes)}")
        node.outputs[0].name, node.outputs[0].type = f"{node.name}.out", ir.TensorType(dtype)
        nodes.append(node)
        return node.outputs[0]

    table, blocked, flat, axis = (
        _constant(model, f"{dense.name}.{suffix}", np.array(values))
        for suffix, values in (
            ("table", np.array([*E2M1, *(-number for number in E2M1)], np.float32)),
            ("blocked", [features // BLOCK, BLOCK, rows]),
            ("flat", [features, rows]),
            ("axis", [1]),
        )
    )
    wide = ir.DataType.FLOAT.value
    numbers = add("Gather", table, add("Cast", codes, dtype=ir.DataType.INT32, to=ir.DataType.INT32.value))
    column = add("Mul", add("Cast", scales, to=wide), add("Cast", whole, to=wide))
    product = add("Mul", add("Reshape", numbers, blocked), add("Unsqueeze", column, axis))
    result = add("Reshape", product, flat)
    result.shape = dense.shape
    model.graph.insert_before(dequantize, nodes)
    dense.replace_all_uses_with(result)
    model.graph.remove([dequantize, inner], safe=True)


def _constant(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    """A small initializer."""
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    model.graph.initializers.add(value)
    return value


def _node(op: str, inputs: list[str], output: str, **attributes) -> NodeProto:
    return helper.make_node(op, inputs, [output], **attributes)
