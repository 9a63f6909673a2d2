"""The lint refuses each planted trap of a target's parser by rule and node name, and passes a right graph."""

from __future__ import annotations

from collections.abc import Callable

import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from engines.errors import InputError
from star_export.graph import lint, ops

CACHE = ["B", 2, "C", 16]


def cached_attention(kind: int = TensorProto.BFLOAT16, head_dim: int = 16) -> onnx.ModelProto:
    """The smallest right graph: one call of star::KVCacheAttention."""
    cache = [*CACHE[:3], head_dim]
    tensors = {
        "query": ["B", 4, "S", head_dim],
        "key": ["B", 2, "S", head_dim],
        "value": ["B", 2, "S", head_dim],
        "past_key": cache,
        "past_value": cache,
    }
    inputs = [helper.make_tensor_value_info(n, kind, s) for n, s in tensors.items()]
    inputs += [
        helper.make_tensor_value_info("write_indices", TensorProto.INT64, ["B"]),
        helper.make_tensor_value_info("mask", TensorProto.BOOL, ["B", 1, "S", "C"]),
    ]
    outputs = [
        helper.make_tensor_value_info("output", kind, tensors["query"]),
        helper.make_tensor_value_info("present_key", kind, cache),
        helper.make_tensor_value_info("present_value", kind, cache),
    ]
    node = helper.make_node(
        ops.NAME, [i.name for i in inputs], [o.name for o in outputs], name="layer0", domain=ops.DOMAIN
    )
    return helper.make_model(
        helper.make_graph([node], "decoder", inputs, outputs),
        functions=[ir.to_proto(ops.function_body())],
        opset_imports=[helper.make_opsetid("", 24), helper.make_opsetid(ops.DOMAIN, 1)],
        ir_version=11,
    )


def body(model: onnx.ModelProto, op_type: str) -> onnx.NodeProto:
    return next(node for node in model.functions[0].node if node.op_type == op_type)


def attribute(node: onnx.NodeProto, name: str, value) -> None:
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


def nonpad(model):
    body(model, "Attention").input.extend(["", "", "write_indices"])


def causal(model):
    attribute(body(model, "Attention"), "is_causal", 1)


def no_mask(model):
    del body(model, "Attention").input[3:]


def two_outputs(model):
    body(model, "Attention").output.append("extra")


def circular(model):
    attribute(body(model, "TensorScatter"), "mode", "circular")


def wrong_axis(model):
    attribute(body(model, "TensorScatter"), "axis", 1)


def copied_cache(model):
    call = model.graph.node[0]
    call.input[3] = "copied"
    model.graph.node.insert(0, helper.make_node("Identity", ["past_key"], ["copied"], name="copy"))


def hidden_cache(model):
    del model.graph.output[1]


def no_body(model):
    del model.functions[:]


def contrib(model):
    model.graph.node.append(
        helper.make_node("FusedMatMul", ["query", "query"], ["z"], name="fused", domain="com.microsoft")
    )


def other_opset(model):
    model.opset_import[0].version = 20


def many_candidates(model):
    model.graph.initializer.append(helper.make_tensor("k", TensorProto.INT64, [1], [4000]))
    model.graph.node.append(helper.make_node("TopK", ["query", "k"], ["v", "i"], name="rank"))


def run_time_k(model):
    model.graph.node.append(helper.make_node("TopK", ["query", "write_indices"], ["v", "i"], name="rank"))


def foreign_data(model):
    tensor = helper.make_tensor("w", TensorProto.FLOAT, [1], [0.0])
    tensor.ClearField("float_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "../other.data"), ("offset", "0"), ("length", "4")):
        tensor.external_data.add(key=key, value=value)
    model.graph.initializer.append(tensor)


PLANTED: dict[Callable, tuple[str, str]] = {
    nonpad: ("nonpad-kv-seqlen", "attend"),
    causal: ("is-causal", "attend"),
    no_mask: ("attention-mask", "attend"),
    two_outputs: ("attention-outputs", "attend"),
    circular: ("scatter-mode", "write_key"),
    wrong_axis: ("scatter-axis", "write_key"),
    copied_cache: ("cache-input", "layer0"),
    hidden_cache: ("cache-output", "layer0"),
    no_body: ("function-body", "graph"),
    contrib: ("operator-domain", "fused"),
    other_opset: ("opset", "graph"),
    many_candidates: ("top-k-limit", "rank"),
    run_time_k: ("top-k-constant", "rank"),
    foreign_data: ("external-data", "w"),
}


def check(model: onnx.ModelProto, **options) -> None:
    lint.check_graph(ir.from_proto(model), **options)


def test_the_right_graph_passes_everywhere() -> None:
    for target in (None, "rtx-3090", "rtx-4090", "rtx-5090"):
        check(cached_attention(), target=target)


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_planted_trap_is_refused_by_rule_and_node(plant) -> None:
    model = cached_attention()
    plant(model)
    rule, node = PLANTED[plant]
    with pytest.raises(InputError) as error:
        check(model)
    assert f"[{rule}] {node}" in error.value.where


@pytest.mark.parametrize(
    "options,rule", [({"kind": TensorProto.FLOAT}, "attention-type"), ({"head_dim": 12}, "head-dim")]
)
def test_a_targets_own_rules_apply_to_that_target_only(options, rule) -> None:
    model = cached_attention(**options)
    check(model)
    with pytest.raises(InputError) as error:
        check(model, target="rtx-4090")
    assert f"[{rule}] layer0" in error.value.where


def test_a_file_that_is_no_model_is_refused(tmp_path) -> None:
    for name, data in (("empty.onnx", b""), ("image.onnx", b"\xff\xd8\xff\xe0JFIF" * 9)):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError):
            lint.check_graph(tmp_path / name)
