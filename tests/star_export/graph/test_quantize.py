"""Weights in graphs: what is stored is what the reference is given, and ONNX Runtime reads it so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from star_export.graph import quantize
from star_export.graph.formats import INT4, Encoded
from star_export.graph.precisions import PRECISIONS, Precision

WEIGHT = "base_ar.layers.0.mlp.down_proj.weight"


class Stored:
    """A lazy tensor with numbers in it."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor, self.shape, self.dtype, self.loads = tensor, tensor.shape, tensor.dtype, 0

    def load(self) -> torch.Tensor:
        self.loads += 1
        return self.tensor


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def linear_graph(inputs: int, outputs: int) -> ir.Model:
    """x [2, in] float32 -> bfloat16 -> MatMul with an empty, transposed weight -> float32."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2, inputs]))
    weight = ir.Value(
        name=WEIGHT, type=ir.TensorType(ir.DataType.BFLOAT16), shape=ir.Shape([inputs, outputs])
    )
    weight.metadata_props[quantize.TRANSPOSED] = "1"
    narrow = ir.node("Cast", [x], {"to": ir.DataType.BFLOAT16.value})
    product = ir.node("MatMul", [narrow.outputs[0], weight])
    wide = ir.node("Cast", [product.outputs[0]], {"to": ir.DataType.FLOAT.value})
    for node, name in ((narrow, "narrow"), (product, "product"), (wide, "y")):
        node.outputs[0].name = name
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT if name == "y" else ir.DataType.BFLOAT16)
    wide.outputs[0].shape = ir.Shape([2, outputs])
    graph = ir.Graph(
        [x],
        [wide.outputs[0]],
        nodes=[narrow, product, wide],
        initializers=[weight],
        opset_imports={"": 24},
        name="linear",
    )
    return ir.Model(graph, ir_version=11)


def one_operator(kind: str, weights: dict[str, tuple[int, ...]], given: np.ndarray) -> ir.Model:
    """`given` as x -> bfloat16 -> the operator with empty weights -> y in float32."""
    narrow = ir.DataType.BFLOAT16
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(given.shape))
    empty = [
        ir.Value(name=name, type=ir.TensorType(narrow), shape=ir.Shape(shape))
        for name, shape in weights.items()
    ]
    cast = ir.node("Cast", [x], {"to": narrow.value})
    made = ir.node(kind, [*cast.outputs, *empty], {"transB": 1} if kind == "Gemm" else {}, name="made")
    wide = ir.node("Cast", made.outputs, {"to": ir.DataType.FLOAT.value})
    nodes = [cast, made, wide]
    for node, name in zip(nodes, ("narrow", "made", "y")):
        node.outputs[0].name, node.outputs[0].type = name, ir.TensorType(narrow)
    wide.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [x], wide.outputs, nodes=nodes, initializers=empty, opset_imports={"": 24}, name="one operator"
    )
    return ir.Model(graph, ir_version=11)


def saved(model: ir.Model, path: Path, *, twin: bool) -> Path:
    """The file of a graph, or of its twin."""
    ir.save(model, path / "model.onnx", external_data="model.onnx.data", size_threshold_bytes=0)
    if not twin:
        return path / "model.onnx"
    model = quantize.twin_from_graph(ir.load(path / "model.onnx"))
    (path / "twin.onnx").write_bytes(ir.to_proto(model).SerializeToString())
    return path / "twin.onnx"


def computed(path: Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    # int8 arithmetic is this library's default
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "int4"])
def test_the_stored_graph_multiplies_by_the_rounded_weight(precision: str, tmp_path: Path) -> None:
    stored = Stored(random(48, 96))
    model = linear_graph(96, 48)
    quantize.set_precision(model, PRECISIONS[precision].compute)
    quantize.attach_weights(model, {WEIGHT: stored}, PRECISIONS[precision])
    assert stored.loads == 0, "weights are read while the file is written, not before"
    x = np.random.default_rng(0).standard_normal((2, 96), dtype=np.float32)
    y = computed(saved(model, tmp_path, twin=precision != "fp32"), {"x": x})
    assert stored.loads == 1, "a weight is read once, for its codes and its scales"
    expected = x @ PRECISIONS[precision].rounded(WEIGHT, stored.tensor).numpy().T
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    if precision != "fp32":
        assert np.abs(expected - x @ stored.tensor.numpy().T).max() > 1e-4, (
            "rounding must be visible, or this test shows nothing"
        )


# A precision whose quantised graph ONNX Runtime runs on the CPU without a twin.
WIDE_INT8 = Precision(ir.DataType.FLOAT, PRECISIONS["int8"].formats)
HEAD, BIAS, KERNEL = "image_head.weight", "image_head.bias", "vq_decoder.conv_in.weight"
X = np.random.default_rng(1).standard_normal((2, 4, 4, 4), dtype=np.float32)


def product(weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(torch.from_numpy(X).flatten(1), weight, bias)


@pytest.mark.parametrize("twin", [False, True])
@pytest.mark.parametrize(
    ("kind", "weight", "feeds", "expected", "operators"),
    [
        ("Gemm", HEAD, {"x": X.reshape(2, -1)}, product, ["Transpose", "MatMul", "Add"]),
        ("Conv", KERNEL, {"x": X}, lambda w, _: torch.conv2d(torch.from_numpy(X), w), ["Conv"]),
    ],
    ids=["Gemm", "Conv"],
)
def test_a_weight_that_keeps_its_layout_is_scaled_row_by_row(
    kind, weight, feeds, expected, operators, twin: bool, tmp_path: Path
) -> None:
    precision = PRECISIONS["int8"] if twin else WIDE_INT8
    tensors = {weight: Stored(random(48, 4, 3, 3) if kind == "Conv" else random(48, 64))}
    if kind == "Gemm":
        tensors[BIAS] = Stored(random(48))
    model = one_operator(kind, {name: t.shape for name, t in tensors.items()}, feeds["x"])
    quantize.set_precision(model, precision.compute)
    quantize.attach_weights(model, tensors, precision)
    found = [node.op_type for node in model.graph if node.op_type != "Cast"]
    assert found == ["DequantizeLinear", *operators]
    (dequantize,) = (node for node in model.graph if node.op_type == "DequantizeLinear")
    assert dequantize.attributes["axis"].value == 0 and dequantize.inputs[1].shape == (48,)
    got = computed(saved(model, tmp_path, twin=twin), feeds)
    stored = [precision.rounded(name, t.tensor) for name, t in tensors.items()]
    wanted = expected(*stored, *[None] * (2 - len(stored))).numpy()
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    exact = expected(*(t.tensor for t in tensors.values()), *[None] * (2 - len(stored))).numpy()
    assert np.abs(wanted - exact).max() > 1e-3


def test_the_twin_keeps_the_dequantize_of_a_product_which_onnx_runtime_fuses(tmp_path: Path) -> None:
    """Of the kernel of a convolution, it would multiply the stored numbers at every call."""
    for kind, shape, given, left in (
        ("Gemm", (48, 64), X.reshape(2, -1), 1),
        ("Conv", (48, 4, 3, 3), X, 0),
    ):
        tensors = {HEAD if kind == "Gemm" else KERNEL: Stored(random(*shape))}
        model = one_operator(kind, dict.fromkeys(tensors, shape), given)
        quantize.attach_weights(model, tensors, PRECISIONS["int8"])
        twin = ir.load(saved(model, tmp_path, twin=True))
        assert [node.op_type for node in twin.graph].count("DequantizeLinear") == left


def test_a_quantised_clone_leaves_the_graph_that_it_came_from_alone() -> None:
    """Every precision starts from a clone of one traced graph."""
    traced = one_operator("Gemm", {HEAD: (48, 64)}, X.reshape(2, -1))
    quantised = traced.clone()
    quantize.attach_weights(quantised, {HEAD: Stored(random(48, 64))}, PRECISIONS["int4"])
    assert [node.op_type for node in traced.graph] == ["Cast", "Gemm", "Cast"]
    assert set(traced.graph.initializers) == {HEAD}


def test_codes_that_were_chosen_are_stored_as_they_are(tmp_path: Path) -> None:
    """They are not those of rounding to nearest."""
    chosen = INT4.encode(random(48, 96), torch.bfloat16)
    chosen = Encoded(-chosen.codes.flip(0), chosen.scales.flip(1) * 2)
    load = lambda: chosen.decode()  # noqa: E731
    tensor = quantize.StoredTensor(WEIGHT, (48, 96), torch.float32, tmp_path, load, lambda: chosen)
    model = linear_graph(96, 48)
    quantize.attach_weights(model, {WEIGHT: tensor}, PRECISIONS["int4"])
    x = np.random.default_rng(0).standard_normal((2, 96), dtype=np.float32)
    expected = x @ chosen.decode().numpy().T
    y = computed(saved(model, tmp_path, twin=True), {"x": x})
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_int4_halves_int8(tmp_path) -> None:
    sizes = {}
    for precision in ("int8", "int4"):
        model = linear_graph(256, 64)
        quantize.attach_weights(model, {WEIGHT: Stored(torch.randn(64, 256))}, PRECISIONS[precision])
        sizes[precision] = sum(
            v.const_value.nbytes for n, v in model.graph.initializers.items() if n.endswith(".codes")
        )
    assert sizes == {"int8": 256 * 64, "int4": 256 * 64 // 2}
