"""Which weight formats TensorRT for RTX multiplies as they are stored, and which it writes out in 16 bits.

A weight that is written out at every step costs more bytes than one that is stored in 16 bits: such a form is
no low precision. docs/targets.md states what is pinned here.
"""

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.helpers.plan_layers import PlanTensor, compiled, written_out
from tests.helpers.typed_models import E2M1, E4M3, node, random, stored

pytest.importorskip("tensorrt_rtx")
K, N, BF16 = 512, 256, TensorProto.BFLOAT16
RANGES = {"x": [[1, 1, K], [2, 1, K], [2, 16, K]]}


def bf16(name, value):
    return numpy_helper.from_array(np.asarray(value, ml_dtypes.bfloat16), name)


def weight(kind, block):
    """Nodes and constants of a weight `w` [K,N] in bf16; `block` is channel, tensor, or features."""
    size = {"tensor": [], "channel": [N]}.get(block) or ([] if block == "tensor" else [K // block, N])
    layout = {"tensor": {}, "channel": {"axis": 1}}.get(block, {"axis": 0, "block_size": block})
    dtype, values = {
        "int8": (TensorProto.INT8, (random(K, N) * 40).clip(-127, 127).astype(np.int8)),
        "int4": (TensorProto.INT4, (random(K, N) * 3).clip(-7, 7).astype(np.int8)),
        "fp8": (TensorProto.FLOAT8E4M3FN, random(K, N).astype(E4M3)),
        "nvfp4": (TensorProto.FLOAT4E2M1, random(K, N).astype(E2M1)),
    }[kind]
    if kind == "int8":
        codes = numpy_helper.from_array(values, "c")
    elif kind == "int4":
        pairs = values.reshape(-1, 2).view(np.uint8)
        codes = helper.make_tensor(
            "c", dtype, [K, N], (pairs[:, 0] & 15 | pairs[:, 1] << 4).tobytes(), raw=True
        )
    else:
        codes = stored("c", dtype, values)
    if kind != "nvfp4":
        return [node("DequantizeLinear", ["c", "s"], "w", **layout)], [codes, bf16("s", np.full(size, 0.01))]
    nodes = [
        node("DequantizeLinear", ["t", "g"], "s"),
        node("DequantizeLinear", ["c", "s"], "w", **layout),
    ]
    scales = stored("t", TensorProto.FLOAT8E4M3FN, np.ones(size, E4M3))
    return nodes, [codes, scales, bf16("g", 2.0**-7)]


def product(kind, block, *, activations=None):
    """x [B,S,K] -> x @ w, in bf16, the activations quantised to `activations` before."""
    nodes, constants = weight(kind, block)
    x = "x"
    if activations == "fp8":
        nodes += [node("QuantizeLinear", ["x", "a", "z"], "q"), node("DequantizeLinear", ["q", "a"], "d")]
        constants += [bf16("a", 0.02), stored("z", TensorProto.FLOAT8E4M3FN, np.zeros((), E4M3))]
        x = "d"
    elif activations == "nvfp4":
        nodes += [
            helper.make_node(
                "TRT_FP4DynamicQuantize",
                ["x", "a"],
                ["q", "b"],
                domain="trt",
                axis=-1,
                block_size=16,
                scale_type=int(TensorProto.FLOAT8E4M3FN),
            ),
            node("DequantizeLinear", ["b", "a"], "e"),
            node("DequantizeLinear", ["q", "e"], "d", axis=-1, block_size=16),
        ]
        constants += [bf16("a", 2.0**-11)]
        x = "d"
    ends = [helper.make_tensor_value_info(n, BF16, ["B", "S", size]) for n, size in (("x", K), ("y", N))]
    graph = helper.make_graph([*nodes, node("MatMul", [x, "w"], "y")], "g", ends[:1], ends[1:], constants)
    imports = [helper.make_opsetid("", 24), helper.make_opsetid("trt", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=11)


@pytest.mark.parametrize(
    "kind, block, sm, code",
    [
        ("int8", "channel", "SM86", "Int8"),
        ("int4", 128, "SM86", "Int4"),
        ("int4", 16, "SM120", "Int4"),
        ("fp8", "channel", "SM89", "FP8"),
        ("fp8", "channel", "SM120", "FP8"),
        ("fp8", "tensor", "SM89", "FP8"),
    ],
)
def test_a_fused_weight_is_read_in_its_stored_form_by_the_multiplication(kind, block, sm, code, tmp_path):
    plan = compiled(product(kind, block), tmp_path, sm=sm, ranges=RANGES)
    readers = [layer for layer in plan.layers if PlanTensor((K, N), code) in layer.constants]
    assert not written_out(plan, K * N)
    assert [PlanTensor((-1, N), "BFloat16") in layer.outputs for layer in readers] == [True]


@pytest.mark.parametrize(
    "kind, block, sm",
    [
        ("int8", 128, "SM89"),
        ("fp8", 128, "SM89"),
        ("fp8", 32, "SM120"),
        ("nvfp4", 16, "SM120"),
    ],
)
def test_these_weights_are_written_out_in_bf16_at_every_step(kind, block, sm, tmp_path):
    plan = compiled(product(kind, block), tmp_path, sm=sm, ranges=RANGES)
    assert written_out(plan, K * N) == [PlanTensor((K, N), "BFloat16")]


@pytest.mark.parametrize(
    "kind, block, sm, code", [("fp8", "channel", "SM89", "FP8"), ("nvfp4", 16, "SM120", "FP4E2M1")]
)
def test_with_activations_in_the_same_type_the_product_is_one_of_that_type(kind, block, sm, code, tmp_path):
    plan = compiled(product(kind, block, activations=kind), tmp_path, sm=sm, ranges=RANGES)
    (product_layer,) = [layer for layer in plan.layers if layer.kind == "gemm"]
    assert not written_out(plan, K * N)
    assert PlanTensor((K, N), code) in product_layer.constants
    assert PlanTensor((-1, K), code) in product_layer.inputs


@pytest.mark.parametrize("kind, block, sm", [("fp8", "channel", "SM86"), ("nvfp4", 16, "SM89")])
def test_an_architecture_without_the_type_has_no_plan(kind, block, sm, tmp_path):
    plan = compiled(product(kind, block), tmp_path, sm=sm, ranges=RANGES)
    assert not plan.size and "HW-specific datatypes" in plan.log
