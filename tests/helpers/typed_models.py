"""ONNX models whose weights are fp8 or nvfp4, and what such models are made of."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from onnx import TensorProto, helper, numpy_helper

E4M3, E2M1 = ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn


def model_of(nodes, inputs, outputs, constants):
    """A model; inputs and outputs are name -> (type, shape), constants arrays or TensorProtos."""
    values = [
        [helper.make_tensor_value_info(name, *spec) for name, spec in side.items()]
        for side in (inputs, outputs)
    ]
    stored = [
        c if isinstance(c, TensorProto) else numpy_helper.from_array(np.asarray(c), name)
        for name, c in constants.items()
    ]
    return helper.make_model(
        helper.make_graph(nodes, "g", *values, stored),
        opset_imports=[helper.make_opsetid("", 24)],
        ir_version=11,
    )


def node(kind, inputs, output, **attributes):
    return helper.make_node(kind, inputs, [output], **attributes)


def stored(name, kind, array):
    """A TensorProto of FLOAT8E4M3FN or FLOAT4E2M1, in raw bytes as our files have them."""
    codes = array.reshape(-1).view(np.uint8)
    raw = codes if kind == TensorProto.FLOAT8E4M3FN else codes[0::2] & 15 | codes[1::2] << 4
    return helper.make_tensor(name, kind, array.shape, raw.tobytes(), raw=True)


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def fp8_model(codes, constant, scale):
    """x [3,32] -> x @ dequantised codes [32,16], in bf16."""
    nodes = [
        node("Cast", ["x"], "h", to=TensorProto.BFLOAT16),
        node("DequantizeLinear", ["c", "s"], "w", axis=1),
        node("MatMul", ["h", "w"], "p"),
        node("Cast", ["p"], "y", to=TensorProto.FLOAT),
    ]
    constant = stored("c", TensorProto.FLOAT8E4M3FN, codes) if constant is None else constant
    return model_of(
        nodes,
        {"x": (TensorProto.FLOAT, [3, 32])},
        {"y": (TensorProto.FLOAT, [3, 16])},
        {"c": constant, "s": numpy_helper.from_array(scale, "s")},
    )


def nvfp4_model(axis, seed=0):
    """(model, weight) in bf16: the model maps x [n,64] to x @ dequantised weight; the weight is [64,32] in
    float32.

    Blocks of 16 E2M1 numbers lie along `axis`; each has an E4M3 scale, and one float32 scale holds for all.
    """
    codes = (random(64, 32, seed=seed) * 2).clip(-6, 6).astype(E2M1)
    size = [64, 32]
    size[axis] //= 16
    scales, whole = (
        (np.abs(random(*size, seed=2)) * 50 + 1).astype(E4M3),
        np.array(0.0078125, ml_dtypes.bfloat16),
    )
    nodes = [
        node("Cast", ["x"], "h", to=TensorProto.BFLOAT16),
        node("DequantizeLinear", ["s", "g"], "scales"),
        node("DequantizeLinear", ["c", "scales"], "w", axis=axis, block_size=16),
        node("MatMul", ["h", "w"], "p"),
        node("Cast", ["p"], "y", to=TensorProto.FLOAT),
    ]
    constants = {
        "c": stored("c", TensorProto.FLOAT4E2M1, codes),
        "s": stored("s", TensorProto.FLOAT8E4M3FN, scales),
        "g": numpy_helper.from_array(whole, "g"),
    }
    weight = codes.astype(np.float32) * np.repeat(
        scales.astype(np.float32) * whole.astype(np.float32), 16, axis=axis
    )
    return model_of(
        nodes, {"x": (TensorProto.FLOAT, ["n", 64])}, {"y": (TensorProto.FLOAT, ["n", 32])}, constants
    ), weight


def dynamic_model():
    """x [3,64] in bf16, quantised to nvfp4 with the scales that TensorRT finds, and back: y [3,64]."""
    quantise = helper.make_node(
        "TRT_FP4DynamicQuantize",
        ["h", "g"],
        ["c", "s"],
        domain="trt",
        axis=-1,
        block_size=16,
        scale_type=int(TensorProto.FLOAT8E4M3FN),
    )
    nodes = [
        node("Cast", ["x"], "h", to=TensorProto.BFLOAT16),
        quantise,
        node("DequantizeLinear", ["s", "g"], "t"),
        node("DequantizeLinear", ["c", "t"], "d", axis=-1, block_size=16),
        node("Cast", ["d"], "y", to=TensorProto.FLOAT),
    ]
    ends = ({"x": (TensorProto.FLOAT, [3, 64])}, {"y": (TensorProto.FLOAT, [3, 64])})
    whole = numpy_helper.from_array(np.array(2.0**-11, ml_dtypes.bfloat16), "g")
    model = model_of(nodes, *ends, {"g": whole})
    model.opset_import.append(helper.make_opsetid("trt", 1))
    return model
