"""Random small ONNX graphs, one family per operator: how TensorRT reads each must be what ONNX means."""
from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

DTYPES = {np.dtype("float32"): TensorProto.FLOAT, np.dtype("int64"): TensorProto.INT64, np.dtype("bool"): TensorProto.BOOL,
          np.dtype("int32"): TensorProto.INT32}


@dataclass
class Graph:
    """Nodes, inputs (name -> array) and constants; outputs `y`, and `z` where there are two. `fixed` inputs have no dynamic axis, the
    first axis of those named in `dynamic` is."""

    nodes: list
    feeds: dict[str, np.ndarray]
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    outputs: tuple[str, ...] = ("y",)
    fixed: bool = False
    dynamic: tuple[str, ...] = ()
    stored: tuple = ()  # constants as TensorProto, of types that numpy has not

    def model(self, rng):
        """(the graph as ONNX, what ONNX's reference evaluator computes). Of each input that may, one axis or none is dynamic."""
        values = []
        for name, array in self.feeds.items():
            shape: list = list(array.shape)
            if name in self.dynamic or shape and not self.fixed and rng.random() < 0.6:
                shape[0 if name in self.dynamic else rng.integers(len(shape))] = f"{name}_size"
            values.append(helper.make_tensor_value_info(name, DTYPES[array.dtype], shape))
        constants = [*self.stored, *(numpy_helper.from_array(np.asarray(array), name) for name, array in self.constants.items())]
        graph = helper.make_graph(self.nodes, "g", values, [helper.make_empty_tensor_value_info(name) for name in self.outputs], constants)
        model = helper.make_model(graph, ir_version=11, opset_imports=[helper.make_opsetid("", 24)])
        wanted = dict(zip(self.outputs, map(np.asarray, ReferenceEvaluator(model).run(None, {k: v.copy() for k, v in self.feeds.items()}))))
        for value in model.graph.output:
            value.type.tensor_type.elem_type = DTYPES[wanted[value.name].dtype]
        return model, wanted


def node(kind, inputs, outputs=("y",), **attributes):
    return helper.make_node(kind, list(inputs), list(outputs), **attributes)


def shape(rng, low=1, high=4, most=5):
    return tuple(int(n) for n in rng.integers(1, most, rng.integers(low, high + 1)))


def normal(rng, *size):
    return rng.standard_normal(size).astype(np.float32)


def broadcastable(rng, size):
    """A shape that broadcasts to `size`: some axes one, some leading axes left out."""
    kept = [1 if rng.random() < 0.3 else n for n in size]
    return tuple(kept[rng.integers(0, len(kept)):]) if rng.random() < 0.3 else tuple(kept)


def binary(kind, *, integers=True, positive=False, boolean=False):
    def make(rng):
        size = shape(rng)
        if boolean:
            a, b = (rng.random(s) < 0.5 for s in (size, broadcastable(rng, size)))
        elif integers and rng.random() < 0.4:
            a, b = (rng.integers(1 if positive else -5, 6, s) for s in (size, broadcastable(rng, size)))
        else:
            a, b = normal(rng, *size), normal(rng, *broadcastable(rng, size))
            if positive:
                a, b = np.abs(a) + np.float32(0.1), np.abs(b) + np.float32(0.1)
        return Graph([node(kind, ["a", "b"])], {"a": a, "b": b})

    return make


def unary(kind, low=-3.0, high=3.0, rank=1, **attributes):
    def make(rng):
        x = rng.uniform(low, high, shape(rng, rank)).astype(np.float32)
        return Graph([node(kind, ["x"], **{k: (v(rng, x.ndim) if callable(v) else v) for k, v in attributes.items()})], {"x": x})

    return make


def any_axis(rng, rank):
    return int(rng.integers(-rank, rank))


def uniform(low, high):
    return lambda rng, rank: float(rng.uniform(low, high))


def clip(rng):
    return Graph([node("Clip", ["x", "low", "high"])], {"x": normal(rng, *shape(rng))},
                 {"low": np.float32(rng.uniform(-1, 0)), "high": np.float32(rng.uniform(0, 1))})


def cast(rng):
    x = [normal(rng, 3, 4) * 3, rng.integers(-4, 5, (2, 5)), rng.random((4,)) < 0.5][rng.integers(3)]
    return Graph([node("Cast", ["x"], to=int(rng.choice([TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL])))], {"x": x})


def half(rng):
    kind = int(rng.choice([TensorProto.FLOAT16, TensorProto.BFLOAT16]))
    nodes = [node("Cast", ["x"], ["h"], to=kind), node("Add", ["h", "h"], ["d"]), node("Cast", ["d"], to=TensorProto.FLOAT)]
    return Graph(nodes, {"x": normal(rng, *shape(rng)) * 50})


def where(rng):
    size = shape(rng)
    return Graph([node("Where", ["c", "a", "b"])], {"c": rng.random(broadcastable(rng, size)) < 0.5, "a": normal(rng, *size),
                                                     "b": normal(rng, *broadcastable(rng, size))})


def transpose(rng):
    x = normal(rng, *shape(rng))
    return Graph([node("Transpose", ["x"], perm=rng.permutation(x.ndim).tolist())], {"x": x})


def reshape(rng):
    x = normal(rng, 2, 3, 4)
    target = [[0, -1], [6, 4], [-1, 2, 2], [0, 0, 2, 2], [4, 3, 2], [-1]][rng.integers(6)]
    return Graph([node("Reshape", ["x", "s"])], {"x": x}, {"s": np.array(target)})


def reshape_computed(rng):
    """The target's sizes come from the input's own shape, at run time."""
    nodes = [node("Shape", ["x"], ["n"], start=0, end=1), node("Concat", ["n", "rest"], ["s"], axis=0), node("Reshape", ["x", "s"])]
    return Graph(nodes, {"x": normal(rng, *shape(rng, 2, 4))}, {"rest": np.array([-1])})


def squeeze(rng):
    x = normal(rng, 1, 3, 1, 2)
    return Graph([node("Squeeze", ["x", "a"])], {"x": x}, {"a": np.array([[0], [2], [0, 2], [-2], [-4, -2]][rng.integers(5)])}, fixed=True)


def unsqueeze(rng):
    return Graph([node("Unsqueeze", ["x", "a"])], {"x": normal(rng, *shape(rng, 1, 3))}, {"a": np.array([[0], [1], [0, 1], [-1]][rng.integers(4)])})


def flatten(rng):
    x = normal(rng, *shape(rng, 2, 4))
    return Graph([node("Flatten", ["x"], axis=any_axis(rng, x.ndim))], {"x": x})


def concat(rng):
    size, axis = list(shape(rng)), 0
    axis = any_axis(rng, len(size))
    parts = {}
    for i in range(rng.integers(2, 4)):
        size[axis] = int(rng.integers(1, 4))
        parts[f"x{i}"] = normal(rng, *size)
    return Graph([node("Concat", parts, axis=axis)], parts, fixed=True)


def slice_(rng):
    x = normal(rng, 6, 5, 7)
    axes = rng.choice(3, rng.integers(1, 4), replace=False)
    steps = rng.choice([-2, -1, 1, 2], len(axes))
    starts, ends = rng.integers(0, 3, len(axes)), rng.integers(3, 9, len(axes))
    starts, ends = np.where(steps > 0, starts, ends), np.where(steps > 0, ends, starts - 7 * (rng.random() < 0.3))
    names = ["x", "s", "e", "a", "t"]
    return Graph([node("Slice", names)], {"x": x}, {"s": starts, "e": ends, "a": axes, "t": steps})


def split(rng):
    axis = int(rng.integers(0, 3))
    return Graph([node("Split", ["x", "n"], ["y", "z"], axis=axis)], {"x": normal(rng, 5, 5, 5)}, {"n": np.array([2, 3])}, ("y", "z"))


def expand(rng):
    size = shape(rng, 2, 4)
    return Graph([node("Expand", ["x", "s"])], {"x": normal(rng, *broadcastable(rng, size))}, {"s": np.array(size)}, fixed=True)


def tile(rng):
    x = normal(rng, *shape(rng))
    return Graph([node("Tile", ["x", "n"])], {"x": x}, {"n": rng.integers(1, 4, x.ndim)})


def shape_of(rng):
    return Graph([node("Shape", ["x"])], {"x": normal(rng, *shape(rng))})


def range_(rng):
    """From the length of an input, as positions are made."""
    nodes = [node("Shape", ["x"], ["n1"], start=0, end=1), node("Squeeze", ["n1"], ["n"]), node("Range", ["start", "n", "step"])]
    return Graph(nodes, {"x": normal(rng, int(rng.integers(2, 9)))}, {"start": np.array(int(rng.integers(-3, 2))), "step": np.array(int(rng.integers(1, 4)))})


def constant_of_shape(rng):
    nodes = [node("Shape", ["x"], ["s"]), node("ConstantOfShape", ["s"], ["f"], value=numpy_helper.from_array(np.array([2.5], np.float32))),
             node("Add", ["f", "x"])]
    return Graph(nodes, {"x": normal(rng, *shape(rng))})


def gather(rng):
    x = normal(rng, *(int(n) for n in rng.integers(2, 5, rng.integers(1, 4))))
    axis = any_axis(rng, x.ndim)
    indices = rng.integers(0, x.shape[axis], shape(rng, 0, 2))
    return Graph([node("Gather", ["x", "i"], axis=axis)], {"x": x, "i": indices})


def gather_negative(rng):
    """A constant index that counts from the end, along an axis of fixed length."""
    x = normal(rng, 3, 4)
    return Graph([node("Gather", ["x", "i"], axis=1)], {"x": x}, {"i": rng.integers(-4, 4, (3,))}, fixed=True)


def gather_elements(rng):
    x = normal(rng, 3, 4, 2)
    axis = int(rng.integers(0, 3))
    size = [3, 4, 2]
    size[axis] = int(rng.integers(1, 5))
    return Graph([node("GatherElements", ["x", "i"], axis=axis)], {"x": x, "i": rng.integers(0, x.shape[axis], size)}, fixed=True)


def gather_nd(rng):
    batch, depth = int(rng.integers(0, 2)), int(rng.integers(1, 3))
    leading = (2,) if batch else shape(rng, 1, 1)
    return Graph([node("GatherND", ["x", "i"], batch_dims=batch)], {"x": normal(rng, 2, 3, 4), "i": rng.integers(0, 2, (*leading, depth))}, fixed=True)


def scatter_elements(rng):
    x, axis = normal(rng, 4, 5), int(rng.integers(0, 2))
    i = np.argsort(rng.random((4, 5)), axis=axis)
    i = i[:2] if axis == 0 else i[:, :2]
    return Graph([node("ScatterElements", ["x", "i", "u"], axis=axis)], {"x": x, "i": i, "u": normal(rng, *i.shape)}, fixed=True)


def scatter_nd(rng):
    rows = rng.choice(5, 3, replace=False)[:, None]
    return Graph([node("ScatterND", ["x", "i", "u"])], {"x": normal(rng, 5, 4), "i": rows, "u": normal(rng, 3, 4)}, fixed=True)


def one_hot(rng):
    return Graph([node("OneHot", ["i", "d", "v"], axis=any_axis(rng, 3))], {"i": rng.integers(0, 5, shape(rng, 2, 2))},
                 {"d": np.array(5), "v": np.array([0.5, 2], np.float32)})


def pad(rng):
    x = normal(rng, 3, 4, 5)
    mode = str(rng.choice(["constant", "reflect", "edge", "wrap"]))
    names, constants = ["x", "p"], {"p": rng.integers(0, 3, 6)}
    if mode == "constant" and rng.random() < 0.5:
        names, constants = [*names, "v"], constants | {"v": np.float32(1.5)}
    return Graph([node("Pad", names, mode=mode)], {"x": x}, constants)


def resize(rng):
    x = normal(rng, 1, 2, int(rng.integers(2, 5)), int(rng.integers(2, 5)))
    mode = str(rng.choice(["nearest", "linear"]))
    transform = str(rng.choice(["asymmetric", "half_pixel", "align_corners"]))
    attributes = {"nearest_mode": str(rng.choice(["floor", "ceil", "round_prefer_floor", "round_prefer_ceil"]))} if mode == "nearest" else {}
    scales = np.array([1, 1, rng.choice([1, 2, 3]), rng.choice([1, 2, 3])], np.float32)
    return Graph([node("Resize", ["x", "", "s"], mode=mode, coordinate_transformation_mode=transform, **attributes)], {"x": x}, {"s": scales}, fixed=True)


def reduce(kind):
    def make(rng):
        x = normal(rng, *shape(rng, 1, 4))
        axes = rng.choice(x.ndim, rng.integers(1, x.ndim + 1), replace=False)
        return Graph([node(kind, ["x", "a"], keepdims=int(rng.integers(0, 2)))], {"x": x}, {"a": axes})

    return make


def top_k(rng):
    x = rng.permutation(60).reshape(3, 4, 5).astype(np.float32)
    axis = any_axis(rng, 3)
    return Graph([node("TopK", ["x", "k"], ["y", "z"], axis=axis, largest=int(rng.integers(0, 2)))], {"x": x},
                 {"k": np.array([int(rng.integers(1, x.shape[axis] + 1))])}, ("y", "z"), fixed=True)


def arg_max(rng):
    x = rng.permutation(24).reshape(2, 3, 4).astype(np.float32)
    return Graph([node(str(rng.choice(["ArgMax", "ArgMin"])), ["x"], axis=any_axis(rng, 3), keepdims=int(rng.integers(0, 2)))], {"x": x}, fixed=True)


def cumulative(rng):
    x = normal(rng, *shape(rng, 1, 3))
    return Graph([node("CumSum", ["x", "a"], exclusive=int(rng.integers(0, 2)), reverse=int(rng.integers(0, 2)))], {"x": x},
                 {"a": np.array(int(rng.integers(0, x.ndim)))})


def matmul(rng):
    m, k, n = (int(v) for v in rng.integers(1, 6, 3))
    lead = shape(rng, 0, 2)
    sizes = [((*lead, m, k), (*broadcastable(rng, lead), k, n)), ((k,), (k, n)), ((*lead, m, k), (k,)), ((*lead, m, k), (k, n))][rng.integers(4)]
    return Graph([node("MatMul", ["a", "b"])], {"a": normal(rng, *sizes[0]), "b": normal(rng, *sizes[1])}, fixed=True)


def gemm(rng):
    m, k, n = (int(v) for v in rng.integers(1, 6, 3))
    ta, tb = (int(v) for v in rng.integers(0, 2, 2))
    feeds = {"a": normal(rng, *((k, m) if ta else (m, k))), "b": normal(rng, *((n, k) if tb else (k, n))), "c": normal(rng, n)}
    return Graph([node("Gemm", feeds, transA=ta, transB=tb, alpha=float(rng.uniform(0.5, 2)), beta=float(rng.uniform(0.5, 2)))], feeds, fixed=True)


def convolution(rng):
    groups, rank = int(rng.choice([1, 2])), int(rng.choice([1, 2]))
    x, w = normal(rng, 2, 4, *[8] * rank), normal(rng, 4, 4 // groups, *[int(rng.integers(1, 4))] * rank)
    attributes = {"strides": [int(rng.integers(1, 3))] * rank, "dilations": [int(rng.integers(1, 3))] * rank, "group": groups}
    auto = rng.random()
    if auto < 0.6:
        attributes["pads"] = rng.integers(0, 3, 2 * rank).tolist()
    elif auto < 0.8:
        attributes |= {"auto_pad": str(rng.choice(["SAME_UPPER", "SAME_LOWER"])), "dilations": [1] * rank}
    constants = {"w": w, "b": normal(rng, 4)}
    return Graph([node("Conv", ["x", *list(constants)[:1 + (rng.random() < 0.7)]], **attributes)], {"x": x}, constants, fixed=True)


def layer_norm(rng):
    x, axis = normal(rng, *shape(rng, 3, 4)), int(rng.integers(1, 3))
    return Graph([node("LayerNormalization", ["x", "s", "b"], axis=axis, epsilon=1e-5)], {"x": x},
                 {"s": normal(rng, *x.shape[axis:]), "b": normal(rng, *x.shape[axis:])}, fixed=True)


def rms_norm(rng):
    x, axis = normal(rng, *shape(rng, 3, 4)), int(rng.integers(1, 3))
    return Graph([node("RMSNormalization", ["x", "s"], axis=axis, epsilon=1e-6)], {"x": x}, {"s": normal(rng, *x.shape[axis:])}, fixed=True)


def group_norm(rng):
    return Graph([node("GroupNormalization", ["x", "s", "b"], num_groups=int(rng.choice([2, 3, 6])), epsilon=1e-6)],
                 {"x": normal(rng, 2, 6, 3, 4)}, {"s": normal(rng, 6), "b": normal(rng, 6)}, fixed=True)


def instance_norm(rng):
    return Graph([node("InstanceNormalization", ["x", "s", "b"], epsilon=1e-5)], {"x": normal(rng, 2, 3, 4, 5)},
                 {"s": normal(rng, 3), "b": normal(rng, 3)}, fixed=True)


def rotary(rng):
    heads, tokens, size = int(rng.integers(1, 4)), int(rng.integers(1, 5)), 8
    turning = int(rng.choice([0, 4]))
    angles, indexed = (turning or size) // 2, rng.random() < 0.4
    lead = (6,) if indexed else (2, tokens)
    feeds = {"x": normal(rng, 2, heads, tokens, size), "cos": normal(rng, *lead, angles), "sin": normal(rng, *lead, angles)}
    feeds |= {"positions": rng.integers(0, 6, (2, tokens))} if indexed else {}
    return Graph([node("RotaryEmbedding", feeds, interleaved=int(rng.integers(0, 2)), rotary_embedding_dim=turning)], feeds, fixed=True)


def attention(rng):
    """Grouped heads, with a scale, without a mask, with a boolean or an added one, or causal from the upper left."""
    kv, group, tokens, slots, size = (int(rng.integers(1, n)) for n in (3, 3, 5, 6, 3))
    feeds = {"q": normal(rng, 2, kv * group, tokens, 8 * size), "k": normal(rng, 2, kv, slots, 8 * size), "v": normal(rng, 2, kv, slots, 8 * size)}
    kind = rng.integers(4)
    attributes = {"is_causal": 1} if kind == 3 else {"scale": float(rng.uniform(0.1, 2))} if rng.random() < 0.3 else {}
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
    feeds = {"c": normal(rng, 2, 3, capacity, 4), "u": normal(rng, 2, 3, tokens, 4), "w": rng.integers(0, capacity - tokens + 1, (2,))}
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
    return Graph(nodes, {"x": normal(rng, 3, len(codes))}, {"s": scales + np.float32(0.01)}, fixed=True, stored=(stored,))


def quantize(rng):
    nodes = [node("QuantizeLinear", ["x", "s", "z"], ["q"]), node("DequantizeLinear", ["q", "s", "z"])]
    return Graph(nodes, {"x": normal(rng, *shape(rng, 2, 3)) * 40}, {"s": np.float32(rng.uniform(0.1, 1)), "z": np.int8(0)})


def modulo(rng):
    if rng.random() < 0.3:
        return Graph([node("Mod", ["a", "b"], fmod=1)], {"a": normal(rng, 3, 4) * 9, "b": normal(rng, 3, 4)})
    return Graph([node("Mod", ["a", "b"])], {"a": rng.integers(-20, 20, (3, 4)), "b": rng.choice([-3, -2, 2, 3], (3, 4))})


def halves(rng):
    """Numbers halfway between two integers."""
    return Graph([node("Round", ["x"])], {"x": (rng.integers(-9, 9, (4, 5)) / 2).astype(np.float32)})


def resize_to(rng):
    mode, transform = str(rng.choice(["nearest", "linear"])), str(rng.choice(["asymmetric", "half_pixel", "align_corners"]))
    sizes = np.array([1, 2, rng.integers(1, 9), rng.integers(1, 9)])
    return Graph([node("Resize", ["x", "", "", "s"], mode=mode, coordinate_transformation_mode=transform)], {"x": normal(rng, 1, 2, 5, 4)}, {"s": sizes},
                 fixed=True)


def last_elements(rng):
    """A slice whose start is computed from the input's shape."""
    nodes = [node("Shape", ["x"], ["n"], start=0, end=1), node("Sub", ["n", "one"], ["s"]), node("Slice", ["x", "s", "n", "zero"])]
    return Graph(nodes, {"x": normal(rng, 5, 3)}, {"one": np.array([1]), "zero": np.array([0])})


def three(kind):
    return lambda rng: Graph([node(kind, ["a", "b", "c"])], {name: normal(rng, 3, 4) for name in "abc"})


def resize_by_fraction(rng):
    x, scales = normal(rng, 1, 2, 5, 4), np.array([1, 1, rng.choice([0.7, 1.3, 1.5]), 2.3], np.float32)
    return Graph([node("Resize", ["x", "", "s"], mode="nearest", coordinate_transformation_mode="asymmetric")], {"x": x}, {"s": scales}, fixed=True)


def one_group(rng):
    return Graph([node("GroupNormalization", ["x", "s", "b"], num_groups=1)], {"x": normal(rng, 2, 6, 3, 4)}, {"s": normal(rng, 6), "b": normal(rng, 6)},
                 fixed=True)


def nonpad(rng):
    feeds = {"q": normal(rng, 2, 2, 3, 8), "k": normal(rng, 2, 2, 5, 8), "v": normal(rng, 2, 2, 5, 8), "n": rng.integers(1, 5, (2,))}
    return Graph([node("Attention", ["q", "k", "v", "", "", "", "n"])], feeds, fixed=True)


def quantize_unsigned(rng):
    nodes = [node("QuantizeLinear", ["x", "s"], ["q"]), node("DequantizeLinear", ["q", "s"])]
    return Graph(nodes, {"x": normal(rng, 3, 4) * 3}, {"s": np.float32(0.1)})


def integer_quotient(rng):
    return Graph([node("Div", ["a", "b"])], {"a": np.array([-7, 7]), "b": np.array([2, -2])})


def integer_mean(rng):
    return Graph([node("ReduceMean", ["x", "a"])], {"x": rng.integers(0, 9, (3, 4))}, {"a": np.array([1])})


def negative_index(rng):
    return Graph([node("Gather", ["x", "i"], axis=0)], {"x": normal(rng, 4, 3), "i": np.array([-1, 0])}, dynamic=("x",))


def einsum(rng):
    return Graph([node("Einsum", ["a", "b"], equation="bij,bjk->bik")], {"a": normal(rng, 2, 3, 4), "b": normal(rng, 2, 4, 5)})


def trilu(rng):
    return Graph([node("Trilu", ["x", "k"], upper=int(rng.integers(0, 2)))], {"x": normal(rng, 4, 5)}, {"k": np.array(int(rng.integers(-2, 3)))}, fixed=True)


FAMILIES = {
    **{kind: binary(kind) for kind in ("Add", "Sub", "Mul", "Max", "Min", "Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual")},
    "Div": binary("Div", integers=False, positive=True), "Div of integers": binary("Div", positive=True), "Pow": binary("Pow", integers=False, positive=True),
    **{kind: binary(kind, boolean=True) for kind in ("And", "Or", "Xor")},
    **{kind: unary(kind) for kind in ("Neg", "Abs", "Exp", "Sin", "Cos", "Sinh", "Cosh", "Atan", "Asinh", "Erf", "Floor", "Ceil", "Round", "Sign",
                                      "Relu", "Sigmoid", "Tanh", "Softplus", "Softsign", "IsNaN", "Identity")},
    "Log": unary("Log", 0.1), "Sqrt": unary("Sqrt", 0), "Reciprocal": unary("Reciprocal", 0.2), "Tan": unary("Tan", -1, 1),
    "Asin": unary("Asin", -1, 1), "Acos": unary("Acos", -1, 1), "Atanh": unary("Atanh", -0.9, 0.9), "Acosh": unary("Acosh", 1.1, 4),
    "LeakyRelu": unary("LeakyRelu", alpha=uniform(0, 1)), "Elu": unary("Elu", alpha=uniform(0.5, 2)), "Swish": unary("Swish", alpha=uniform(0.5, 2)),
    "HardSigmoid": unary("HardSigmoid", alpha=uniform(0.1, 0.5), beta=uniform(0, 1)), "ThresholdedRelu": unary("ThresholdedRelu", alpha=uniform(0, 1)),
    "Gelu": unary("Gelu", approximate=lambda rng, rank: str(rng.choice(["none", "tanh"]))), "Softmax": unary("Softmax", rank=2, axis=any_axis),
    "Clip": clip, "Cast": cast, "Cast to 16 bits": half, "Where": where, "Transpose": transpose, "Reshape": reshape, "Reshape by shape": reshape_computed,
    "Squeeze": squeeze, "Unsqueeze": unsqueeze, "Flatten": flatten, "Concat": concat, "Slice": slice_, "Split": split, "Expand": expand, "Tile": tile,
    "Shape": shape_of, "Range": range_, "ConstantOfShape": constant_of_shape, "Gather": gather, "Gather from the end": gather_negative,
    "GatherElements": gather_elements, "GatherND": gather_nd, "ScatterElements": scatter_elements, "ScatterND": scatter_nd, "OneHot": one_hot, "Pad": pad,
    "Resize": resize, **{kind: reduce(kind) for kind in ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL2", "ReduceSumSquare")},
    "TopK": top_k, "ArgMax": arg_max, "CumSum": cumulative, "MatMul": matmul, "Gemm": gemm, "Conv": convolution, "LayerNormalization": layer_norm,
    "RMSNormalization": rms_norm, "GroupNormalization": group_norm, "InstanceNormalization": instance_norm, "RotaryEmbedding": rotary,
    "Attention": attention, "TensorScatter": tensor_scatter, "DequantizeLinear": dequantize, "QuantizeLinear": quantize, "Mod": modulo, "Trilu": trilu,
    "Attention of flat heads": flat_attention, "Round to even": halves, "Resize to sizes": resize_to, "Slice by shape": last_elements,
    **{kind: unary(kind) for kind in ("HardSwish", "Mish", "Celu", "IsInf")}, **{kind: unary(kind, rank=2, axis=any_axis) for kind in ("LogSoftmax", "Hardmax")},
    **{f"{kind} of three": three(kind) for kind in ("Sum", "Mean", "Max", "Min")}}

DIFFERENT = {  # what TensorRT reads otherwise than ONNX says, without a word: family, smallest difference
    "GroupNormalization of one group": (one_group, 0.1), "Attention with nonpad_kv_seqlen": (nonpad, 0.1),
    "QuantizeLinear without a zero point": (quantize_unsigned, 0.1), "Resize by a scale that gives no whole size": (resize_by_fraction, 0.1),
    "Selu": (unary("Selu", low=1.0), 2e-6)}

REFUSED = {  # what TensorRT's documentation does not define, or this interpreter does not know: family, words of the refusal
    "quotient of integers": (integer_quotient, "which way it rounds"), "mean of integers": (integer_mean, "how it rounds"),
    "negative index along a dynamic axis": (negative_index, "undefined"), "Einsum": (einsum, "EINSUM node_of_y: expected one of ACTIVATION")}
