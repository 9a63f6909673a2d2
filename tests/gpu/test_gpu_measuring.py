"""What the measuring steps share: parts in processes of their own, launches counted in a trace, operators
asked one by one, rewritings."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from engines.errors import MissingError
from star_export.graph.formats import INT4, INT8
from tests.gpu import adapt, launches
from tests.gpu.measuring import Parts, forked
from tests.gpu.operators import operators_of, placement, provider_of
from tests.gpu.report import Report

TRACE = {
    "traceEvents": [  # as torch.profiler writes it; Triton launches through the driver
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 10, "dur": 5, "tid": 1},
        {"cat": "cuda_driver", "name": "cuLaunchKernelEx", "ts": 11, "dur": 2, "tid": 1},
        {"cat": "cuda_runtime", "name": "cudaLaunchKernelExC", "ts": 20, "dur": 5, "tid": 1},
        {"cat": "cuda_driver", "name": "cuLaunchKernelEx", "ts": 30, "dur": 2, "tid": 1},
        {"cat": "cuda_runtime", "name": "cudaMemcpyAsync", "ts": 40, "dur": 2, "tid": 1},
        {"cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": 50, "dur": 2, "tid": 1},
        {"cat": "cuda_runtime", "name": "cudaStreamSynchronize", "ts": 60, "dur": 2, "tid": 1},
        {"cat": "cuda_runtime", "name": "cudaEventQuery", "ts": 70, "dur": 2, "tid": 1},
        {"cat": "cpu_op", "name": "cudaLaunchKernel lookalike", "ts": 80, "dur": 2, "tid": 1},
        {"cat": "kernel", "name": "gemm", "ts": 100, "dur": 1000},
        {"cat": "kernel", "name": "gemm", "ts": 1100, "dur": 1000},
        {"cat": "kernel", "name": "softmax", "ts": 1600, "dur": 1000},
        {"cat": "gpu_memcpy", "name": "Memcpy HtoD", "ts": 5000, "dur": 500},
        {"name": "without a category"},
    ]
}


def test_calls_are_counted_once_by_their_kind() -> None:
    assert launches.calls_of(TRACE) == {
        "graph launches": 1,
        "kernel launches": 3,
        "copies": 1,
        "fills": 0,
        "syncs": 1,
    }


def test_the_busy_time_counts_overlapping_kernels_once() -> None:
    busy_ms, activities, costliest = launches.kernels_of(TRACE)
    assert (busy_ms, activities) == (3.0, 4)  # 100 to 2600 and 5000 to 5500 microseconds
    assert costliest[0] == ("gemm", 2.0, 2)


def test_a_step_s_calls_are_the_difference_of_two_traces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def traced(call, path):
        steps = call()
        return {"traceEvents": TRACE["traceEvents"][3:4] * 7 + TRACE["traceEvents"] * steps}

    monkeypatch.setattr(launches, "traced", traced)
    found = launches.per_step(lambda steps: steps, tmp_path, short=1, long=4)
    assert (found["kernel launches"], found["syncs"], found["GPU activities"]) == (3, 1, 4)
    assert found["costliest"][0].startswith("gemm: 0.571 of the time")


def test_forked_parts_do_not_lose_each_other(tmp_path: Path) -> None:
    report = Report(tmp_path / "report.json")

    def crash(record: Report) -> None:
        record.figure("before the crash", [1.0, 2.0, 3.0], "ms")
        os.kill(os.getpid(), signal.SIGKILL)

    def hang(record: Report) -> None:
        record.fact("before the hang", "seen")
        time.sleep(60)

    def lacking(record: Report) -> None:
        raise MissingError("There is no GPU", where="here", fix="none")

    for part, work in (
        ("crash", crash),
        ("hang", hang),
        ("lacking", lacking),
        ("well", lambda record: record.fact("well", 1)),
    ):
        forked(report, part, work, seconds=2)
    record = json.loads((tmp_path / "report.json").read_text())
    assert record["figures"]["before the crash"]["median"] == 2.0 and record["facts"] == {
        "before the hang": "seen",
        "well": 1,
    }
    assert record["checks"] == {
        "crash": {"passed": False, "detail": "its process ended with -9"},
        "hang": {"passed": False, "detail": "killed after 2 s"},
    }
    assert "There is no GPU" in record["not_run"][0]["reason"]


def test_a_part_without_time_is_not_run_and_a_refusal_is_a_fact(tmp_path: Path) -> None:
    report = Report(tmp_path / "report.json")
    parts = Parts(report, limit_seconds=5, device="cpu")
    assert parts.enough("short", 1) and not parts.enough("long", 60)
    with parts.finding("refused"):
        raise RuntimeError("no such kernel")
    with parts("broken"):
        raise ValueError("a fault")
    assert report.record["not_run"][0]["part"] == "long"
    assert report.record["facts"]["refused"] == "RuntimeError: no such kernel"
    assert report.record["checks"]["broken"] == {"passed": False, "detail": "ValueError: a fault"}


def small(
    kind: int = TensorProto.FLOAT, *, bits: int | None = None, by_row: bool = False, features: int = 128
) -> onnx.ModelProto:
    """x [2,K] times a weight [K,6], dense or in codes; `by_row`: [6,K] in codes before a Transpose."""
    random, nodes = np.random.default_rng(0), []
    if bits:
        weight = torch.from_numpy(random.standard_normal((6, features), np.float32))
        encoded = (INT4 if bits == 4 else INT8).encode(weight, torch.float32)
        codes, scales = encoded.codes, encoded.scales
        layout = {"axis": 0}
        if not by_row:
            codes, scales = codes.T.contiguous(), scales.T.contiguous()
            layout = {"axis": 0, "block_size": 128} if bits == 4 else {"axis": 1}
        weights = [
            ir.Tensor(codes.numpy().astype(ml_dtypes.int4 if bits == 4 else np.int8), name="codes"),
            ir.Tensor(scales.numpy() if bits == 4 else scales.numpy().reshape(-1), name="scales"),
        ]
        made = "rows" if by_row else "w"
        nodes.append(
            helper.make_node("DequantizeLinear", ["codes", "scales"], [made], name="dequantize", **layout)
        )
        if by_row:
            nodes.append(helper.make_node("Transpose", ["rows"], ["w"], perm=[1, 0], name="turn"))
    else:
        weights = [ir.Tensor(random.standard_normal((features, 6), np.float32), name="w")]
    nodes.append(helper.make_node("MatMul", ["x", "w"], ["y"], name="multiply"))
    x, y = (
        helper.make_tensor_value_info(name, kind, [2, size]) for name, size in (("x", features), ("y", 6))
    )
    return graph_of(nodes, [x], [y], weights)


def graph_of(nodes, inputs, outputs, weights) -> onnx.ModelProto:
    model = helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs),
        opset_imports=[helper.make_opsetid("", 24)],
        ir_version=11,
    )
    model.graph.initializer.extend(ir.to_proto(w) for w in weights)
    return onnx.shape_inference.infer_shapes(model)


def output_of(model: onnx.ModelProto, feeds: dict) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    ).run(None, feeds)[0]


@pytest.mark.parametrize(
    ("bits", "by_row", "features"), [(4, False, 128), (8, False, 128), (8, True, 128), (8, True, 120)]
)
def test_matmulnbits_multiplies_the_same_weights(bits: int, by_row: bool, features: int) -> None:
    model = small(bits=bits, by_row=by_row, features=features)
    feeds = {"x": np.random.default_rng(1).standard_normal((2, features), np.float32)}
    wanted = output_of(model, feeds)
    graph = ir.from_proto(model)
    assert adapt.fuse_dequantize(graph) == 1
    assert [node.op_type for node in graph.graph] == ["MatMulNBits"]
    assert {"codes", "scales"}.isdisjoint(graph.graph.initializers)
    assert (
        np.allclose(output_of(ir.to_proto(graph), feeds), wanted, rtol=1e-5, atol=1e-5) and np.std(wanted) > 1
    )


def quantised_rows(operator: str, shape: tuple[int, ...], x: onnx.ValueInfoProto, order: list[str]):
    """A graph of one operator on int8 codes of `shape` with a scale for each row, and the weights."""
    random = np.random.default_rng(2)
    codes = random.integers(-127, 128, shape).astype(np.int8)
    scales = random.uniform(0.01, 0.1, shape[0]).astype(np.float32)
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "scales"], ["w"], name="dequantize", axis=0),
        helper.make_node(operator, order, ["used"], name="use"),
        helper.make_node("Identity", ["used"], ["y"], name="last"),
    ]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    weights = [ir.Tensor(codes, name="codes"), ir.Tensor(scales, name="scales")]
    return graph_of(nodes, [x], [y], weights)


@pytest.mark.parametrize("operator", ["Gather", "Conv"])
def test_what_is_looked_up_or_convolved_is_a_product_of_codes_and_scales(operator: str) -> None:
    if operator == "Gather":
        x, given = (
            helper.make_tensor_value_info("x", TensorProto.INT64, [2, 3]),
            np.array([[0, 5, 2], [1, 1, 4]]),
        )
        model = quantised_rows(operator, (6, 8), x, ["w", "x"])
    else:
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 5, 5])
        given = np.random.default_rng(1).standard_normal((1, 4, 5, 5), np.float32)
        model = quantised_rows(operator, (6, 4, 3, 3), x, ["x", "w"])
    graph = ir.from_proto(model)
    assert adapt.fuse_dequantize(graph) == 1
    assert "DequantizeLinear" not in [node.op_type for node in graph.graph]
    got, wanted = output_of(ir.to_proto(graph), {"x": given}), output_of(model, {"x": given})
    assert np.allclose(got, wanted, rtol=1e-5, atol=1e-5) and np.std(wanted) > 0.1


def test_a_layout_that_matmulnbits_does_not_have_is_refused() -> None:
    graph = ir.from_proto(small(bits=8))
    next(n for n in graph.graph if n.op_type == "DequantizeLinear").attributes["axis"] = ir.AttrInt64(
        "axis", 0
    )
    with pytest.raises(ValueError, match="dequantize: no MatMulNBits has axis 0"):
        adapt.fuse_dequantize(graph)


def test_resize_in_float32_copies_the_same_numbers() -> None:
    kind = TensorProto.BFLOAT16
    nodes = [
        helper.make_node("Cast", ["x"], ["half"], to=kind),
        helper.make_node(
            "Resize",
            ["half", "", "scales"],
            ["big"],
            mode="nearest",
            coordinate_transformation_mode="asymmetric",
            nearest_mode="floor",
            name="resize",
        ),
        helper.make_node("Cast", ["big"], ["y"], to=TensorProto.FLOAT),
    ]
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, 2, 2])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1, 4, 4])],
            [helper.make_tensor("scales", TensorProto.FLOAT, [4], [1, 1, 2, 2])],
        ),
        opset_imports=[helper.make_opsetid("", 24)],
        ir_version=11,
    )
    model, x = onnx.shape_inference.infer_shapes(model), np.array([[[[1.0, 2.5], [-3.0, 0.25]]]], np.float32)
    with pytest.raises(Exception, match="Resize"):
        output_of(model, {"x": x})
    graph = ir.from_proto(model)
    assert adapt.widen_resize(graph) == 1
    assert np.array_equal(output_of(ir.to_proto(graph), {"x": x}), x.repeat(2, -1).repeat(2, -2))


def test_operators_are_asked_one_by_one(mini_bundle: Path, tmp_path: Path) -> None:
    graph = mini_bundle / "base_ar" / "model.onnx"
    found = operators_of(ir.load(graph))
    assert {
        "TensorScatter-24 (float, float, int64)",
        "Attention-24 (float, float, float, bool)",
        "RMSNormalization-23 (float, float)",
        "RotaryEmbedding-23 (float, float, float)",
    } <= set(found)
    assert {provider_of(model, device="cpu") for model in found.values()} == {"CPU"}
    placed = placement(graph, tmp_path, device="cpu")
    assert placed["CPU"]["TensorScatter"] == 2 * placed["CPU"]["Attention"] == 8 and placed["Memcpy"] == {}
    refused = ir.from_proto(small())
    for value in (*refused.graph.inputs, *refused.graph.initializers.values(), *refused.graph[0].outputs):
        value.type = ir.TensorType(ir.DataType.BFLOAT16)
    ((name, model),) = operators_of(refused).items()
    assert name == "MatMul-13 (bfloat16, bfloat16)" and provider_of(model, device="cpu").startswith(
        "nowhere: "
    )
