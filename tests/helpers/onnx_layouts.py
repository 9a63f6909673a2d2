"""Random graphs of operators that move elements, or read and write by index. See onnx_graphs."""

from __future__ import annotations

import numpy as np
from onnx import numpy_helper

from tests.helpers.onnx_graphs import Graph, any_axis, broadcastable, node, normal, shape


def transpose(rng):
    x = normal(rng, *shape(rng))
    return Graph([node("Transpose", ["x"], perm=rng.permutation(x.ndim).tolist())], {"x": x})


def reshape(rng):
    x = normal(rng, 2, 3, 4)
    target = [[0, -1], [6, 4], [-1, 2, 2], [0, 0, 2, 2], [4, 3, 2], [-1]][rng.integers(6)]
    return Graph([node("Reshape", ["x", "s"])], {"x": x}, {"s": np.array(target)})


def reshape_computed(rng):
    """The target's sizes come from the input's own shape, at run time."""
    nodes = [
        node("Shape", ["x"], ["n"], start=0, end=1),
        node("Concat", ["n", "rest"], ["s"], axis=0),
        node("Reshape", ["x", "s"]),
    ]
    return Graph(nodes, {"x": normal(rng, *shape(rng, 2, 4))}, {"rest": np.array([-1])})


def squeeze(rng):
    x = normal(rng, 1, 3, 1, 2)
    return Graph(
        [node("Squeeze", ["x", "a"])],
        {"x": x},
        {"a": np.array([[0], [2], [0, 2], [-2], [-4, -2]][rng.integers(5)])},
        fixed=True,
    )


def unsqueeze(rng):
    return Graph(
        [node("Unsqueeze", ["x", "a"])],
        {"x": normal(rng, *shape(rng, 1, 3))},
        {"a": np.array([[0], [1], [0, 1], [-1]][rng.integers(4)])},
    )


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
    starts, ends = (
        np.where(steps > 0, starts, ends),
        np.where(steps > 0, ends, starts - 7 * (rng.random() < 0.3)),
    )
    names = ["x", "s", "e", "a", "t"]
    return Graph([node("Slice", names)], {"x": x}, {"s": starts, "e": ends, "a": axes, "t": steps})


def split(rng):
    axis = int(rng.integers(0, 3))
    return Graph(
        [node("Split", ["x", "n"], ["y", "z"], axis=axis)],
        {"x": normal(rng, 5, 5, 5)},
        {"n": np.array([2, 3])},
        ("y", "z"),
    )


def expand(rng):
    size = shape(rng, 2, 4)
    return Graph(
        [node("Expand", ["x", "s"])],
        {"x": normal(rng, *broadcastable(rng, size))},
        {"s": np.array(size)},
        fixed=True,
    )


def tile(rng):
    x = normal(rng, *shape(rng))
    return Graph([node("Tile", ["x", "n"])], {"x": x}, {"n": rng.integers(1, 4, x.ndim)})


def shape_of(rng):
    return Graph([node("Shape", ["x"])], {"x": normal(rng, *shape(rng))})


def range_(rng):
    """From the length of an input, as positions are made."""
    nodes = [
        node("Shape", ["x"], ["n1"], start=0, end=1),
        node("Squeeze", ["n1"], ["n"]),
        node("Range", ["start", "n", "step"]),
    ]
    return Graph(
        nodes,
        {"x": normal(rng, int(rng.integers(2, 9)))},
        {"start": np.array(int(rng.integers(-3, 2))), "step": np.array(int(rng.integers(1, 4)))},
    )


def constant_of_shape(rng):
    nodes = [
        node("Shape", ["x"], ["s"]),
        node("ConstantOfShape", ["s"], ["f"], value=numpy_helper.from_array(np.array([2.5], np.float32))),
        node("Add", ["f", "x"]),
    ]
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
    return Graph(
        [node("GatherElements", ["x", "i"], axis=axis)],
        {"x": x, "i": rng.integers(0, x.shape[axis], size)},
        fixed=True,
    )


def gather_nd(rng):
    batch, depth = int(rng.integers(0, 2)), int(rng.integers(1, 3))
    leading = (2,) if batch else shape(rng, 1, 1)
    return Graph(
        [node("GatherND", ["x", "i"], batch_dims=batch)],
        {"x": normal(rng, 2, 3, 4), "i": rng.integers(0, 2, (*leading, depth))},
        fixed=True,
    )


def scatter_elements(rng):
    x, axis = normal(rng, 4, 5), int(rng.integers(0, 2))
    i = np.argsort(rng.random((4, 5)), axis=axis)
    i = i[:2] if axis == 0 else i[:, :2]
    return Graph(
        [node("ScatterElements", ["x", "i", "u"], axis=axis)],
        {"x": x, "i": i, "u": normal(rng, *i.shape)},
        fixed=True,
    )


def scatter_nd(rng):
    rows = rng.choice(5, 3, replace=False)[:, None]
    return Graph(
        [node("ScatterND", ["x", "i", "u"])],
        {"x": normal(rng, 5, 4), "i": rows, "u": normal(rng, 3, 4)},
        fixed=True,
    )


def one_hot(rng):
    return Graph(
        [node("OneHot", ["i", "d", "v"], axis=any_axis(rng, 3))],
        {"i": rng.integers(0, 5, shape(rng, 2, 2))},
        {"d": np.array(5), "v": np.array([0.5, 2], np.float32)},
    )


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
    attributes = (
        {"nearest_mode": str(rng.choice(["floor", "ceil", "round_prefer_floor", "round_prefer_ceil"]))}
        if mode == "nearest"
        else {}
    )
    scales = np.array([1, 1, rng.choice([1, 2, 3]), rng.choice([1, 2, 3])], np.float32)
    return Graph(
        [node("Resize", ["x", "", "s"], mode=mode, coordinate_transformation_mode=transform, **attributes)],
        {"x": x},
        {"s": scales},
        fixed=True,
    )


def resize_to(rng):
    mode, transform = (
        str(rng.choice(["nearest", "linear"])),
        str(rng.choice(["asymmetric", "half_pixel", "align_corners"])),
    )
    sizes = np.array([1, 2, rng.integers(1, 9), rng.integers(1, 9)])
    return Graph(
        [node("Resize", ["x", "", "", "s"], mode=mode, coordinate_transformation_mode=transform)],
        {"x": normal(rng, 1, 2, 5, 4)},
        {"s": sizes},
        fixed=True,
    )


def last_elements(rng):
    """A slice whose start is computed from the input's shape."""
    nodes = [
        node("Shape", ["x"], ["n"], start=0, end=1),
        node("Sub", ["n", "one"], ["s"]),
        node("Slice", ["x", "s", "n", "zero"]),
    ]
    return Graph(nodes, {"x": normal(rng, 5, 3)}, {"one": np.array([1]), "zero": np.array([0])})


def trilu(rng):
    return Graph(
        [node("Trilu", ["x", "k"], upper=int(rng.integers(0, 2)))],
        {"x": normal(rng, 4, 5)},
        {"k": np.array(int(rng.integers(-2, 3)))},
        fixed=True,
    )


def resize_by_fraction(rng):
    x, scales = normal(rng, 1, 2, 5, 4), np.array([1, 1, rng.choice([0.7, 1.3, 1.5]), 2.3], np.float32)
    return Graph(
        [node("Resize", ["x", "", "s"], mode="nearest", coordinate_transformation_mode="asymmetric")],
        {"x": x},
        {"s": scales},
        fixed=True,
    )


def negative_index(rng):
    return Graph(
        [node("Gather", ["x", "i"], axis=0)], {"x": normal(rng, 4, 3), "i": np.array([-1, 0])}, dynamic=("x",)
    )


LAYOUTS = {
    "Transpose": transpose,
    "Reshape": reshape,
    "Reshape by shape": reshape_computed,
    "Squeeze": squeeze,
    "Unsqueeze": unsqueeze,
    "Flatten": flatten,
    "Concat": concat,
    "Slice": slice_,
    "Slice by shape": last_elements,
    "Split": split,
    "Expand": expand,
    "Tile": tile,
    "Shape": shape_of,
    "Range": range_,
    "ConstantOfShape": constant_of_shape,
    "Gather": gather,
    "Gather from the end": gather_negative,
    "GatherElements": gather_elements,
    "GatherND": gather_nd,
    "ScatterElements": scatter_elements,
    "ScatterND": scatter_nd,
    "OneHot": one_hot,
    "Pad": pad,
    "Resize": resize,
    "Resize to sizes": resize_to,
    "Trilu": trilu,
}
