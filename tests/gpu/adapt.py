"""Rewritings for what ONNX Runtime's CUDA provider lacks in bf16, so that what it can do is measured all the
same.

In 1.31 it has neither DequantizeLinear nor Resize with bfloat16, and its own fusion into MatMulNBits takes
only float and float16 scales. So `DequantizeLinear` + `MatMul` become com.microsoft `MatMulNBits` with the
same codes and scales, tables and kernels a product of codes and scales as in the fp32 twin, and Resize (which
copies numbers, so exactly) happens in float32.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir

from engines.bundle.seal import CONTENT, sealed_json
from star_export.graph.quantize import scale_apart

DOMAIN, INT8_BLOCK, WEIGHTS = "com.microsoft", 32, "adapted.data"


def fuse_dequantize(model: ir.Model) -> int:
    """Replace every DequantizeLinear in place and return how many there were.

    `MatMul(x, it)` becomes MatMulNBits: codes int4 [K,N] with scales [K/block,N] (axis 0), or int8 [K,N] with
    scales [N] (axis 1), or int8 [N,K] with scales [N] (axis 0) before a Transpose -> B uint8
    [N,blocks,block*bits/8] and scales [N,blocks]. Codes without a value stay without one. What is looked up
    or convolved is a product of codes and scales. Raises ValueError for other layouts.
    """
    found = [node for node in model.graph if node.op_type == "DequantizeLinear"]
    fused = 0
    for dequantize in found:
        codes, scales = dequantize.inputs[:2]
        scale_apart(model, dequantize)
        if products := _products(dequantize):
            packed, blocks, sizes = _for_matmulnbits(dequantize)
            model.graph.initializers.add(packed)
            model.graph.initializers.add(blocks)
        for multiply in products:
            node = ir.node(
                "MatMulNBits",
                [multiply.inputs[0], packed, blocks],
                sizes,
                domain=DOMAIN,
                name=f"{multiply.name}.nbits",
            )
            old, new = multiply.outputs[0], node.outputs[0]
            new.name, new.type, new.shape, old.name = old.name, old.type, old.shape, f"{old.name}.dense"
            model.graph.insert_before(multiply, node)
            old.replace_all_uses_with(new, replace_graph_outputs=True)
            model.graph.remove(multiply, safe=True)
            fused += 1
        if dequantize.graph is not None:
            for turn, _ in list(dequantize.outputs[0].uses()):
                model.graph.remove(turn, safe=True)
            model.graph.remove(dequantize, safe=True)
        for value in (codes, scales):
            if not value.uses():
                del model.graph.initializers[value.name]
    if fused:
        model.opset_imports[DOMAIN] = 1
    return len(found)


def _products(dequantize: ir.Node) -> list[ir.Node]:
    """The MatMuls of a DequantizeLinear that is still there, after a Transpose where its rows are outputs."""
    users = [user for user, _ in dequantize.outputs[0].uses()]
    if users and all(user.op_type == "Transpose" for user in users):
        users = [after for turn in users for after, _ in turn.outputs[0].uses()]
    if other := {user.op_type for user in users} - {"MatMul"}:
        raise ValueError(f"{dequantize.name}: no MatMulNBits stands for {', '.join(sorted(other))}")
    return users


def _for_matmulnbits(dequantize: ir.Node) -> tuple[ir.Value, ir.Value, dict[str, int]]:
    """Codes, scales and attributes of the MatMulNBits for the products of a DequantizeLinear."""
    codes, scales = dequantize.inputs[:2]
    turned = next(iter(dequantize.outputs[0].uses())).node.op_type == "Transpose"
    bits = {ir.DataType.INT4: 4, ir.DataType.INT8: 8}[codes.dtype]
    (k, n), axis = codes.shape[::-1] if turned else codes.shape, dequantize.attributes["axis"].value
    block = dequantize.attributes["block_size"].value if bits == 4 else INT8_BLOCK
    wanted, blocks = {(4, False): 0, (8, False): 1, (8, True): 0}.get((bits, turned)), math.ceil(k / block)
    if axis != wanted or bits == 4 and k % block or len(dequantize.inputs) > 2:
        raise ValueError(
            f"{dequantize.name}: no MatMulNBits has axis {axis} and blocks of {block} of {k} features"
        )
    packed = _value(
        f"{codes.name}.nbits",
        ir.DataType.UINT8,
        (n, blocks, block * bits // 8),
        codes,
        lambda array: packed_from_codes(array.T if turned else array, bits=bits, block=block),
    )
    steps = _value(
        f"{scales.name}.nbits",
        scales.dtype,
        (n, blocks),
        scales,
        lambda array: np.broadcast_to(array.reshape(-1, n).T, (n, blocks)),
    )
    return packed, steps, {"K": k, "N": n, "bits": bits, "block_size": block}


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
    """codes [K,N], signed -> uint8 [N, blocks, block*bits/8], offset by the zero point that MatMulNBits
    assumes (8 or 128). The last block of a row is filled up with zeros."""
    k, n = codes.shape
    whole = np.pad(codes.astype(np.int16), ((0, -k % block), (0, 0)))
    unsigned = (whole + 2 ** (bits - 1)).astype(np.uint8).T.reshape(n, -1, block)
    return unsigned if bits == 8 else unsigned[..., 0::2] | unsigned[..., 1::2] << 4


def adapted_bundle(bundle: Path, out: Path) -> Path:
    """A copy of a bundle with these rewritings in its graphs, and its manifest's hashes made anew.

    Their weights lie beside the bundle's own, which twins and tables read.
    """
    shutil.copytree(bundle, out)
    manifest = json.loads((out / "manifest.json").read_text())
    for graph in sorted(out.glob("*/model.onnx")):
        model = ir.load(graph)
        if not fuse_dequantize(model) + widen_resize(model):
            continue
        staged = graph.parent / "adapted"
        staged.mkdir()
        ir.save(model, staged / graph.name, external_data=WEIGHTS, size_threshold_bytes=1024)
        for file in sorted(staged.iterdir()):
            shutil.move(file, graph.parent / file.name)
            data = (graph.parent / file.name).read_bytes()
            manifest["files"][f"{graph.parent.name}/{file.name}"] = {
                "size": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
            }
        staged.rmdir()
    manifest.pop(CONTENT)
    (out / "manifest.json").write_text(sealed_json(manifest))
    return out


def _value(name: str, dtype: ir.DataType, shape: tuple[int, ...], source: ir.Value, change) -> ir.Value:
    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
    if source.const_value is not None:
        array = np.ascontiguousarray(change(source.const_value.numpy()))
        value.const_value = ir.Tensor(array, dtype=dtype, name=name)
    return value
