"""Random small ONNX graphs, one family per operator: how TensorRT reads each must be what ONNX means."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

DTYPES = {
    np.dtype("float32"): TensorProto.FLOAT,
    np.dtype("int64"): TensorProto.INT64,
    np.dtype("bool"): TensorProto.BOOL,
    np.dtype("int32"): TensorProto.INT32,
}


@dataclass
class Graph:
    """Nodes, inputs (name -> array) and constants; the outputs are `y`, and `z` where there are two.

    `fixed` inputs have no dynamic axis; of those named in `dynamic` the first axis is dynamic.
    """

    nodes: list
    feeds: dict[str, np.ndarray]
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    outputs: tuple[str, ...] = ("y",)
    fixed: bool = False
    dynamic: tuple[str, ...] = ()
    stored: tuple = ()  # constants as TensorProto, of types that numpy has not

    def model(self, rng):
        """(the graph as ONNX, what ONNX's reference evaluator computes);
        at most one axis of each input is dynamic."""
        values = []
        for name, array in self.feeds.items():
            shape: list = list(array.shape)
            if name in self.dynamic or shape and not self.fixed and rng.random() < 0.6:
                shape[0 if name in self.dynamic else rng.integers(len(shape))] = f"{name}_size"
            values.append(helper.make_tensor_value_info(name, DTYPES[array.dtype], shape))
        constants = [
            *self.stored,
            *(numpy_helper.from_array(np.asarray(array), name) for name, array in self.constants.items()),
        ]
        graph = helper.make_graph(
            self.nodes,
            "g",
            values,
            [helper.make_empty_tensor_value_info(name) for name in self.outputs],
            constants,
        )
        model = helper.make_model(graph, ir_version=11, opset_imports=[helper.make_opsetid("", 24)])
        wanted = dict(
            zip(
                self.outputs,
                map(
                    np.asarray,
                    ReferenceEvaluator(model).run(None, {k: v.copy() for k, v in self.feeds.items()}),
                ),
            )
        )
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
    return tuple(kept[rng.integers(0, len(kept)) :]) if rng.random() < 0.3 else tuple(kept)


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
        return Graph(
            [node(kind, ["x"], **{k: (v(rng, x.ndim) if callable(v) else v) for k, v in attributes.items()})],
            {"x": x},
        )

    return make


def any_axis(rng, rank):
    return int(rng.integers(-rank, rank))


def uniform(low, high):
    return lambda rng, rank: float(rng.uniform(low, high))


def clip(rng):
    return Graph(
        [node("Clip", ["x", "low", "high"])],
        {"x": normal(rng, *shape(rng))},
        {"low": np.float32(rng.uniform(-1, 0)), "high": np.float32(rng.uniform(0, 1))},
    )


def cast(rng):
    x = [normal(rng, 3, 4) * 3, rng.integers(-4, 5, (2, 5)), rng.random((4,)) < 0.5][rng.integers(3)]
    return Graph(
        [
            node(
                "Cast",
                ["x"],
                to=int(
                    rng.choice([TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL])
                ),
            )
        ],
        {"x": x},
    )


def half(rng):
    kind = int(rng.choice([TensorProto.FLOAT16, TensorProto.BFLOAT16]))
    nodes = [
        node("Cast", ["x"], ["h"], to=kind),
        node("Add", ["h", "h"], ["d"]),
        node("Cast", ["d"], to=TensorProto.FLOAT),
    ]
    return Graph(nodes, {"x": normal(rng, *shape(rng)) * 50})


def where(rng):
    size = shape(rng)
    return Graph(
        [node("Where", ["c", "a", "b"])],
        {
            "c": rng.random(broadcastable(rng, size)) < 0.5,
            "a": normal(rng, *size),
            "b": normal(rng, *broadcastable(rng, size)),
        },
    )


def modulo(rng):
    if rng.random() < 0.3:
        return Graph([node("Mod", ["a", "b"], fmod=1)], {"a": normal(rng, 3, 4) * 9, "b": normal(rng, 3, 4)})
    return Graph(
        [node("Mod", ["a", "b"])],
        {"a": rng.integers(-20, 20, (3, 4)), "b": rng.choice([-3, -2, 2, 3], (3, 4))},
    )


def halves(rng):
    """Numbers halfway between two integers."""
    return Graph([node("Round", ["x"])], {"x": (rng.integers(-9, 9, (4, 5)) / 2).astype(np.float32)})


def three(kind):
    return lambda rng: Graph([node(kind, ["a", "b", "c"])], {name: normal(rng, 3, 4) for name in "abc"})


def integer_quotient(rng):
    return Graph([node("Div", ["a", "b"])], {"a": np.array([-7, 7]), "b": np.array([2, -2])})


SIGNED = (
    "Neg",
    "Abs",
    "Exp",
    "Sin",
    "Cos",
    "Sinh",
    "Cosh",
    "Atan",
    "Asinh",
    "Erf",
    "Floor",
    "Ceil",
    "Round",
    "Sign",
    "Relu",
    "Sigmoid",
    "Tanh",
    "Softplus",
    "Softsign",
    "IsNaN",
    "IsInf",
    "Identity",
    "HardSwish",
    "Mish",
    "Celu",
)
BINARY = ("Add", "Sub", "Mul", "Max", "Min", "Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual")
ELEMENTS = {
    **{kind: binary(kind) for kind in BINARY},
    **{kind: binary(kind, boolean=True) for kind in ("And", "Or", "Xor")},
    "Div": binary("Div", integers=False, positive=True),
    "Div of integers": binary("Div", positive=True),
    "Pow": binary("Pow", integers=False, positive=True),
    **{kind: unary(kind) for kind in SIGNED},
    "Log": unary("Log", 0.1),
    "Sqrt": unary("Sqrt", 0),
    "Reciprocal": unary("Reciprocal", 0.2),
    "Tan": unary("Tan", -1, 1),
    "Asin": unary("Asin", -1, 1),
    "Acos": unary("Acos", -1, 1),
    "Atanh": unary("Atanh", -0.9, 0.9),
    "Acosh": unary("Acosh", 1.1, 4),
    "LeakyRelu": unary("LeakyRelu", alpha=uniform(0, 1)),
    "Elu": unary("Elu", alpha=uniform(0.5, 2)),
    "Swish": unary("Swish", alpha=uniform(0.5, 2)),
    "HardSigmoid": unary("HardSigmoid", alpha=uniform(0.1, 0.5), beta=uniform(0, 1)),
    "ThresholdedRelu": unary("ThresholdedRelu", alpha=uniform(0, 1)),
    "Gelu": unary("Gelu", approximate=lambda rng, rank: str(rng.choice(["none", "tanh"]))),
    "Clip": clip,
    "Cast": cast,
    "Cast to 16 bits": half,
    "Where": where,
    "Mod": modulo,
    "Round to even": halves,
    **{f"{kind} of three": three(kind) for kind in ("Sum", "Mean", "Max", "Min")},
}
