"""Traced graphs of linear layers, as the writer of weights takes them: empty, transposed initializers."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import torch

from star_export.graph import quantize
from star_export.graph.precisions import PRECISIONS, Precision

BF16, FLOAT = ir.DataType.BFLOAT16, ir.DataType.FLOAT
WEIGHTS = ("base_ar.layers.0.mlp.gate_proj.weight", "base_ar.layers.0.mlp.up_proj.weight")


class Stored:
    """A lazy tensor with numbers in it."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor, self.shape, self.dtype, self.loads = tensor, tensor.shape, tensor.dtype, 0

    def load(self) -> torch.Tensor:
        self.loads += 1
        return self.tensor


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def products_graph(features: int, outputs: int, names: tuple[str, ...] = WEIGHTS) -> ir.Model:
    """x [B,S,features] in float32 -> in bf16, times a weight of each name -> y0, y1, ... in float32."""
    x = ir.Value(name="x", type=ir.TensorType(FLOAT), shape=ir.Shape(["B", "S", features]))
    nodes = [ir.node("Cast", [x], {"to": BF16.value}, name="narrow")]
    narrow = _named(nodes[0], "narrow", BF16, features)
    weights, results = [], []
    for i, name in enumerate(names):
        weight = ir.Value(name=name, type=ir.TensorType(BF16), shape=ir.Shape([features, outputs]))
        weight.metadata_props[quantize.TRANSPOSED] = "1"
        weights.append(weight)
        product = ir.node("MatMul", [narrow, weight], name=f"product{i}")
        wide = ir.node(
            "Cast", [_named(product, f"p{i}", BF16, outputs)], {"to": FLOAT.value}, name=f"wide{i}"
        )
        results.append(_named(wide, f"y{i}", FLOAT, outputs))
        nodes += [product, wide]
    imports = {"": 24}
    graph = ir.Graph([x], results, nodes=nodes, initializers=weights, opset_imports=imports, name="products")
    return ir.Model(graph, ir_version=11)


def written(
    model: ir.Model, weights: dict[str, torch.Tensor], precision: str | Precision, path: Path
) -> Path:
    """Write `model` with `weights` [out, in] to `path`, and its fp32 twin beside it. Returns the twin."""
    found = PRECISIONS[precision] if isinstance(precision, str) else precision
    quantize.attach_weights(model, {name: Stored(tensor) for name, tensor in weights.items()}, found)
    ir.save(model, path, external_data="model.onnx.data", size_threshold_bytes=quantize.INLINE_BYTES)
    twin = path.parent / "twin.onnx"
    twin.write_bytes(ir.to_proto(quantize.twin_from_graph(ir.load(path))).SerializeToString())
    return twin


def _named(node: ir.Node, name: str, dtype: ir.DataType, width: int) -> ir.Value:
    (value,) = node.outputs
    value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(["B", "S", width])
    return value
