"""The twelve faults that the gate is tested with, planted at one layer of a decoder's ONNX graph.

Each function plants one in a model whose weights are external, and returns what a bisection must name: the
tensor of the reference, and the names of the nodes that are to blame, one of which it names or lists as not
compared on the way.
"""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from star_export.validator.bisect import Bisection, first_wrong_case
from star_export.validator.candidates import candidate_from_graph, modules_from_graph
from star_export.validator.reference import Reference

Blame = tuple[str, set[str]]


def plant(model: onnx.ModelProto, fault: str, layer: int, *, decoder: str = "base_ar") -> Blame:
    """Plant `fault` at `layer` of `decoder`, in any precision."""
    return FAULTS[fault](model, f"{decoder}.layers.{layer}", layer)


def some_of(fault: str, places: Sequence) -> object:
    """One of `places`, which depends on the fault's name alone."""
    return places[np.random.default_rng(zlib.crc32(fault.encode())).integers(0, len(places))]


def check_found(reference: Reference, fault: str, layer: int, folder: Path) -> None:
    """Plant `fault` in a copy of the reference's graph, in `folder`, and check that it is found there."""
    right = reference.bundle.graph(reference.name, twin=True)
    model = onnx.load(right, load_external_data=False)
    module, nodes = plant(model, fault, layer, decoder=reference.part.component)
    found = bisected(reference, model, folder)
    first = found.first
    assert first is not None and first.module == module, (first, module)
    assert not first.wrong and (first.inputs or layer == reference.part.layers[0])
    assert nodes & {first.node, *first.between}


def bisected(reference: Reference, model: onnx.ModelProto, folder: Path) -> Bisection:
    """Compare `model`, which has the weights of the reference's graph, in `folder`."""
    right = reference.bundle.graph(reference.name, twin=True)
    for weights in reference.bundle.weights(reference.name):
        shutil.copy(reference.bundle.path / weights, folder)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return first_wrong_case(candidate_from_graph(path), modules_from_graph(right), reference)


def _tensor(model: onnx.ModelProto, module: str) -> str:
    """The value whose metadata names a tensor of the reference."""
    values = (*model.graph.value_info, *model.graph.output)
    (name,) = {v.name for v in values for entry in v.metadata_props if entry.value == module}
    return name


def _maker(model: onnx.ModelProto, tensor: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if tensor in node.output)


def _attention(model: onnx.ModelProto, layer: int) -> onnx.NodeProto:
    past = f"past_key_values.{layer}.key"
    return next(n for n in model.graph.node if n.op_type == "KVCacheAttention" and past in n.input)


def _constant(model: onnx.ModelProto, name: str, value: object, kind: type = np.float32) -> str:
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(value, kind), name))
    return name


def _insert(model: onnx.ModelProto, before: onnx.NodeProto, nodes: Iterable[onnx.NodeProto]) -> set[str]:
    """Put `nodes` before a node, and return their names."""
    at, names = list(model.graph.node).index(before), set()
    for i, node in enumerate(nodes):
        node.name = f"planted_{i}"
        names.add(node.name)
        model.graph.node.insert(at + i, node)
    return names


def _behind(
    model: onnx.ModelProto, tensor: str, made: Callable[[str, str], list[onnx.NodeProto]]
) -> set[str]:
    """Let nodes, `made` of (what was computed, what is read from now on), stand behind the tensor's node."""
    maker = _maker(model, tensor)
    raw = f"{tensor}.raw"
    maker.output[list(maker.output).index(tensor)] = raw
    nodes = list(model.graph.node)
    after = nodes[nodes.index(maker) + 1]
    return _insert(model, after, made(raw, tensor))


def _behind_weight(
    model: onnx.ModelProto, module: str, made: Callable[[str, str], list[onnx.NodeProto]]
) -> set[str]:
    """The same between the weight of a linear layer, once it is decoded, and the product that reads it."""
    product = _maker(model, _tensor(model, module))
    while product.op_type not in ("MatMul", "Gemm"):  # a bias or a factor of rows comes after it
        *_, product = (n for n in model.graph.node if set(n.output) & set(product.input))
    weight = product.input[1]
    product.input[1] = f"{weight}.spoilt"
    return _insert(model, product, made(weight, product.input[1]))


def keys_and_values_swapped(model, at, layer) -> Blame:
    node = _attention(model, layer)
    node.input[1], node.input[2] = node.input[2], node.input[1]
    return f"{at}.self_attn.attention:0", {node.name}


def rope_off_by_one(model, at, layer) -> Blame:
    rotate = _maker(model, _tensor(model, f"{at}.self_attn.rotate:0"))
    decoder = at.partition(".")[0]
    angles = _maker(model, _tensor(model, f"{decoder}.rotary:0")).input[0]
    nodes = [
        helper.make_node("Add", [angles, f"{decoder}.rotary.inv_freq"], ["later"]),
        helper.make_node("Cos", ["later"], ["later_cos"]),
        helper.make_node("Sin", ["later"], ["later_sin"]),
    ]
    names = _insert(model, rotate, nodes)
    rotate.input[1:] = ["later_cos", "later_sin"]
    return f"{at}.self_attn.rotate:0", names


def mask_dropped(model, at, layer) -> Blame:
    node = _attention(model, layer)
    nodes = [
        helper.make_node("Not", [node.input[6]], ["hidden"]),
        helper.make_node("Or", [node.input[6], "hidden"], ["everything"]),
    ]
    names = _insert(model, node, nodes)
    node.input[6] = "everything"
    return f"{at}.self_attn.attention:0", names


def layer_zeroed(model, at, layer) -> Blame:
    node = _maker(model, _tensor(model, at))
    stream = _tensor(model, f"{at}.post_attention_layernorm:in")
    node.CopyFrom(helper.make_node("Identity", [stream], list(node.output), name=node.name))
    return at, {node.name}


def weight_transposed(model, at, layer) -> Blame:
    module = f"{at}.self_attn.q_proj"
    return module, _behind_weight(
        model, module, lambda a, b: [helper.make_node("Transpose", [a], [b], perm=[1, 0])]
    )


def bf16_twice(model, at, layer) -> Blame:
    scale = _constant(model, "scale", 1.1)
    steps = [
        ("Mul", ["{0}", scale], {}),
        ("Cast", ["scaled"], {"to": TensorProto.BFLOAT16}),
        ("Cast", ["narrow"], {"to": TensorProto.FLOAT}),
        ("Div", ["wide", scale], {}),
    ]

    def made(a: str, b: str) -> list[onnx.NodeProto]:
        outputs = ["scaled", "narrow", "wide", b]
        return [
            helper.make_node(op, [i.format(a) for i in inputs], [out], **attributes)
            for (op, inputs, attributes), out in zip(steps, outputs, strict=True)
        ]

    return f"{at}.mlp.up_proj", _behind_weight(model, f"{at}.mlp.up_proj", made)


def last_slot_not_written(model, at, layer) -> Blame:
    key = _attention(model, layer).input[1]
    one, two = _constant(model, "one", [1], np.int64), _constant(model, "two", [2], np.int64)
    zero = _constant(model, "zero", 0.0)

    def made(a: str, b: str) -> list[onnx.NodeProto]:
        return [
            helper.make_node("Shape", [key], ["tokens"], start=2, end=3),
            helper.make_node("Sub", ["tokens", one], ["before_last"]),
            helper.make_node("Add", ["write_indices", "before_last"], ["last_slot"]),
            helper.make_node("ReduceMean", [key, two], ["mean"], keepdims=1),
            helper.make_node("Mul", ["mean", zero], ["nothing"]),
            helper.make_node("TensorScatter", [a, "nothing", "last_slot"], [b], axis=-2, mode="linear"),
        ]

    return f"{at}.self_attn.attention:1", _behind(model, f"present.{layer}.key", made)


def channels_reversed(model, at, layer) -> Blame:
    start, end, axis, step = (
        _constant(model, name, [value], np.int64)
        for name, value in (("start", -1), ("end", -(1 << 40)), ("axis", -1), ("step", -1))
    )
    module = f"{at}.self_attn.o_proj"
    return module, _behind(
        model,
        _tensor(model, module),
        lambda a, b: [helper.make_node("Slice", [a, start, end, axis, step], [b])],
    )


def wrong_mean_and_deviation(model, at, layer) -> Blame:
    mean, deviation = _constant(model, "mean_", 0.48), _constant(model, "deviation", 0.27)
    module = f"{at}.post_attention_layernorm"
    return module, _behind(
        model,
        _tensor(model, module),
        lambda a, b: [
            helper.make_node("Sub", [a, mean], ["shifted"]),
            helper.make_node("Div", ["shifted", deviation], [b]),
        ],
    )


def fp16_overflow(model, at, layer) -> Blame:
    large = _constant(model, "large", 1e6)
    module = f"{at}.mlp.down_proj:in"
    return module, _behind(
        model,
        _tensor(model, module),
        lambda a, b: [
            helper.make_node("Mul", [a, large], ["grown"]),
            helper.make_node("Cast", ["grown"], ["half"], to=TensorProto.FLOAT16),
            helper.make_node("Cast", ["half"], ["whole"], to=TensorProto.FLOAT),
            helper.make_node("Div", ["whole", large], [b]),
        ],
    )


def not_a_number(model, at, layer) -> Blame:
    bad = _constant(model, "bad", np.nan)
    module = f"{at}.mlp.gate_proj"
    return module, _behind(
        model, _tensor(model, module), lambda a, b: [helper.make_node("Add", [a, bad], [b])]
    )


def output_missing(model, at, layer) -> Blame:
    name, node = f"present.{layer}.value", _attention(model, layer)
    node.output[list(node.output).index(name)] = "renamed"
    model.graph.output.remove(next(value for value in model.graph.output if value.name == name))
    return f"{at}.self_attn.attention:2", {node.name}


FAULTS: dict[str, Callable[..., Blame]] = {
    "k and v swapped": keys_and_values_swapped,
    "rope off by one": rope_off_by_one,
    "mask dropped": mask_dropped,
    "layer zeroed": layer_zeroed,
    "weight transposed": weight_transposed,
    "bf16 twice": bf16_twice,
    "last slot not written": last_slot_not_written,
    "channels bgr": channels_reversed,
    "wrong mean and std": wrong_mean_and_deviation,
    "fp16 overflow": fp16_overflow,
    "a number that is not one": not_a_number,
    "an output missing": output_missing,
}
