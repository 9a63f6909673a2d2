"""Noise for the graphs of released sizes: weights that only have to have the right sizes and keep activations
finite.

All layers share one layer's noise in the file, so gigabytes of weights are made in seconds; ONNX Runtime
gives every initializer memory of its own, so a step still reads each layer's weights from memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir

from star_export.graph.precisions import Precision
from star_export.graph.quantize import TRANSPOSED, attach_weights, set_precision
from star_export.graph.repeat import in_layer, layer_of

from .adapt import fuse_dequantize
from .graphs import WEIGHTS

ALIGNMENT, BLOCK = (
    4096,
    4_000_037,
)  # bytes; numbers before a large weight repeats itself, no multiple of a row
DTYPES = {
    ir.DataType.FLOAT: np.float32,
    ir.DataType.FLOAT16: np.float16,
    ir.DataType.BFLOAT16: ml_dtypes.bfloat16,
}


@dataclass(frozen=True)
class NoiseGraph:
    """A graph on disk with weights. `read_bytes`: what a step reads of them, which is all but tables that
    rows are gathered from."""

    path: Path
    read_bytes: int
    weight_bytes: int


def write_noise(model: ir.Model, folder: Path, *, precision: Precision, fused: bool = False) -> NoiseGraph:
    """Give a graph with empty initializers weights of noise in `precision` and write it to `folder`; `fused`
    replaces DequantizeLinear and MatMul by MatMulNBits."""
    set_precision(model, precision.compute)
    shapes = {
        name: _Shape(tuple(value.shape)[::-1] if TRANSPOSED in value.metadata_props else tuple(value.shape))
        for name, value in model.graph.initializers.items()
        if value.const_value is None
    }
    attach_weights(model, shapes, precision)
    weights = [
        value for value in model.graph.initializers.values() if isinstance(value.const_value, ir.LazyTensor)
    ]
    for value in weights:
        value.const_value = None
    if fused:
        fuse_dequantize(model)
        weights = [value for value in model.graph.initializers.values() if value.const_value is None]
    folder.mkdir(parents=True, exist_ok=True)
    places: dict[tuple, int] = {}
    with open(folder / WEIGHTS, "wb") as file:
        for value in weights:
            key = (
                value.name if layer_of(value.name) is None else in_layer(value.name, 0),
                value.dtype,
                tuple(value.shape),
            )
            if key not in places:
                file.seek(math.ceil(file.tell() / ALIGNMENT) * ALIGNMENT)
                places[key] = file.tell()
                file.write(noise(value).tobytes())
            value.const_value = ir.ExternalTensor(
                WEIGHTS, places[key], _bytes(value), value.dtype, shape=value.shape, name=value.name
            )
    (folder / "model.onnx").write_bytes(ir.to_proto(model).SerializeToString())
    gathered = {node.inputs[0] for node in model.graph if node.op_type == "Gather"}
    return NoiseGraph(
        folder / "model.onnx",
        sum(_bytes(value) for value in weights if value not in gathered),
        sum(_bytes(value) for value in weights),
    )


def noise(value: ir.Value) -> np.ndarray:
    """Numbers for one weight, in memory's layout: codes uniform, norms near 1, scales and matrices such that
    a product keeps its size."""
    random, shape = np.random.default_rng(len(value.name)), tuple(value.shape)
    if value.dtype not in DTYPES:
        return random.integers(0, 256, _bytes(value), np.uint8)
    fan_in = _fan_in(value)
    if value.name.endswith(("scales", "scales.nbits")):
        top = 4.6 if _bits(value) == 4 else 74  # standard deviation of the codes
        numbers = random.uniform(0.9, 1.1, shape) / (top * math.sqrt(fan_in))
    elif len(shape) == 1:
        numbers = 0.02 * random.standard_normal(shape) + (not value.name.endswith("bias"))
    else:
        block = random.standard_normal(min(math.prod(shape), BLOCK), np.float32) / np.float32(
            math.sqrt(fan_in)
        )
        return np.resize(block.astype(DTYPES[value.dtype]), shape)
    return numbers.astype(DTYPES[value.dtype])


def _fan_in(value: ir.Value) -> int:
    """The inner size of the product that this weight, or the weight of these scales, takes part in."""
    node = next(iter(value.uses())).node
    return (
        node.attributes["K"].value
        if "K" in node.attributes
        else tuple(node.inputs[0].shape)[0]
        if len(node.inputs) > 1 and node.op_type == "DequantizeLinear"
        else tuple(value.shape)[0]
    )


def _bits(value: ir.Value) -> int:
    node = next(iter(value.uses())).node
    return (
        node.attributes["bits"].value
        if "bits" in node.attributes
        else 4
        if node.inputs[0].dtype == ir.DataType.INT4
        else 8
    )


def _bytes(value: ir.Value) -> int:
    return math.ceil(math.prod(value.shape) * value.dtype.itemsize)


@dataclass(frozen=True)
class _Shape:
    """Stands for a checkpoint's tensor where only the shape is asked for."""

    shape: tuple[int, ...]

    def load(self):
        raise AssertionError("noise is not loaded")
