"""Each planted fault is seen in the network that TensorRT parsed.

Beside it stands what ONNX Runtime says of the same graph: where it passes there, only the interpreter shows
the fault on a machine without a GPU.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engines.bundle.reader import Bundle
from engines.errors import InputError
from engines.interpreter import Network, parsed_from_network
from engines.sessions.interpreter import InterpreterSession
from engines.tensorrt.module import log_of
from engines.tensorrt.network import network_from_onnx
from star_export.golden.cases import component_cases
from star_export.golden.compare import compare
from star_export.golden.run_case import run_case
from star_export.golden.tolerances import tolerances_of

trt = pytest.importorskip("tensorrt_rtx")
DATA = "model.onnx.data"
ONE_TOKEN = ("decode", "last_slot")


def parsed_file(path, capacity_tokens):
    with log_of(trt).collect():
        builder = trt.Builder(log_of(trt))
        network, parser = network_from_onnx(trt, builder, path, capacity_tokens=capacity_tokens)
        return parsed_from_network(trt, network, owner=(builder, parser))


def interpreted(path, spec, cases, name):
    """`passes`, `fails`, or `refuses` with the words."""
    try:
        session = InterpreterSession(Network(parsed_file(path, 24), wide=True), spec)
        results = [
            r
            for case in cases.values()
            for r in run_case(session, case, tolerances=tolerances_of(name, "fp32", {}))
        ]
    except InputError as error:
        return f"refuses: {error.where}"
    return "passes" if all(r.passed for r in results) else "fails"


def on_onnxruntime(path, cases, name):
    import onnxruntime

    try:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.add_session_config_entry(
            "session.qdq_matmulnbits_accuracy_level", "1"
        )  # float32, as our sessions have it
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names, results = [o.name for o in session.get_outputs()], []
        for case in cases.values():
            got = dict(zip(names, session.run(None, case.inputs)))
            results += compare(got, case.outputs, tolerances=tolerances_of(name, "fp32", {}))
    except Exception as error:  # the library raises bare exceptions
        return f"refuses: {error}"
    return "passes" if all(r.passed for r in results) else "fails"


def attend(model):
    """(body of the attention function, its Attention node)."""
    body = model.functions[0]
    return body, next(n for n in body.node if n.op_type == "Attention")


def lengths_instead_of_the_mask(model):
    body, node = attend(model)
    before = [
        helper.make_node("Shape", ["query"], ["tokens"], start=2, end=3),
        helper.make_node("Add", ["write_indices", "tokens"], ["used"]),
    ]
    node.input[:] = ["query", "present_key", "present_value", "", "", "", "used"]
    nodes = [*before, *body.node]
    del body.node[:]
    body.node.extend(nodes)


def causal_instead_of_the_mask(model):
    _, node = attend(model)
    node.input[:] = list(node.input)[:3]
    node.attribute.append(helper.make_attribute("is_causal", 1))


def write_index_off_by_one(model):
    model.graph.initializer.append(numpy_helper.from_array(np.array([1]), "one_more"))
    model.graph.node.insert(0, helper.make_node("Add", ["write_indices", "one_more"], ["written_behind"]))
    for node in model.graph.node:
        if node.op_type == "KVCacheAttention":
            node.input[5] = "written_behind"


def keys_and_values_swapped(model):
    node = next(n for n in model.graph.node if n.op_type == "KVCacheAttention")
    node.input[1], node.input[2] = node.input[2], node.input[1]


def cache_axis_wrong(model):
    for node in model.functions[0].node:
        if node.op_type == "TensorScatter":
            node.attribute[0].CopyFrom(helper.make_attribute("axis", 1))


def weight_transposed(model):
    name = next(i.name for i in model.graph.initializer if i.name.endswith("q_proj.weight"))
    model.graph.node.insert(0, helper.make_node("Transpose", [name], ["turned"], perm=[1, 0]))
    next(n for n in model.graph.node if n.op_type == "MatMul" and n.input[1] == name).input[1] = "turned"


def bias_dropped(model):
    node = next(
        n for n in model.graph.node if n.op_type == "Add" and any(i.endswith("k_proj.bias") for i in n.input)
    )
    rest = next(i for i in node.input if not i.endswith("k_proj.bias"))
    node.CopyFrom(helper.make_node("Identity", [rest], list(node.output)))


def position_axes_exchanged(model):
    node = next(
        n
        for n in model.graph.node
        if n.op_type == "Gather"
        and any(
            i.name == n.input[1] and len(numpy_helper.to_array(i)) == 8
            for i in model.graph.initializer
            if i.data_type == TensorProto.INT64
        )
    )
    stored = next(i for i in model.graph.initializer if i.name == node.input[1])
    stored.CopyFrom(numpy_helper.from_array(np.array([0, 2, 1])[numpy_helper.to_array(stored)], stored.name))


@dataclass
class Fault:
    plant: object
    here: str
    onnxruntime: str
    cases: tuple[str, ...] | None = None


FAULTS = {  # what reading back says, what ONNX Runtime says
    "nonpad_kv_seqlen instead of the mask": Fault(lengths_instead_of_the_mask, "fails", "passes", ONE_TOKEN),
    "is_causal instead of the mask": Fault(causal_instead_of_the_mask, "fails", "fails"),
    "write index off by one": Fault(write_index_off_by_one, "fails", "fails", ("prefill", "decode", "steps")),
    "K and V swapped": Fault(keys_and_values_swapped, "fails", "fails"),
    "cache axis wrong": Fault(cache_axis_wrong, "refuses", "refuses"),
    "weight transposed": Fault(weight_transposed, "fails", "fails"),
    "bias dropped": Fault(bias_dropped, "fails", "fails"),
    "position axes exchanged": Fault(position_axes_exchanged, "fails", "fails"),
}


@pytest.fixture(scope="module")
def decoder(mini_bundle):
    bundle = Bundle.open(mini_bundle)
    spec = bundle.component("base_ar")
    return bundle, spec, component_cases(bundle.file(spec.golden), spec)


def planted(bundle, folder, plant):
    """The graph of `base_ar` with a fault, its weights beside it."""
    model = onnx.load(bundle.graph("base_ar"), load_external_data=False)
    plant(model)
    shutil.copy(bundle.path / "base_ar" / DATA, folder / DATA)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder / "model.onnx"


def test_without_a_fault_both_pass(decoder, tmp_path):
    bundle, spec, cases = decoder
    path = planted(bundle, tmp_path, lambda model: None)
    assert (interpreted(path, spec, cases, "base_ar"), on_onnxruntime(path, cases, "base_ar")) == (
        "passes",
        "passes",
    )


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_seen_in_the_network(decoder, tmp_path, name):
    (bundle, spec, cases), fault = decoder, FAULTS[name]
    path = planted(bundle, tmp_path, fault.plant)
    chosen = {case: cases[case] for case in fault.cases or cases}
    here, there = interpreted(path, spec, chosen, "base_ar"), on_onnxruntime(path, chosen, "base_ar")
    assert (here.partition(":")[0], there.partition(":")[0]) == (fault.here, fault.onnxruntime), (
        f"{here}\n{there}"
    )


def nibbles_swapped(model):
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.INT4:
            tensor.raw_data = bytes((byte >> 4 | byte << 4) & 0xFF for byte in tensor.raw_data)


def scales_of_longer_blocks(model):
    """Every block has the scale of the first of a pair, as if blocks were twice as long."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear":
            scales = stored[node.input[1].removesuffix(".wide")]  # the twin casts them
            size = len(scales.raw_data) // scales.dims[0]
            rows = [scales.raw_data[i * size : (i + 1) * size] for i in range(scales.dims[0])]
            scales.raw_data = b"".join(rows[i // 2 * 2] for i in range(len(rows)))


def block_size_doubled(model):
    """The attribute alone."""
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "DequantizeLinear" and attribute.name == "block_size":
                attribute.i *= 2


QUANTISED = {  # TensorRT takes the block from the scales' shape and ignores block_size: it lacks that fault
    "int4 nibbles swapped": Fault(nibbles_swapped, "fails", "fails"),
    "block size wrong": Fault(scales_of_longer_blocks, "fails", "fails"),
    "block size wrong, scales right": Fault(block_size_doubled, "passes", "refuses"),
    "none": Fault(lambda model: None, "passes", "passes"),
}


@pytest.mark.parametrize("name", QUANTISED)
def test_a_fault_in_quantised_weights_is_seen_in_the_network(bundle_of, tmp_path, name):
    bundle, fault = Bundle.open(bundle_of("int4")), QUANTISED[name]
    spec = bundle.component("base_ar")
    cases = component_cases(bundle.file(spec.golden), spec)
    for graph in ("model.onnx", "twin.onnx"):
        model = onnx.load(bundle.path / "base_ar" / graph)
        fault.plant(model)
        (tmp_path / graph).write_bytes(model.SerializeToString())
    here, there = (
        interpreted(tmp_path / "model.onnx", spec, cases, "base_ar"),
        on_onnxruntime(tmp_path / "twin.onnx", cases, "base_ar"),
    )
    assert (here.partition(":")[0], there.partition(":")[0]) == (fault.here, fault.onnxruntime), (
        f"{here}\n{there}"
    )


def test_an_answer_that_hangs_on_the_order_of_equals_is_seen(tmp_path):
    """TensorRT promises nothing of the order of equals, so the other one is computed too, and differs."""
    x, k = (helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 8]), np.array([1]))
    best = [helper.make_tensor_value_info(name, kind, [1, 1]) for name, kind in (("v", 1), ("i", 7))]
    node = helper.make_node("TopK", ["x", "k"], ["v", "i"])
    graph = helper.make_graph([node], "top", [x], best, [numpy_helper.from_array(k, "k")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)
    onnx.save(model, tmp_path / "model.onnx")
    parsed = parsed_file(tmp_path / "model.onnx", None)
    feeds = {"x": np.float32([[1, 3, 2, 3, 0, 3, 1, 2]])}
    ids = {ties: Network(parsed, ties=ties).run(feeds)["i"].tolist() for ties in ("first", "last")}
    assert ids == {"first": [[1]], "last": [[5]]}


def test_the_image_head_does_not_hang_on_the_order_of_equals(mini_bundle, tmp_path):
    """Two ids with the same weights tie for first place: the lower one is drawn in either order."""
    bundle = Bundle.open(mini_bundle)
    spec = bundle.component("image_head")
    case = component_cases(bundle.file(spec.golden), spec)["greedy"]
    wanted = int(case.outputs["image_ids"][0, 0])
    model = onnx.load(bundle.graph("image_head"))
    for tensor in model.graph.initializer:
        if tensor.name.startswith("image_head."):
            array = numpy_helper.to_array(tensor).copy()
            array[..., -1] = array[..., wanted]
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    ids, _, logits = session.run(["image_ids", "inputs_embeds", "logits"], case.inputs)
    assert ids.tolist() == [[wanted]] and logits[0, 0, -1] == logits[0, 0, wanted] == logits.max()
    parsed = parsed_file(tmp_path / "model.onnx", None)
    for ties in ("first", "last"):
        assert Network(parsed, ties=ties).run(case.inputs)["image_ids"].tolist() == [[wanted]]
