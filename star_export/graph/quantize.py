"""Weight formats: one graph, several writers.

A traced graph has the compute type bfloat16 and empty initializers. `set_precision` replaces the type, and
`attach_weights` gives every initializer a lazy tensor, which is read, transposed, rounded or quantised only
when the data file is written, one at a time. `rounded` applies the same rounding and returns float32, for the
reference that records golden tensors.

int8 and int4 are weight-only: symmetric blocks along the input features, round to nearest, scales in the
compute type, no zero point (ONNX `DequantizeLinear`). int4 has blocks of 128, 64 or 32. int8 has one block
over all input features, so one scale per output channel, because TensorRT for RTX fuses no smaller block: it
would write the whole weight out as bf16 at every step.
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

from ..components import COMPONENTS

BLOCK_SIZES = (128, 64, 32)  # of int4; the largest one that divides the input features is used
PIECE = 1 << 17  # numbers that are quantised at once
INLINE_BYTES = 1024  # smaller tensors are shapes and scalars, and stay in model.onnx
TRANSPOSED = "transposed"  # metadata of an initializer that stores the transpose of its checkpoint tensor


@dataclass(frozen=True)
class Precision:
    """`compute` is the type of activations, caches, scales and dense weights.

    `bits` is the width of weights in blocks, or None where all weights are dense.
    """

    compute: ir.DataType
    bits: int | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        return {
            ir.DataType.FLOAT: torch.float32,
            ir.DataType.FLOAT16: torch.float16,
            ir.DataType.BFLOAT16: torch.bfloat16,
        }[self.compute]

    @property
    def dtype_name(self) -> str:
        return str(self.torch_dtype).removeprefix("torch.")


PRECISIONS = {
    "fp32": Precision(ir.DataType.FLOAT),
    "fp16": Precision(ir.DataType.FLOAT16),
    "bf16": Precision(ir.DataType.BFLOAT16),
    "int8": Precision(ir.DataType.BFLOAT16, 8),
    "int4": Precision(ir.DataType.BFLOAT16, 4),
}


def block_size(name: str, shape: tuple[int, ...], precision: Precision) -> int | None:
    """The block size of the linear weight `name` [out, in] in input features; None if it stays dense."""
    row = COMPONENTS.get(name.partition(".")[0])
    if precision.bits is None or row is None or not row.quantized or len(shape) != 2:
        return None
    if precision.bits == 8:
        return shape[1]
    return next((size for size in BLOCK_SIZES if shape[1] % size == 0), None)


def stored_bytes(name: str, shape: tuple[int, ...], precision: Precision) -> int:
    """The bytes that weight `name` of this shape takes in a bundle, scales included."""
    width, numbers = precision.compute.itemsize, math.prod(shape)
    block = block_size(name, shape, precision)
    if block is None or precision.bits is None:
        return int(numbers * width)
    return numbers * precision.bits // 8 + int(numbers // block * width)


def blocks_from_weight(
    weight: torch.Tensor, *, bits: int, block: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a linear weight [out, in], as a checkpoint stores it, in blocks along the input features.

    Returns codes int8 [out, in] in +-(2^(bits-1)-1) and scales [out, in/block] in `dtype`.
    """
    found = [_blocks(rows, bits, block, dtype) for rows in _pieces(weight)]
    codes = torch.cat([codes.flatten(1).to(torch.int8) for codes, _ in found])
    return codes, torch.cat([scales for _, scales in found])


def weight_from_blocks(codes: torch.Tensor, scales: torch.Tensor, *, block: int) -> torch.Tensor:
    """Invert `blocks_from_weight`: returns float32 [out, in]."""
    return (codes.float().unflatten(1, (-1, block)) * scales.float()[..., None]).flatten(1)


def rounded(name: str, weight: torch.Tensor, precision: Precision) -> torch.Tensor:
    """Round `weight` as the bundle stores it, and widen it to float32; it keeps the checkpoint's shape."""
    block = block_size(name, tuple(weight.shape), precision)
    if block is None or precision.bits is None:
        return weight.to(precision.torch_dtype).float()
    result = torch.empty(weight.shape)
    for rows, out in zip(_pieces(weight), _pieces(result)):
        codes, scales = _blocks(rows, precision.bits, block, precision.torch_dtype)
        out.copy_(codes.mul_(scales.float()[..., None]).flatten(1))
    return result


def _pieces(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rows of `weight`, few enough for the processor's cache: each is read and written several times."""
    return weight.split(max(1, PIECE // weight.shape[1]))


def _blocks(
    rows: torch.Tensor, bits: int, block: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes in float32 [n, in/block, block] and scales [n, in/block] of some rows [n, in]."""
    top = 2 ** (bits - 1) - 1
    grouped = rows.to(torch.float32, copy=True).unflatten(1, (-1, block))
    scales = (grouped.abs().amax(-1) / top).to(dtype)
    safe = torch.where(scales == 0, 1, scales.float())
    return grouped.div_(safe[..., None]).round_().clamp_(-top, top), scales


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
        block = block_size(name, tuple(tensor.shape), precision) if transposed else None
        if block is None:
            value.const_value = _lazy(name, value.dtype, value.shape, _dense(tensor, transposed, precision))
        else:
            _insert_dequantize(model, value, tensor, precision, block)


def _dense(tensor: LazyTensor, transposed: bool, precision: Precision) -> Callable[[], torch.Tensor]:
    return lambda: (tensor.load().T.contiguous() if transposed else tensor.load()).to(precision.torch_dtype)


def _insert_dequantize(
    model: ir.Model, weight: ir.Value, tensor: LazyTensor, precision: Precision, block: int
) -> None:
    """Replace `weight` [K,N] by `weight.codes` and `weight.scales` with a DequantizeLinear after them."""
    bits, (n, k) = precision.bits, tensor.shape  # the checkpoint stores it transposed
    kind = ir.DataType.INT4 if bits == 4 else ir.DataType.INT8
    layout, shape = ({"axis": 1}, [n]) if bits == 8 else ({"axis": 0, "block_size": block}, [k // block, n])

    blocks = _Blocks(tensor, bits=bits, block=block, dtype=precision.torch_dtype)
    codes = ir.Value(name=f"{weight.name}.codes", type=ir.TensorType(kind), shape=ir.Shape([k, n]))
    codes.const_value = _lazy(codes.name, kind, codes.shape, blocks.codes)
    scales = ir.Value(
        name=f"{weight.name}.scales", type=ir.TensorType(precision.compute), shape=ir.Shape(shape)
    )
    scales.const_value = _lazy(
        scales.name, precision.compute, scales.shape, lambda: blocks.scales().reshape(shape)
    )
    node = ir.node("DequantizeLinear", [codes, scales], layout, name=f"{weight.name}.dequantize")
    dense = node.outputs[0]
    dense.name, dense.dtype, dense.shape = f"{weight.name}.dense", precision.compute, weight.shape
    model.graph.insert_before(next(iter(weight.uses())).node, node)
    weight.replace_all_uses_with(dense)
    del model.graph.initializers[weight.name]
    model.graph.initializers.add(codes)
    model.graph.initializers.add(scales)


class _Blocks:
    """Codes [in, out] and scales [in/block, out] of one weight, quantised once for both."""

    def __init__(self, tensor: LazyTensor, **options):
        self.tensor, self.options = tensor, options
        self.made: dict[int, torch.Tensor] = {}

    def codes(self) -> torch.Tensor:
        return self._take(0).T

    def scales(self) -> torch.Tensor:
        return self._take(1).T

    def _take(self, which: int) -> torch.Tensor:
        if which not in self.made:
            self.made = dict(enumerate(blocks_from_weight(self.tensor.load(), **self.options)))
        return self.made.pop(which)


def _lazy(name: str, dtype: ir.DataType, shape: ir.Shape, load: Callable[[], torch.Tensor]) -> ir.LazyTensor:
    def evaluate() -> ir.TensorProtocol:
        tensor = load().contiguous()
        if tuple(tensor.shape) != tuple(shape):
            raise AssertionError(
                f"{name}: the graph expects shape {tuple(shape)}, the checkpoint has {tuple(tensor.shape)}"
            )
        if dtype == ir.DataType.INT4:
            return ir.PackedTensor(_packed(tensor), dtype=dtype, shape=shape, name=name)
        return ir.Tensor(_numpy(tensor, dtype), dtype=dtype, name=name)

    return ir.LazyTensor(evaluate, dtype=dtype, shape=shape, name=name)


def _numpy(tensor: torch.Tensor, dtype: ir.DataType) -> np.ndarray:
    if dtype == ir.DataType.BFLOAT16:
        return tensor.to(torch.bfloat16).view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _packed(codes: torch.Tensor) -> np.ndarray:
    """Two codes per byte, the first in the lower half, as ONNX stores int4."""
    pairs = codes.view(torch.uint8).view(-1, 2)
    return (pairs[:, 0] & 15 | pairs[:, 1] << 4).numpy()


def twin_from_graph(model: ir.Model) -> ir.Model:
    """Turn a stored 16-bit graph into its fp32 twin: it casts the same rounded weights to float32.

    Its attention is written for the CPU.
    """
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
    return model
