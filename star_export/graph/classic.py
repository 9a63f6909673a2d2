"""The classic dialect, for TensorRT 10.0 to 10.14: primitive operators, and a plugin for the cache.

The parser of these versions knows no cache, attention, rotary embedding or RMS norm. The stored modern graph
is rewritten, not traced again. So only the nodes below differ, both graphs share the files of weights and
quantisation, and their equality is easy to test. Norms, rotary embeddings, running sums and attention become
primitives of opset 20 (21 where int4 blocks need it). `star::KVCacheAttention` keeps its nodes but loses its
body, so that the parser looks for the plugin of that name; its nodes get the plugin's fields.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from engines import plugins

from .ops import DOMAIN, NAME

OPSET, OPSET_INT4 = 20, 21


def classic_from_graph(model: ir.Model, *, cache: str = "element") -> ir.Model:
    """Rewrite a stored modern graph to the classic dialect, in place.

    `cache` is `element` (the compute type) or `int8`. Raises AssertionError for a node whose form the rewrite
    does not support.
    """
    for node in list(model.graph):
        if rewrite := _REWRITES.get((node.domain, node.op_type)):
            if node.op_type == NAME:
                _call_plugin(node, cache)
            else:
                _replace(model.graph, node, rewrite)
    model.functions.clear()
    blocks = any(v.dtype == ir.DataType.INT4 for v in model.graph.initializers.values())
    model.opset_imports[""] = OPSET_INT4 if blocks else OPSET
    return model


class _Nodes:
    """Makes nodes in front of the one that they replace, and names them after it."""

    def __init__(self, graph: ir.Graph, node: ir.Node):
        self.graph, self.node, self.count = graph, node, 0

    def __call__(
        self, op: str, *inputs: ir.Value, outputs: int = 1, dtype: ir.DataType | None = None, **attributes
    ):
        name = f"{self.node.name}.{self.count}"
        self.count += 1
        node = ir.node(op, list(inputs), attributes, num_outputs=outputs, name=name)
        for i, value in enumerate(node.outputs):
            value.name, value.dtype = f"{name}.{i}", dtype or _known(inputs[0])
        self.graph.insert_before(self.node, node)
        return node.outputs[0] if outputs == 1 else tuple(node.outputs)

    def constant(self, values, dtype: ir.DataType) -> ir.Value:
        name = f"{self.node.name}.constant.{self.count}"
        self.count += 1
        array = np.asarray(values).astype(dtype.numpy())
        tensor = ir.tensor(array, dtype=dtype, name=name)
        value = ir.Value(
            name=name, type=ir.TensorType(dtype), shape=ir.Shape(array.shape), const_value=tensor
        )
        self.graph.initializers.add(value)
        return value


def _replace(graph: ir.Graph, node: ir.Node, rewrite: Callable[[_Nodes, ir.Node], ir.Value]) -> None:
    old, new = node.outputs[0], rewrite(_Nodes(graph, node), node)
    new.shape, new.dtype, name = old.shape, _known(old), old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    new.name = name


def _known(value: ir.Value) -> ir.DataType:
    """The type of `value`, which every value of a traced graph has."""
    assert value.dtype is not None, value.name
    return value.dtype


def _value(node: ir.Node, name: str, default):
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.value


def _expect(node: ir.Node, good: bool, what: str) -> None:
    if not good:
        raise AssertionError(f"{node.name} ({node.op_type}): the classic dialect expects {what}")


def _rms_norm(make: _Nodes, node: ir.Node) -> ir.Value:
    """x / sqrt(mean(x^2) + epsilon) * scale, in float32 as traced."""
    x, scale = node.inputs
    _expect(
        node, x.dtype == ir.DataType.FLOAT and _value(node, "axis", -1) == -1, "float32 over the last axis"
    )
    mean = make("ReduceMean", make("Mul", x, x), make.constant([-1], ir.DataType.INT64), keepdims=1)
    root = make("Sqrt", make("Add", mean, make.constant(_value(node, "epsilon", 1e-5), ir.DataType.FLOAT)))
    return make("Mul", make("Div", x, root), scale)


def _group_norm(make: _Nodes, node: ir.Node) -> ir.Value:
    """Normalise x [N, C, ...] over groups of channels in float32, then apply scale and bias [C] per channel.

    The operator of opset 20 takes scale and bias per group, which is another operation.
    """
    x, scale, bias = node.inputs
    _expect(node, x.dtype == ir.DataType.FLOAT, "float32")
    groups = make.constant([0, _value(node, "num_groups", None), -1], ir.DataType.INT64)
    spatial = list(range(1, len(x.shape) - 1))
    axis, wide = make.constant([2], ir.DataType.INT64), make.constant(spatial, ir.DataType.INT64)
    grouped = make("Reshape", x, groups)
    centred = make("Sub", grouped, make("ReduceMean", grouped, axis, keepdims=1))
    variance = make("ReduceMean", make("Mul", centred, centred), axis, keepdims=1)
    root = make(
        "Sqrt", make("Add", variance, make.constant(_value(node, "epsilon", 1e-5), ir.DataType.FLOAT))
    )
    normal = make("Reshape", make("Div", centred, root), make("Shape", x, dtype=ir.DataType.INT64))
    return make("Add", make("Mul", normal, make("Unsqueeze", scale, wide)), make("Unsqueeze", bias, wide))


def _rotary(make: _Nodes, node: ir.Node) -> ir.Value:
    """x [B, h, S, D] in halves (a, b), cos and sin [B, S, D/2] -> (a cos - b sin, b cos + a sin)."""
    _expect(
        node,
        len(node.inputs) == 3
        and len(node.inputs[0].shape) == 4
        and not _value(node, "interleaved", 0)
        and not _value(node, "rotary_embedding_dim", 0),
        "x [B, h, S, D] in halves, with one angle row per token",
    )
    x, heads = node.inputs[0], make.constant([1], ir.DataType.INT64)
    cos, sin = (make("Unsqueeze", angle, heads) for angle in node.inputs[1:])
    a, b = make("Split", x, outputs=2, axis=-1, num_outputs=2)
    first = make("Sub", make("Mul", a, cos), make("Mul", b, sin))
    second = make("Add", make("Mul", b, cos), make("Mul", a, sin))
    return make("Concat", first, second, axis=-1)


def _cumsum(make: _Nodes, node: ir.Node) -> ir.Value:
    """Running sums of x [N, n] along n, because TensorRT before 10.8 turns CumSum into a loop of n steps.

    Blocks of 2, 4, 8, ... are summed in turn: the last sum of a block's left half is added to its right half
    (Sklansky, 1960). As in a sequential sum, the sums of non-negative numbers never fall, and zeros change
    nothing.
    """
    x, axis = node.inputs
    size = x.shape[-1]
    _expect(
        node,
        len(x.shape) == 2
        and isinstance(size, int)
        and axis.const_value is not None
        and int(axis.const_value.numpy()) in (-1, 1)
        and not _value(node, "exclusive", 0)
        and not _value(node, "reverse", 0),
        "x [N, n] with a fixed n, summed along the last axis, inclusive and forward",
    )
    int64, right = ir.DataType.INT64, make.constant([[0], [1]], x.dtype)
    whole = 1 << (size - 1).bit_length()
    half, sums = 1, make("Pad", x, make.constant([0, 0, 0, whole - size], int64)) if whole > size else x
    while half < whole:
        blocks = make("Reshape", sums, make.constant([-1, 2, half], int64))
        carried = make(
            "Slice",
            blocks,
            make.constant([0, half - 1], int64),
            make.constant([1, half], int64),
            make.constant([1, 2], int64),
        )
        half, sums = 2 * half, make("Add", blocks, make("Mul", carried, right))
    sums = make("Reshape", sums, make.constant([-1, whole], int64))
    return make("Slice", sums, *(make.constant([n], int64) for n in (0, size, 1))) if whole > size else sums


def _attention(make: _Nodes, node: ir.Node) -> ir.Value:
    """softmax(scale query key^T, where mask) value: query [B, h, S, D], key and value [B, KV, S, D], an
    optional bool mask."""
    query, key, value, *rest = node.inputs
    _expect(
        node,
        len(query.shape) == 4
        and query.shape[1] % key.shape[1] == 0
        and len(rest) < 2
        and not _value(node, "is_causal", 0)
        and not _value(node, "softcap", 0.0),
        "four axes, query heads that share their key heads evenly, and at most a mask",
    )
    heads, kv_heads, size, int64 = query.shape[1], key.shape[1], query.shape[3], ir.DataType.INT64
    mask, dtype, axes = rest[0] if rest else None, query.dtype, [0, 1, 3, 2]
    if shared := heads != kv_heads:  # the query heads of a key head get an axis of their own
        query = make("Reshape", query, make.constant([0, kv_heads, heads // kv_heads, -1, size], int64))
        key, value = (make("Unsqueeze", x, make.constant([2], int64)) for x in (key, value))
        mask, axes = mask and make("Unsqueeze", mask, make.constant([1], int64)), [0, 1, 2, 4, 3]
    scale = make.constant(_value(node, "scale", None) or size**-0.5, ir.DataType.FLOAT)
    wide, narrow = ({"to": kind.value, "dtype": kind} for kind in (ir.DataType.FLOAT, dtype))
    # The scale is no number of 16 bits, unless the size of a head is a power of 4.
    scaled = make("Cast", make("Mul", make("Cast", query, **wide), scale), **narrow)
    scores = make("MatMul", scaled, make("Transpose", key, perm=axes))
    if mask is not None:
        _expect(node, mask.dtype == ir.DataType.BOOL, "a bool mask")
        scores = make("Where", mask, scores, make.constant(-np.inf, dtype), dtype=dtype)
    attended = make("MatMul", make("Softmax", scores, axis=-1), value)
    return make("Reshape", attended, make.constant([0, heads, -1, size], int64)) if shared else attended


def _call_plugin(node: ir.Node, cache: str) -> None:
    """Set the plugin's version and fields from the shapes of query and past, and the types of int8 caches.

    query [B, h, S, D], past [B, KV, C, D].
    """
    query, past = node.inputs[0], node.inputs[3]
    fields = {
        "num_heads": query.shape[1],
        "num_kv_heads": past.shape[1],
        "head_dim": query.shape[3],
        "cache_type": int(cache == "int8"),
    }
    _expect(
        node,
        all(isinstance(size, int) for size in fields.values()),
        "fixed numbers of heads and a fixed head_dim",
    )
    for name, size in fields.items():
        node.attributes[name] = ir.AttrInt64(name, size)
    node.attributes["scale"] = ir.AttrFloat32("scale", fields["head_dim"] ** -0.5)
    node.attributes["plugin_version"] = ir.AttrString("plugin_version", str(plugins.ABI))
    node.attributes["plugin_namespace"] = ir.AttrString("plugin_namespace", "")
    if cache == "int8":
        for value in (*node.inputs[3:5], *node.outputs[1:3]):
            value.type = ir.TensorType(ir.DataType.INT8)
            value.shape = ir.Shape([*list(value.shape)[:3], fields["head_dim"] + 4])


_REWRITES = {
    ("", "RMSNormalization"): _rms_norm,
    ("", "GroupNormalization"): _group_norm,
    ("", "RotaryEmbedding"): _rotary,
    ("", "CumSum"): _cumsum,
    ("", "Attention"): _attention,
    (DOMAIN, NAME): _call_plugin,
}
