"""Rewritings for what ONNX Runtime's CUDA provider lacks in bf16, so that what it can do is measured all the
same.

In 1.31 it has neither DequantizeLinear nor Resize with bfloat16, and its own fusion into MatMulNBits takes
only float and float16 scales. So `DequantizeLinear` + `MatMul` become com.microsoft `MatMulNBits` with the
same codes and scales, and Resize (which copies numbers, so exactly) happens in float32.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir

DOMAIN, INT8_BLOCK = "com.microsoft", 32


def fuse_dequantize(model: ir.Model) -> int:
    """Replace every `MatMul(x, DequantizeLinear(codes, scales))` in place and return how many there were.

    codes int4 [K,N] with scales [K/block,N] (axis 0), or int8 [K,N] with scales [N] (axis 1) -> B uint8 [N,
    K/block, block*bits/8] and scales [N, K/block]. Codes without a value stay without one. Raises ValueError
    for other layouts.
    """
    count = 0
    for dequantize in [node for node in model.graph if node.op_type == "DequantizeLinear"]:
        codes, scales = dequantize.inputs[:2]
        bits = {ir.DataType.INT4: 4, ir.DataType.INT8: 8}[codes.dtype]
        (k, n), axis = codes.shape, dequantize.attributes["axis"].value
        block = dequantize.attributes["block_size"].value if bits == 4 else INT8_BLOCK
        if axis != (0 if bits == 4 else 1) or k % block or len(dequantize.inputs) > 2:
            raise ValueError(
                f"{dequantize.name}: no MatMulNBits has axis {axis} and blocks of {block} of {k} features"
            )
        packed = _value(
            f"{codes.name}.nbits",
            ir.DataType.UINT8,
            (n, k // block, block * bits // 8),
            codes,
            lambda array, block=block, bits=bits: packed_from_codes(array, bits=bits, block=block),
        )
        blocks = _value(
            f"{scales.name}.nbits",
            scales.dtype,
            (n, k // block),
            scales,
            lambda array, blocks=k // block: np.broadcast_to(
                array.reshape(-1, array.shape[-1]).T, (array.shape[-1], blocks)
            ),
        )
        model.graph.initializers.add(packed)
        model.graph.initializers.add(blocks)
        for use in tuple(dequantize.outputs[0].uses()):
            multiply = use.node
            fused = ir.node(
                "MatMulNBits",
                [multiply.inputs[0], packed, blocks],
                {"K": k, "N": n, "bits": bits, "block_size": block},
                domain=DOMAIN,
                name=f"{multiply.name}.nbits",
            )
            old, new = multiply.outputs[0], fused.outputs[0]
            new.name, new.type, new.shape, old.name = old.name, old.type, old.shape, f"{old.name}.dense"
            model.graph.insert_before(multiply, fused)
            old.replace_all_uses_with(new, replace_graph_outputs=True)
            model.graph.remove(multiply, safe=True)
            count += 1
        model.graph.remove(dequantize, safe=True)
        for value in (codes, scales):
            del model.graph.initializers[value.name]
    if count:
        model.opset_imports[DOMAIN] = 1
    return count


def widen_resize(model: ir.Model) -> int:
    """Put float32 around every Resize of bfloat16, in place, and return how many there were."""
    count = 0
    for node in [
        node
        for node in model.graph
        if node.op_type == "Resize" and node.inputs[0].dtype == ir.DataType.BFLOAT16
    ]:
        source, result = node.inputs[0], node.outputs[0]
        wide = ir.node("Cast", [source], {"to": ir.DataType.FLOAT.value}, name=f"{node.name}.widen")
        narrow = ir.node("Cast", [result], {"to": ir.DataType.BFLOAT16.value}, name=f"{node.name}.narrow")
        for value, dtype, suffix, shape in (
            (wide.outputs[0], ir.DataType.FLOAT, "wide", source.shape),
            (narrow.outputs[0], ir.DataType.BFLOAT16, "narrow", result.shape),
        ):
            value.name, value.dtype, value.shape = f"{result.name}.{suffix}", dtype, shape
        result.replace_all_uses_with(narrow.outputs[0])
        narrow.replace_input_with(0, result)
        node.replace_input_with(0, wide.outputs[0])
        result.type = ir.TensorType(ir.DataType.FLOAT)
        model.graph.insert_before(node, wide)
        model.graph.insert_after(node, narrow)
        count += 1
    return count


def packed_from_codes(codes: np.ndarray, *, bits: int, block: int) -> np.ndarray:
    """codes [K,N], signed -> uint8 [N, K/block, block*bits/8], offset by the zero point that MatMulNBits
    assumes (8 or 128)."""
    k, n = codes.shape
    unsigned = (codes.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8).T.reshape(n, k // block, block)
    return unsigned if bits == 8 else unsigned[..., 0::2] | unsigned[..., 1::2] << 4


def adapted_bundle(bundle: Path, out: Path) -> Path:
    """A copy of a bundle with these rewritings in its graphs, and its manifest's hashes made anew."""
    shutil.copytree(bundle, out)
    manifest = json.loads((out / "manifest.json").read_text())
    for graph in sorted(out.glob("*/model.onnx")):
        model = ir.load(graph)
        if not fuse_dequantize(model) + widen_resize(model):
            continue
        staged = graph.parent / "adapted"
        staged.mkdir()
        ir.save(model, staged / graph.name, external_data=f"{graph.name}.data", size_threshold_bytes=1024)
        for file in sorted(staged.iterdir()):
            shutil.move(file, graph.parent / file.name)
            data = (graph.parent / file.name).read_bytes()
            manifest["files"][f"{graph.parent.name}/{file.name}"] = {
                "size": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
            }
        staged.rmdir()
    (out / "manifest.json").write_text(json.dumps(manifest))
    return out


def _value(name: str, dtype: ir.DataType, shape: tuple[int, ...], source: ir.Value, change) -> ir.Value:
    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
    if source.const_value is not None:
        array = np.ascontiguousarray(change(source.const_value.numpy()))
        value.const_value = ir.Tensor(array, dtype=dtype, name=name)
    return value
