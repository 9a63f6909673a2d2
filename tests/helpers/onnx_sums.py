"""Random graphs of operators that sum: reductions, products,
norms, attention, quantised weights. See onnx_graphs."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper

from tests.helpers.onnx_graphs import Graph, any_axis, broadcastable, node, normal, shape, unary


def reduce(kind):
    def make(rng):
        x = normal(rng, *shape(rng, 1, 4))
        axes = rng.choice(x.ndim, rng.integers(1, x.ndim + 1), replace=False)
        return Graph([node(kind, ["x", "a"], keepdims=int(rng.integers(0, 2)))], {"x": x}, {"a": axes})

    return make


def top_k(rng):
    x = rng.permutation(60).reshape(3, 4, 5).astype(np.float32)
    axis = any_axis(rng, 3)
    return Graph(
        [node("TopK", ["x", "k"], ["y", "z"], axis=axis, largest=int(rng.integers(0, 2)))],
        {"x": x},
        {"k": np.array([int(rng.integers(1, x.shape[axis] + 1))])},
        ("y", "z"),
        fixed=True,
    )


def arg_max(rng):
    x = rng.permutation(24).reshape(2, 3, 4).astype(np.float32)
    return Graph(
        [
            node(
                str(rng.choice(["ArgMax", "ArgMin"])),
                ["x"],
                axis=any_axis(rng, 3),
                keepdims=int(rng.integers(0, 2)),
            )
        ],
        {"x": x},
        fixed=True,
    )


def cumulative(rng):
    x = normal(rng, *shape(rng, 1, 3))
    return Graph(
        [node("CumSum", ["x", "a"], exclusive=int(rng.integers(0, 2)), reverse=int(rng.integers(0, 2)))],
        {"x": x},
        {"a": np.array(int(rng.integers(0, x.ndim)))},
    )


def matmul(rng):
    m, k, n = (int(v) for v in rng.integers(1, 6, 3))
    lead = shape(rng, 0, 2)
    sizes = [
        ((*lead, m, k), (*broadcastable(rng, lead), k, n)),
        ((k,), (k, n)),
        ((*lead, m, k), (k,)),
        ((*lead, m, k), (k, n)),
    ][rng.integers(4)]
    return Graph(
        [node("MatMul", ["a", "b"])], {"a": normal(rng, *sizes[0]), "b": normal(rng, *sizes[1])}, fixed=True
    )


def gemm(rng):
    m, k, n = (int(v) for v in rng.integers(1, 6, 3))
    ta, tb = (int(v) for v in rng.integers(0, 2, 2))
    feeds = {
        "a": normal(rng, *((k, m) if ta else (m, k))),
        "b": normal(rng, *((n, k) if tb else (k, n))),
        "c": normal(rng, n),
    }
    return Graph(
        [
            node(
                "Gemm",
                feeds,
                transA=ta,
                transB=tb,
                alpha=float(rng.uniform(0.5, 2)),
                beta=float(rng.uniform(0.5, 2)),
            )
        ],
        feeds,
        fixed=True,
    )


def convolution(rng):
    groups, rank = int(rng.choice([1, 2])), int(rng.choice([1, 2]))
    x, w = normal(rng, 2, 4, *[8] * rank), normal(rng, 4, 4 // groups, *[int(rng.integers(1, 4))] * rank)
    attributes = {
        "strides": [int(rng.integers(1, 3))] * rank,
        "dilations": [int(rng.integers(1, 3))] * rank,
        "group": groups,
    }
    auto = rng.random()
    if auto < 0.6:
        attributes["pads"] = rng.integers(0, 3, 2 * rank).tolist()
    elif auto < 0.8:
        attributes |= {"auto_pad": str(rng.choice(["SAME_UPPER", "SAME_LOWER"])), "dilations": [1] * rank}
    constants = {"w": w, "b": normal(rng, 4)}
    return Graph(
        [node("Conv", ["x", *list(constants)[: 1 + (rng.random() < 0.7)]], **attributes)],
        {"x": x},
        constants,
        fixed=True,
    )


def layer_norm(rng):
    x, axis = normal(rng, *shape(rng, 3, 4)), int(rng.integers(1, 3))
    return Graph(
        [node("LayerNormalization", ["x", "s", "b"], axis=axis, epsilon=1e-5)],
        {"x": x},
        {"s": normal(rng, *x.shape[axis:]), "b": normal(rng, *x.shape[axis:])},
        fixed=True,
    )


def rms_norm(rng):
    x, axis = normal(rng, *shape(rng, 3, 4)), int(rng.integers(1, 3))
    return Graph(
        [node("RMSNormalization", ["x", "s"], axis=axis, epsilon=1e-6)],
        {"x": x},
        {"s": normal(rng, *x.shape[axis:])},
        fixed=True,
    )


def group_norm(rng):
    return Graph(
        [node("GroupNormalization", ["x", "s", "b"], num_groups=int(rng.choice([2, 3, 6])), epsilon=1e-6)],
        {"x": normal(rng, 2, 6, 3, 4)},
        {"s": normal(rng, 6), "b": normal(rng, 6)},
        fixed=True,
    )


def instance_norm(rng):
    return Graph(
        [node("InstanceNormalization", ["x", "s", "b"], epsilon=1e-5)],
        {"x": normal(rng, 2, 3, 4, 5)},
        {"s": normal(rng, 3), "b": normal(rng, 3)},
        fixed=True,
    )


def rotary(rng):
    heads, tokens, size = int(rng.integers(1, 4)), int(rng.integers(1, 5)), 8
    turning = int(rng.choice([0, 4]))
    angles, indexed = (turning or size) // 2, rng.random() < 0.4
    lead = (6,) if indexed else (2, tokens)
    feeds = {
        "x": normal(rng, 2, heads, tokens, size),
        "cos": normal(rng, *lead, angles),
        "sin": normal(rng, *lead, angles),
    }
    feeds |= {"positions": rng.integers(0, 6, (2, tokens))} if indexed else {}
    return Graph(
        [node("RotaryEmbedding", feeds, interleaved=int(rng.integers(0, 2)), rotary_embedding_dim=turning)],
        feeds,
        fixed=True,
    )


def attention(rng):
    """Grouped heads, with or without a scale; without a mask,
    with a boolean or added one, or causal from the upper left."""
    kv, group, tokens, slots, size = (int(rng.integers(1, n)) for n in (3, 3, 5, 6, 3))
    feeds = {
        "q": normal(rng, 2, kv * group, tokens, 8 * size),
        "k": normal(rng, 2, kv, slots, 8 * size),
        "v": normal(rng, 2, kv, slots, 8 * size),
    }
    kind = rng.integers(4)
    attributes = (
        {"is_causal": 1} if kind == 3 else {"scale": float(rng.uniform(0.1, 2))} if rng.random() < 0.3 else {}
    )
    if kind == 1:
        mask = rng.random((2, 1, tokens, slots)) < 0.6
        mask[..., 0] = True
        feeds["mask"] = mask
    if kind == 2:
        feeds["mask"] = normal(rng, 1, kv * group, tokens, slots)
    return Graph([node("Attention", feeds, **attributes)], feeds, fixed=True)


def flat_attention(rng):
    """Heads side by side: [B,S,h*D]."""
    feeds = {"q": normal(rng, 2, 3, 16), "k": normal(rng, 2, 5, 8), "v": normal(rng, 2, 5, 8)}
    return Graph([node("Attention", feeds, q_num_heads=2, kv_num_heads=1)], feeds, fixed=True)


def tensor_scatter(rng):
    capacity, tokens = 7, int(rng.integers(1, 4))
    feeds = {
        "c": normal(rng, 2, 3, capacity, 4),
        "u": normal(rng, 2, 3, tokens, 4),
        "w": rng.integers(0, capacity - tokens + 1, (2,)),
    }
    return Graph([node("TensorScatter", feeds, axis=-2, mode="linear")], feeds, fixed=True)


def dequantize(rng):
    axis, blocks = int(rng.integers(0, 2)), rng.random() < 0.5
    four = blocks or rng.random() < 0.5
    codes = rng.integers(-7, 8, (8, 6 if axis == 0 else 8)) if four else rng.integers(-127, 128, (8, 8))
    kind = TensorProto.INT4 if four else TensorProto.INT8
    size = list(codes.shape)
    size[axis] //= 4
    scales = np.abs(normal(rng, *size)) if blocks else np.abs(normal(rng, codes.shape[axis]))
    attributes = {"axis": axis, "block_size": 4} if blocks else {"axis": axis}
    nodes = [node("DequantizeLinear", ["c", "s"], ["w"], **attributes), node("MatMul", ["x", "w"])]
    stored = helper.make_tensor("c", kind, codes.shape, codes.reshape(-1).tolist())
    return Graph(
        nodes,
        {"x": normal(rng, 3, len(codes))},
        {"s": scales + np.float32(0.01)},
        fixed=True,
        stored=(stored,),
    )


def quantize(rng):
    nodes = [node("QuantizeLinear", ["x", "s", "z"], ["q"]), node("DequantizeLinear", ["q", "s", "z"])]
    return Graph(
        nodes,
        {"x": normal(rng, *shape(rng, 2, 3)) * 40},
        {"s": np.float32(rng.uniform(0.1, 1)), "z": np.int8(0)},
    )


def one_group(rng):
    return Graph(
        [node("GroupNormalization", ["x", "s", "b"], num_groups=1)],
        {"x": normal(rng, 2, 6, 3, 4)},
        {"s": normal(rng, 6), "b": normal(rng, 6)},
        fixed=True,
    )


def nonpad(rng):
    feeds = {
        "q": normal(rng, 2, 2, 3, 8),
        "k": normal(rng, 2, 2, 5, 8),
        "v": normal(rng, 2, 2, 5, 8),
        "n": rng.integers(1, 5, (2,)),
    }
    return Graph([node("Attention", ["q", "k", "v", "", "", "", "n"])], feeds, fixed=True)


def quantize_unsigned(rng):
    nodes = [node("QuantizeLinear", ["x", "s"], ["q"]), node("DequantizeLinear", ["q", "s"])]
    return Graph(nodes, {"x": normal(rng, 3, 4) * 3}, {"s": np.float32(0.1)})


def integer_mean(rng):
    return Graph([node("ReduceMean", ["x", "a"])], {"x": rng.integers(0, 9, (3, 4))}, {"a": np.array([1])})


def einsum(rng):
    return Graph(
        [node("Einsum", ["a", "b"], equation="bij,bjk->bik")],
        {"a": normal(rng, 2, 3, 4), "b": normal(rng, 2, 4, 5)},
    )


REDUCTIONS = (
    "ReduceSum",
    "ReduceMean",
    "ReduceMax",
    "ReduceMin",
    "ReduceProd",
    "ReduceL2",
    "ReduceSumSquare",
)
SUMS = {
    **{kind: reduce(kind) for kind in REDUCTIONS},
    "TopK": top_k,
    **{kind: unary(kind, rank=2, axis=any_axis) for kind in ("Softmax", "LogSoftmax", "Hardmax")},
    "ArgMax": arg_max,
    "CumSum": cumulative,
    "MatMul": matmul,
    "Gemm": gemm,
    "Conv": convolution,
    "LayerNormalization": layer_norm,
    "RMSNormalization": rms_norm,
    "GroupNormalization": group_norm,
    "InstanceNormalization": instance_norm,
    "RotaryEmbedding": rotary,
    "Attention": attention,
    "Attention of flat heads": flat_attention,
    "TensorScatter": tensor_scatter,
    "DequantizeLinear": dequantize,
    "QuantizeLinear": quantize,
}
