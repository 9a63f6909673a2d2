"""Classic graphs compute what the modern ones do,
with only what TensorRT 10.0's parser knows; the lint sees the rest."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import helper
from safetensors.numpy import load_file

from engines import plugins
from engines.bundle.reader import Bundle
from engines.errors import InputError
from engines.interpreter import Network, parsed_from_network
from engines.tensorrt.module import log_of
from engines.tensorrt.network import network_from_onnx
from star_export.components import COMPONENTS, DIFFUSION
from star_export.graph import lint, ops
from star_export.graph.classic import classic_from_graph
from star_export.graph.quantize import twin_from_graph

TOO_NEW = {
    "Attention",
    "TensorScatter",
    "RotaryEmbedding",
    "RMSNormalization",
    "GroupNormalization",
    "CumSum",
}  # which was a loop


def restored(model: ir.Model, *, opset: int = ops.OPSET) -> onnx.ModelProto:
    """A classic graph with the body of the plugin's function put back, under the modern opset or another."""
    for node in model.graph:
        if node.op_type == ops.NAME:
            node.attributes.clear()
    body = ops.function_body()
    if any(node.op_type == ops.NAME for node in model.graph):
        model.functions[body.identifier()] = body
    model.opset_imports[""] = opset
    return ir.to_proto(model)


def outputs(model: onnx.ModelProto | Path, folder: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    path = model
    if not isinstance(model, Path):
        path = folder / "restored.onnx"
        path.write_bytes(model.SerializeToString())
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(
        None, feeds
    )


def cases(folder: Path) -> list[dict[str, np.ndarray]]:
    """The inputs of a component's golden cases, by name."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for key, value in load_file(folder / "golden.safetensors").items():
        case, side, name = key.split("/", 2)
        if side == "in":
            found.setdefault(case, {})[name] = value
    return list(found.values())


@pytest.fixture
def bundle_with(request: pytest.FixtureRequest):
    """A function: a component -> a float32 bundle of the miniature that has it."""
    return lambda name: request.getfixturevalue("diffusion_bundle" if name in DIFFUSION else "mini_bundle")


@pytest.fixture
def linked(tmp_path):
    """A function: a component's folder in a bundle -> a folder with the same weights,
    to write another graph into."""

    def link(folder: Path) -> Path:
        for file in folder.glob("*.data"):
            shutil.copyfile(file, tmp_path / file.name)
        return tmp_path

    return link


@pytest.mark.parametrize("name", [name for name, row in COMPONENTS.items() if not row.table])
def test_a_classic_graph_with_its_body_restored_is_the_modern_one(bundle_with, linked, name: str) -> None:
    folder = bundle_with(name) / name
    model = ir.load(folder / "classic.onnx")
    assert not TOO_NEW & {node.op_type for node in model.graph.all_nodes()}
    assert model.opset_imports[""] == 20 and not model.functions
    here, graph = linked(folder), restored(model)
    for feeds in cases(folder):
        for ours, theirs in zip(
            outputs(graph, here, feeds), outputs(folder / "model.onnx", here, feeds), strict=True
        ):
            scale = max(float(np.abs(theirs).max()), 1e-6)
            np.testing.assert_allclose(
                ours / scale, theirs / scale, rtol=0, atol=0 if theirs.dtype == np.int64 else 5e-6
            )


@pytest.mark.parametrize("name", [name for name, row in COMPONENTS.items() if not row.table])
def test_a_classic_graph_as_a_tensorrt_parser_reads_it_is_the_modern_one(
    bundle_with, linked, name: str
) -> None:
    """By the parser of TensorRT for RTX,
    which is newer than the targets' own; the plugin's function has its body."""
    trt = pytest.importorskip("tensorrt_rtx")
    folder = bundle_with(name) / name
    here = linked(folder)
    (here / "read.onnx").write_bytes(restored(ir.load(folder / "classic.onnx"), opset=20).SerializeToString())
    builder = trt.Builder(log_of(trt))
    for feeds in cases(folder):
        capacity = next((x.shape[2] for key, x in feeds.items() if key.startswith("past")), None)
        parsed, parser = network_from_onnx(trt, builder, here / "read.onnx", capacity_tokens=capacity)
        network = Network(parsed_from_network(trt, parsed, owner=(builder, parser)), wide=True)
        read = network.run({key: x.copy() for key, x in feeds.items()})
        theirs = outputs(folder / "model.onnx", here, feeds)
        for ours, wanted in zip((read[t.name] for t in network.outputs), theirs, strict=True):
            scale = max(float(np.abs(wanted).max()), 1e-6)
            np.testing.assert_allclose(
                ours / scale, wanted / scale, rtol=0, atol=0 if wanted.dtype == np.int64 else 5e-6
            )


def running_sums(size: int, **attributes) -> ir.Model:
    """x [N, size] -> CumSum along the last axis, as a stored modern graph has it."""
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", size]) for name in "xy")
    node = helper.make_node("CumSum", ["x", "axis"], ["y"], name="sums", **attributes)
    axis = helper.make_tensor("axis", onnx.TensorProto.INT64, [], [-1])
    graph = helper.make_graph([node], "sums", [x], [y], [axis])
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10))


@pytest.mark.parametrize("size", [1, 2, 48, 64, 1000, 2048])
def test_running_sums_are_right_never_fall_and_stay_where_zeros_follow(tmp_path: Path, size: int) -> None:
    """So that an id without probability is never drawn."""
    model = classic_from_graph(running_sums(size))
    assert "CumSum" not in {node.op_type for node in model.graph}
    rng = np.random.default_rng(size)
    x = np.exp(rng.normal(0, 4, (50, size))).astype(np.float32)
    kept = rng.integers(1, size + 1, 50)
    x[np.arange(size) >= kept[:, None]] = 0
    (sums,) = outputs(ir.to_proto(model), tmp_path, {"x": x})
    np.testing.assert_allclose(sums, x.astype(np.float64).cumsum(-1), rtol=2e-6)
    assert (np.diff(sums, axis=-1) >= 0).all()
    assert all((row[k - 1 :] == row[k - 1]).all() for row, k in zip(sums, kept))


@pytest.mark.parametrize("attributes", [{"exclusive": 1}, {"reverse": 1}], ids=str)
def test_other_running_sums_are_refused(attributes: dict) -> None:
    with pytest.raises(AssertionError, match="sums .CumSum.: the classic dialect expects"):
        classic_from_graph(running_sums(64, **attributes))


@pytest.mark.parametrize("precision,opset", [("bf16", 20), ("int4", 21)])
def test_the_twins_of_a_16_bit_graphs_two_dialects_agree(
    bundle_of, linked, precision: str, opset: int
) -> None:
    folder = bundle_of(precision) / "base_ar"
    model = ir.load(folder / "classic.onnx")
    assert model.opset_imports[""] == opset
    here, graph, feeds = linked(folder), restored(twin_from_graph(model)), cases(folder)[0]
    for ours, theirs in zip(
        outputs(graph, here, feeds), outputs(folder / "twin.onnx", here, feeds), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


def test_a_twins_attention_is_written_for_the_cpu_and_the_stored_graphs_is_not(bundle_of) -> None:
    """With equal results, so that only this and the time of a step show it."""
    folder = bundle_of("int4") / "base_ar"
    bodies = [
        ir.load(folder / name).functions[(ops.DOMAIN, ops.NAME, "")] for name in ("twin.onnx", "model.onnx")
    ]
    twins, stored = ([node.op_type for node in body] for body in bodies)
    assert stored == ["TensorScatter", "TensorScatter", "Attention"]
    assert twins == [node.op_type for node in ops.cpu_function_body(heads=4, kv_heads=2)]


def test_the_plugins_nodes_carry_its_version_and_fields_and_the_manifest_its_abi(mini_bundle: Path) -> None:
    bundle = Bundle.open(mini_bundle)
    for name, spec in bundle.manifest.components.items():
        graph = onnx.load(bundle.graph(name, dialect="classic"), load_external_data=False).graph
        nodes = [node for node in graph.node if node.op_type == plugins.NAME]
        assert spec.plugin_abi == (plugins.ABI if nodes else None) and bool(nodes) == (
            name in bundle.manifest.model.cache
        )
        for node in nodes:
            fields = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            assert fields == {
                "num_heads": 4,
                "num_kv_heads": 2,
                "head_dim": 16,
                "cache_type": 0,
                "scale": 0.25,
                "plugin_version": str(plugins.ABI).encode(),
                "plugin_namespace": b"",
            }


def test_int8_caches_are_int8_at_the_boundary(mini_bundle: Path) -> None:
    model = classic_from_graph(ir.load(mini_bundle / "base_ar" / "model.onnx"), cache="int8")
    caches = [
        v for v in (*model.graph.inputs, *model.graph.outputs) if v.name.startswith(("past", "present"))
    ]
    assert len(caches) == 16 and all(
        v.dtype == ir.DataType.INT8 and list(v.shape) == ["B", 2, "C", 20] for v in caches
    )
    assert {n.attributes["cache_type"].value for n in model.graph if n.op_type == plugins.NAME} == {1}
    lint.check_graph(model, dialect="classic")


def first(model: ir.Model, op: str) -> ir.Node:
    return next(node for node in model.graph if node.op_type == op)


def with_body(model):
    model.functions[ops.function_body().identifier()] = ops.function_body()


def modern_opset(model):
    model.opset_imports[""] = 24


def new_operator(model):
    model.graph.append(
        ir.node("RMSNormalization", [model.graph.inputs[0], model.graph.inputs[0]], name="late")
    )


def other_meaning(model):
    model.graph.append(
        ir.node("GroupNormalization", [model.graph.inputs[0]] * 3, {"num_groups": 2}, name="late")
    )


def contrib(model):
    model.graph.append(
        ir.node("FusedMatMul", [model.graph.inputs[0]] * 2, domain="com.microsoft", name="late")
    )


def other_version(model):
    first(model, ops.NAME).attributes["plugin_version"] = ir.AttrString("plugin_version", "0")


def other_heads(model):
    first(model, ops.NAME).attributes["num_kv_heads"] = ir.AttrInt64("num_kv_heads", 3)


def other_scale(model):
    first(model, ops.NAME).attributes["scale"] = ir.AttrFloat32("scale", 1.0)


def no_fields(model):
    first(model, ops.NAME).attributes.clear()


@pytest.mark.parametrize(
    "plant,rule",
    [
        (with_body, "function-body"),
        (modern_opset, "opset"),
        (new_operator, "operator"),
        (other_meaning, "operator"),
        (contrib, "operator-domain"),
        (other_version, "plugin-version"),
        (other_heads, "plugin-field"),
        (other_scale, "plugin-field"),
        (no_fields, "plugin-field"),
    ],
    ids=lambda p: getattr(p, "__name__", p),
)
def test_a_planted_trap_is_refused_by_its_rule(mini_bundle: Path, plant, rule: str) -> None:
    model = ir.load(mini_bundle / "base_ar" / "classic.onnx")
    lint.check_graph(model, dialect="classic")
    plant(model)
    with pytest.raises(InputError) as error:
        lint.check_graph(model, dialect="classic")
    assert f"[{rule}]" in error.value.where


def test_what_the_plugin_cannot_compute_is_refused_for_its_targets(mini_bundle: Path) -> None:
    with pytest.raises(InputError) as error:
        lint.check_graph(mini_bundle / "base_ar" / "classic.onnx", target="orin-agx-jp62")
    assert all(
        words in error.value.where for words in ("[head-dim]", "(64, 128), got 16", "[attention-type]")
    )
    lint.check_graph(mini_bundle / "vq_decoder" / "classic.onnx", target="orin-agx-jp62")
