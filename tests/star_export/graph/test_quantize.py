"""Weight formats: what is stored is what the reference is given, and ONNX Runtime reads it so."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch

from star_export.graph import quantize
from star_export.graph.precisions import PRECISIONS

WEIGHT = "base_ar.layers.0.mlp.down_proj.weight"


class Stored:
    """A lazy tensor with numbers in it."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor, self.shape, self.dtype, self.loads = tensor, tensor.shape, tensor.dtype, 0

    def load(self) -> torch.Tensor:
        self.loads += 1
        return self.tensor


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


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [32, 64])
def test_blocks_round_to_nearest_and_keep_within_half_a_step(bits: int, block: int) -> None:
    weight = torch.randn(24, 128, generator=torch.Generator().manual_seed(bits))
    codes, scales = quantize.blocks_from_weight(weight, bits=bits, block=block, dtype=torch.float32)
    restored = quantize.weight_from_blocks(codes, scales, block=block)
    step = scales.repeat_interleave(block, 1)
    assert codes.dtype == torch.int8 and int(codes.abs().max()) == 2 ** (bits - 1) - 1
    assert bool(((restored - weight).abs() <= step / 2 * (1 + 1e-6)).all())


def test_a_block_of_zeros_stays_zero() -> None:
    codes, scales = quantize.blocks_from_weight(torch.zeros(3, 64), bits=4, block=32, dtype=torch.bfloat16)
    assert not codes.any() and not quantize.weight_from_blocks(codes, scales, block=32).any()


@pytest.mark.parametrize(
    "name,shape,precision,expected",
    [
        (WEIGHT, (64, 256), "int4", 128),
        (WEIGHT, (64, 160), "int4", 32),
        (WEIGHT, (64, 40), "int4", None),
        (WEIGHT, (64, 160), "int8", 160),
        (WEIGHT, (64, 160), "bf16", None),
        ("image_head.weight", (64, 256), "int4", None),
        ("base_ar.norm.weight", (64,), "int4", None),
        ("vision_encoder.blocks.0.mlp.up_proj.weight", (64, 64), "int4", None),
    ],
)
def test_only_linear_weights_of_the_decoders_are_quantised(name, shape, precision, expected) -> None:
    assert quantize.block_size(name, shape, PRECISIONS[precision]) == expected


@pytest.mark.parametrize("precision", list(PRECISIONS))
def test_the_stored_graph_multiplies_by_the_rounded_weight(precision: str, tmp_path) -> None:
    import onnxruntime as ort

    stored = Stored(torch.randn(48, 96, generator=torch.Generator().manual_seed(3)))
    model = linear_graph(96, 48)
    quantize.set_precision(model, PRECISIONS[precision].compute)
    quantize.attach_weights(model, {WEIGHT: stored}, PRECISIONS[precision])
    assert stored.loads == 0, "weights are read while the file is written, not before"
    path = tmp_path / "model.onnx"
    ir.save(model, path, external_data="model.onnx.data", size_threshold_bytes=0)
    if precision != "fp32":
        twin = quantize.twin_from_graph(ir.load(path))
        path = tmp_path / "twin.onnx"
        path.write_bytes(ir.to_proto(twin).SerializeToString())
    options = ort.SessionOptions()
    options.add_session_config_entry(
        "session.disable_quant_qdq", "1"
    )  # int8 arithmetic is this library's default
    x = np.random.default_rng(0).standard_normal((2, 96), dtype=np.float32)
    (y,) = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    expected = x @ quantize.rounded(WEIGHT, stored.tensor, PRECISIONS[precision]).numpy().T
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    if precision != "fp32":
        assert np.abs(expected - x @ stored.tensor.numpy().T).max() > 1e-4, (
            "rounding must be visible, or this test shows nothing"
        )


def test_int4_halves_int8(tmp_path) -> None:
    sizes = {}
    for precision in ("int8", "int4"):
        model = linear_graph(256, 64)
        quantize.attach_weights(model, {WEIGHT: Stored(torch.randn(64, 256))}, PRECISIONS[precision])
        sizes[precision] = sum(
            v.const_value.nbytes for n, v in model.graph.initializers.items() if n.endswith(".codes")
        )
    assert sizes == {"int8": 256 * 64, "int4": 256 * 64 // 2}
