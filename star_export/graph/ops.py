"""`star::KVCacheAttention`, our one operation: a torch custom op that runs, and an ONNX local function.

Eager mode executes the op and the exporter translates it to one ONNX node, so the traced module *is* the
reference. The function's body is standard opset 24, so an executor without a plugin of this name inlines it.
"""

from __future__ import annotations

import functools

import onnx
import onnx_ir as ir
import torch
from onnx import defs, helper

from reference.decoder import kv_cache_attention as reference_attention

DOMAIN, NAME, VERSION, OPSET = "star", "KVCacheAttention", 1, 24
_INPUTS = ("query", "key", "value", "past_key", "past_value", "write_indices", "mask")
_OUTPUTS = ("output", "present_key", "present_value")
PLUGIN_FIELDS = (
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "cache_type",
    "scale",
    "plugin_version",
    "plugin_namespace",
)


@torch.library.custom_op(f"{DOMAIN}::kv_cache_attention", mutates_args=())
def kv_cache_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    write_indices: torch.Tensor,
    mask: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Write `key` and `value` at `write_indices`, then attend under `mask`.

    query [B,h,S,D], key and value [B,KV,S,D], past_key and past_value [B,KV,C,D], write_indices [B],
    mask bool [B,1,S,C] -> output [B,h,S,D], present_key and present_value [B,KV,C,D].
    Functional: the past keeps its values.
    """
    return reference_attention(query, key, value, past_key.clone(), past_value.clone(), write_indices, mask)


@kv_cache_attention.register_fake
def _(query, key, value, past_key, past_value, write_indices, mask):
    return torch.empty_like(query), torch.empty_like(past_key), torch.empty_like(past_value)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply ONNX `RotaryEmbedding` (opset 23) in halves: x [B,h,S,D], cos and sin [B,S,D/2] -> [B,h,S,D]."""
    return torch.onnx.ops.rotary_embedding(x, cos, sin)


@functools.cache
def translation_table() -> dict:
    """The `custom_translation_table` of `torch.onnx.export`.

    Registers the ONNX schema of the op, once per process.
    """
    from onnxscript import values

    formal, kinds = defs.OpSchema.FormalParameter, defs.OpSchema.AttrType
    kind = (
        dict.fromkeys(PLUGIN_FIELDS, kinds.INT)
        | {"scale": kinds.FLOAT}
        | dict.fromkeys(PLUGIN_FIELDS[-2:], kinds.STRING)
    )
    types = dict.fromkeys(_INPUTS, "T") | {"write_indices": "tensor(int64)", "mask": "tensor(bool)"}
    defs.register_schema(
        defs.OpSchema(
            NAME,
            DOMAIN,
            VERSION,
            inputs=[formal(n, types[n]) for n in _INPUTS],
            outputs=[formal(n, "T") for n in _OUTPUTS],
            type_constraints=[
                ("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "compute type")
            ],
            attributes=[
                defs.OpSchema.Attribute(n, kind[n], "for the plugin", required=False) for n in PLUGIN_FIELDS
            ],
        )
    )
    opset = values.Opset(DOMAIN, VERSION)

    def translate(query, key, value, past_key, past_value, write_indices, mask):
        return opset.KVCacheAttention(query, key, value, past_key, past_value, write_indices, mask)

    return {torch.ops.star.kv_cache_attention.default: translate}


def function_body() -> ir.Function:
    """The ONNX local function: `TensorScatter` into both caches, then `Attention` under the explicit mask."""
    seen = ["present_key", "present_value", "mask"]
    return _function([_node("Attention", ["query", *seen], "output", name="attend")])


def cpu_function_body(*, heads: int, kv_heads: int) -> ir.Function:
    """The same operation for ONNX Runtime on the CPU, which would copy each key head once per query head, and
    multiply by all slots of the cache.

    The query heads of a key head attend as positions of it, and only to the slots up to the last one that any
    row has written. The mask must show none after it, as the traced graphs' does not.
    """
    constants = {
        "two": [2],  # the axis of the slots
        "three": [3],
        "first": [0],
        "grouped_shape": [0, kv_heads, -1, 0],  # [B,h,S,D] -> [B,KV,h/KV*S,D]
        "copies": [1, heads // kv_heads, 1, 1],
        "rows_shape": [0, 1, -1, 0],  # [B,h/KV,S,n] -> [B,1,h/KV*S,n]
        "shape": [0, heads, -1, 0],
    }
    written = "written_key", "written_value"
    return _function(
        [
            *(
                helper.make_node("Constant", [], [name], name=name, value_ints=numbers)
                for name, numbers in constants.items()
            ),
            _node("Shape", ["key"], "new", start=2, end=3),
            _node("ReduceMax", ["write_indices"], "last", keepdims=1),
            _node("Add", ["last", "new"], "end"),
            _node("Slice", ["present_key", "first", "end", "two"], written[0]),
            _node("Slice", ["present_value", "first", "end", "two"], written[1]),
            _node("Slice", ["mask", "first", "end", "three"], "written_mask"),
            _node("Expand", ["written_mask", "copies"], "copied"),
            _node("Reshape", ["copied", "rows_shape"], "rows"),
            _node("Reshape", ["query", "grouped_shape"], "grouped"),
            _node("Attention", ["grouped", *written, "rows"], "attended", name="attend"),
            _node("Reshape", ["attended", "shape"], "output"),
        ]
    )


def _node(op: str, inputs: list[str], output: str, *, name: str = "", **attributes) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [output], name=name or output, **attributes)


def _function(attend: list[onnx.NodeProto]) -> ir.Function:
    """The local function that writes into both caches, and then attends."""
    written = {"axis": -2, "mode": "linear"}
    nodes = [
        _node("TensorScatter", [past, new, "write_indices"], present, name=f"write_{new}", **written)
        for past, new, present in (
            ("past_key", "key", "present_key"),
            ("past_value", "value", "present_value"),
        )
    ]
    return ir.serde.deserialize_function(
        helper.make_function(
            DOMAIN,
            NAME,
            list(_INPUTS),
            list(_OUTPUTS),
            nodes + attend,
            [helper.make_opsetid("", OPSET)],
            doc_string="Write new keys and values into the caches in place, "
            "then attend over what the mask shows.",
        )
    )
