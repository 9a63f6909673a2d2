"""`star::KVCacheAttention` is one operation: torch's op, the ONNX function and the numpy definition agree."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from engines.runtime.kv_cache import kv_cache_attention as defined
from star_export.graph import ops

RNG = np.random.default_rng(5)
INPUTS = ("query", "key", "value", "past_key", "past_value", "write_indices", "mask")
SHAPES = [  # rows, heads, kv heads, new, capacity, head dim, write indices
    (1, 2, 2, 1, 8, 16, (0,)),
    (2, 4, 2, 5, 12, 16, (0, 0)),
    (2, 4, 1, 3, 9, 32, (6, 2)),
    (3, 6, 3, 1, 7, 64, (6, 0, 3)),
    (2, 14, 2, 4, 16, 128, (12, 5)),
]


def arrays(rows, heads, kv_heads, new, capacity, head_dim, writes) -> dict[str, np.ndarray]:
    def normal(*shape):
        return RNG.standard_normal(shape, dtype=np.float32)

    writes = np.array(writes)
    visible = np.arange(capacity) <= writes[:, None, None] + np.arange(new)[None, :, None]
    return {
        "query": normal(rows, heads, new, head_dim),
        "key": normal(rows, kv_heads, new, head_dim),
        "value": normal(rows, kv_heads, new, head_dim),
        "past_key": normal(rows, kv_heads, capacity, head_dim),
        "past_value": normal(rows, kv_heads, capacity, head_dim),
        "write_indices": writes,
        "mask": visible[:, None],
    }


def cpu_body(feeds: dict[str, np.ndarray]) -> ir.Function:
    return ops.cpu_function_body(heads=feeds["query"].shape[1], kv_heads=feeds["key"].shape[1])


def onnx_function(feeds: dict[str, np.ndarray], body: ir.Function) -> list[np.ndarray]:
    """One call of the local function with this body, inlined by ONNX Runtime."""
    kinds = {"write_indices": TensorProto.INT64, "mask": TensorProto.BOOL}
    inputs = [
        helper.make_tensor_value_info(n, kinds.get(n, TensorProto.FLOAT), feeds[n].shape) for n in INPUTS
    ]
    outputs = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, feeds[s].shape)
        for n, s in (("output", "query"), ("present_key", "past_key"), ("present_value", "past_value"))
    ]
    node = helper.make_node(ops.NAME, list(INPUTS), [o.name for o in outputs], domain=ops.DOMAIN)
    model = helper.make_model(
        helper.make_graph([node], "call", inputs, outputs),
        functions=[ir.to_proto(body)],
        opset_imports=[helper.make_opsetid("", ops.OPSET), helper.make_opsetid(ops.DOMAIN, 1)],
        ir_version=11,
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    ).run(None, feeds)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_onnx_and_numpy_agree(shape) -> None:
    feeds = arrays(*shape)
    torch_op = [
        t.numpy() for t in ops.kv_cache_attention(*(torch.from_numpy(feeds[n].copy()) for n in INPUTS))
    ]
    numpy_op = defined(*(feeds[n].copy() for n in INPUTS[:-1]))
    for found in (torch_op, *(onnx_function(feeds, body) for body in (ops.function_body(), cpu_body(feeds)))):
        for ours, expected in zip(found, numpy_op, strict=True):
            np.testing.assert_allclose(ours, expected, atol=2e-6)


def test_on_the_cpu_no_slot_is_read_after_the_last_written_one() -> None:
    feeds = arrays(2, 4, 2, 2, 9, 16, (4, 4))
    expected, *_ = onnx_function(feeds, ops.function_body())
    for cache in ("past_key", "past_value"):
        feeds[cache][:, :, 6:] = np.nan
    output, *_ = onnx_function(feeds, cpu_body(feeds))
    np.testing.assert_allclose(output, expected, atol=2e-6)


def test_the_torch_op_leaves_the_past_as_it_was() -> None:
    feeds = {n: torch.from_numpy(a) for n, a in arrays(*SHAPES[1]).items()}
    before = feeds["past_key"].clone()
    _, present_key, _ = ops.kv_cache_attention(*(feeds[n] for n in INPUTS))
    assert torch.equal(feeds["past_key"], before) and not torch.equal(present_key, before)


def test_the_torch_op_is_well_formed() -> None:
    torch.library.opcheck(
        torch.ops.star.kv_cache_attention.default,
        tuple(torch.from_numpy(arrays(*SHAPES[2])[n]) for n in INPUTS),
        test_utils=("test_schema", "test_faketensor"),
    )
