"""Activations in nvfp4: the one form in which TensorRT for RTX reads nvfp4 weights as they are stored.

With activations in bf16 it writes the whole weight out as bf16 at every step (docs/targets.md). So the inputs
of a product are rounded too, by `star::RoundToNvfp4(x) -> (rounded, largest)`, an ONNX local function of
x [B,S,K] in rows of K: each row is divided by its largest magnitude, `largest` [B,S,1], then each block of 16
by a scale in E4M3, and rounded to E2M1. The product is multiplied by `largest` afterwards. The scale of the
scales is thus a constant without any calibration, and TensorRT fuses both steps into neighbouring kernels.

The function has two bodies of equal meaning: one with TensorRT's own operator, and one for ONNX Runtime,
which has no FP4, in standard operators. `golden/activations.py` rounds the reference's activations alike.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx import NodeProto, TensorProto, helper, numpy_helper

from .formats import E2M1, LARGEST, NVFP4
from .ops import DOMAIN, OPSET, VERSION

NAME = "RoundToNvfp4"
QUANTIZE = "trt", "TRT_FP4DynamicQuantize"  # an operator of TensorRT's parser, which has no other
(BLOCK,) = NVFP4.blocks
TOP, TOP_OF_SCALES = LARGEST[NVFP4.code], LARGEST[ir.DataType.FLOAT8E4M3FN]
# The scale of the scales of rows whose largest magnitude is 1: a power of two, so that it is exact in bf16.
WHOLE = 2.0 ** np.ceil(np.log2(1 / TOP / TOP_OF_SCALES))
LEAST = 2.0**-100  # instead of the largest magnitude of a row of zeros


def round_activations(model: ir.Model, product: ir.Node) -> None:
    """Let `product`, a MatMul of activations and weights, read its first input rounded to nvfp4.

    Products that share an input share the rounding.
    """
    x, graph = product.inputs[0], model.graph
    assert product.op_type == "MatMul" and x is not None and x.shape is not None and len(x.shape) == 3
    rounding = next((node for node, _ in x.uses() if node.op_type == NAME), None)
    if rounding is None:
        rounding = ir.node(NAME, [x], domain=DOMAIN, num_outputs=2, name=f"{x.name}.round")
        for value, suffix, width in zip(rounding.outputs, ("rounded", "largest"), (x.shape[2], 1)):
            value.name, value.type = f"{x.name}.{suffix}", x.type
            value.shape = ir.Shape([*list(x.shape)[:2], width])
        before = x.producer()
        assert before is not None, f"{x.name}: expected the result of a node"
        graph.insert_after(before, rounding)
        model.functions[(DOMAIN, NAME, "")] = body_for_tensorrt()
        model.opset_imports[DOMAIN] = VERSION
    rounded, largest = rounding.outputs
    old = product.outputs[0]
    scaled = ir.node("Mul", [old, largest], name=f"{product.name}.scaled")
    new = scaled.outputs[0]
    new.type, new.shape, new.name = old.type, old.shape, old.name
    product.replace_input_with(0, rounded)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    scaled.replace_input_with(0, old)
    old.name = f"{new.name}.unscaled"
    graph.insert_after(product, scaled)


def body_for_tensorrt() -> ir.Function:
    """The function in bfloat16, with the operator that becomes an `IDynamicQuantizeLayer`."""
    domain, operator = QUANTIZE
    quantise = helper.make_node(
        operator,
        ["scaled", "whole"],
        ["codes", "scales"],
        domain=domain,
        axis=-1,
        block_size=BLOCK,
        scale_type=TensorProto.FLOAT8E4M3FN,
    )
    return _function(
        [
            *_rows_divided(ml_dtypes.bfloat16),
            _constant("whole", np.array(WHOLE, ml_dtypes.bfloat16)),
            quantise,
            _node("DequantizeLinear", ["scales", "whole"], "steps"),
            _node("DequantizeLinear", ["codes", "steps"], "rounded", axis=-1, block_size=BLOCK),
        ],
        domain,
    )


def body_for_cpu() -> ir.Function:
    """The function in float32 and standard operators. Numbers of E2M1 have steps of 0.5 up to 2, of 1 up to
    4 and of 2 up to 6, so the parts of a number are rounded apart."""
    parts = [
        _constant("two", np.float32(2)),
        _constant("four", np.float32(4)),
        _constant("half", np.float32(0.5)),
        _node("Abs", ["numbers"], "size"),
        _node("Sub", ["size", "two"], "above_two"),
        _node("Sub", ["size", "four"], "above_four"),
    ]
    for name, step, part in (
        ("low", "half", "size"),
        ("middle", "one", "above_two"),
        ("high", "two", "above_four"),
    ):
        parts += [
            _node("Clip", [part, "zero", "two"], f"{name}_part"),
            _node("Div", [f"{name}_part", step], f"{name}_steps"),
            _node("Round", [f"{name}_steps"], f"{name}_whole"),
            _node("Mul", [f"{name}_whole", step], f"{name}_rounded"),
        ]
    return _function(
        [
            *_rows_divided(np.float32),
            _constant("whole", np.float32(WHOLE)),
            _constant("zero", np.float32(0)),
            _constant("one", np.float32(1)),
            _constant("top", np.float32(TOP)),
            _constant("blocked", np.array([0, 0, -1, BLOCK])),
            _node("Reshape", ["scaled", "blocked"], "blocks"),
            _node("Abs", ["blocks"], "block_magnitudes"),
            _node("ReduceMax", ["block_magnitudes", "last"], "block_largest", keepdims=1),
            _node("Div", ["block_largest", "top"], "wanted"),
            _node("Div", ["wanted", "whole"], "wide_scales"),
            _node("Cast", ["wide_scales"], "scales", to=TensorProto.FLOAT8E4M3FN),
            _node("Cast", ["scales"], "rounded_scales", to=TensorProto.FLOAT),
            _node("Mul", ["rounded_scales", "whole"], "steps"),
            _node("Greater", ["steps", "zero"], "any"),
            _node("Where", ["any", "steps", "one"], "safe"),
            _node("Div", ["blocks", "safe"], "numbers"),
            *parts,
            _node("Sum", ["low_rounded", "middle_rounded", "high_rounded"], "rounded_size"),
            _node("Sign", ["numbers"], "sign"),
            _node("Mul", ["sign", "rounded_size"], "rounded_numbers"),
            _node("Mul", ["rounded_numbers", "steps"], "rounded_blocks"),
            _node("Shape", ["x"], "shape"),
            _node("Reshape", ["rounded_blocks", "shape"], "rounded"),
        ]
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
    if (DOMAIN, NAME, "") in model.functions:
        model.functions[(DOMAIN, NAME, "")] = body_for_cpu()


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

    def constant(suffix: str, values: object, dtype: ir.DataType) -> ir.Value:
        tensor = ir.tensor(np.asarray(values, dtype.numpy()), dtype=dtype, name=f"{dense.name}.{suffix}")
        value = ir.Value(name=tensor.name, type=ir.TensorType(dtype), shape=tensor.shape, const_value=tensor)
        model.graph.initializers.add(value)
        return value

    table = constant("table", [*E2M1, *(-number for number in E2M1)], ir.DataType.FLOAT)
    blocked = constant("blocked", [features // BLOCK, BLOCK, rows], ir.DataType.INT64)
    flat = constant("flat", [features, rows], ir.DataType.INT64)
    axis = constant("axis", [1], ir.DataType.INT64)
    wide = ir.DataType.FLOAT.value
    numbers = add("Gather", table, add("Cast", codes, dtype=ir.DataType.INT32, to=ir.DataType.INT32.value))
    column = add("Mul", add("Cast", scales, to=wide), add("Cast", whole, to=wide))
    product = add("Mul", add("Reshape", numbers, blocked), add("Unsqueeze", column, axis))
    result = add("Reshape", product, flat)
    result.shape = dense.shape
    model.graph.insert_before(dequantize, nodes)
    dense.replace_all_uses_with(result)
    model.graph.remove([dequantize, inner], safe=True)


def _rows_divided(dtype: type) -> list[NodeProto]:
    """x -> `largest`, and `scaled` = x / largest."""
    return [
        _constant("last", np.array([-1])),
        _constant("least", np.array(LEAST, dtype)),
        _node("Abs", ["x"], "magnitudes"),
        _node("ReduceMax", ["magnitudes", "last"], "row_largest", keepdims=1),
        _node("Max", ["row_largest", "least"], "largest"),
        _node("Div", ["x", "largest"], "scaled"),
    ]


def _node(op: str, inputs: list[str], output: str, **attributes) -> NodeProto:
    return helper.make_node(op, inputs, [output], **attributes)


def _constant(name: str, value: np.ndarray | np.float32) -> NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.asarray(value)))


def _function(nodes: list[NodeProto], *domains: str) -> ir.Function:
    imports = [helper.make_opsetid("", OPSET), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return ir.serde.deserialize_function(
        helper.make_function(
            DOMAIN,
            NAME,
            ["x"],
            ["rounded", "largest"],
            nodes,
            imports,
            doc_string="Round rows of activations to nvfp4, each divided by its largest magnitude.",
        )
    )
