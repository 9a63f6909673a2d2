"""Products with fp8 and nvfp4 weights: ONNX Runtime and TensorRT compute what the reference computes, and a
plan reads the weights as they are stored."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from engines.errors import InputError
from star_export.golden.activations import round_activations, rounded_to_nvfp4, unrounded
from star_export.graph import lint, nvfp4
from star_export.graph.precisions import PRECISIONS
from tests.helpers.linear_graphs import WEIGHTS, products_graph, random, written
from tests.helpers.plan_layers import PlanTensor, compiled, written_out

K, N = 128, 64


def on_cpu(path: Path, x: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, {"x": x})


@pytest.fixture(params=["fp8", "nvfp4"])
def products(request, tmp_path):
    """(precision, path of the stored graph, path of its twin, weights) of two products of one input."""
    weights = {name: random(N, K, seed=i) * 0.05 for i, name in enumerate(WEIGHTS)}
    path = tmp_path / "model.onnx"
    return request.param, path, written(products_graph(K, N), weights, request.param, path), weights


def test_the_twin_computes_what_the_reference_computes(products):
    precision, _, twin, weights = products
    x = random(2, 5, K, seed=7) * torch.tensor([1e-3, 1.0, 40.0, 1e4, 0.0])[:, None]
    given = rounded_to_nvfp4(x) if precision == "nvfp4" else x
    for name, got in zip(WEIGHTS, on_cpu(twin, x.numpy()), strict=True):
        wanted = given @ PRECISIONS[precision].rounded(name, weights[name]).T
        scale = wanted.abs().amax(-1, keepdim=True) + 1e-30
        np.testing.assert_allclose(got / scale, wanted / scale, atol=2e-6)
        plain = x @ weights[name].T
        assert bool(((wanted - plain).abs() / scale > 5e-3).any()), "rounding must be visible"


def test_tensorrts_network_computes_what_the_twin_computes(products):
    trt = pytest.importorskip("tensorrt_rtx")
    from engines.interpreter import Network, parsed_from_network
    from engines.tensorrt.module import log_of

    _, path, twin, _ = products
    x = random(2, 3, K, seed=8).numpy()
    builder = trt.Builder(log_of(trt))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log_of(trt))
    assert parser.parse_from_file(str(path))
    read = parsed_from_network(trt, network, owner=(builder, parser))
    wide, narrow = (Network(read, wide=wide).run({"x": x}) for wide in (True, False))
    for i, wanted in enumerate(on_cpu(twin, x)):
        np.testing.assert_allclose(wide[f"y{i}"], wanted, atol=1e-6 * np.abs(wanted).max())
        np.testing.assert_allclose(narrow[f"y{i}"], wanted, atol=0.1 * np.abs(wanted).max())


@pytest.mark.parametrize(
    "precision, sm, code", [("fp8", "SM89", "FP8"), ("nvfp4", "SM120", "FP4E2M1"), ("int4", "SM89", "Int4")]
)
def test_a_plan_of_what_is_written_reads_weights_as_they_are_stored(precision, sm, code, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    size, path = 512, tmp_path / "model.onnx"
    weights = {name: random(size, size, seed=i) for i, name in enumerate(WEIGHTS)}
    written(products_graph(size, size), weights, precision, path)
    plan = compiled(path, tmp_path, sm=sm, ranges={"x": [[1, 1, size], [2, 1, size], [2, 64, size]]})
    read = [
        math.prod(constant.shape)
        for layer in plan.layers
        if PlanTensor((-1, size), "BFloat16") in layer.outputs or layer.kind == "gemm"
        for constant in layer.constants
        if constant.dtype == code
    ]
    assert sum(n for n in read if n >= size**2) == 2 * size**2 and not written_out(plan, size**2)


def test_products_that_share_an_input_share_its_rounding(products):
    precision, path, twin, _ = products
    model = ir.load(path)
    roundings = [node for node in model.graph if (node.domain, node.op_type) == nvfp4.QUANTIZE]
    assert len(roundings) == (precision == "nvfp4")
    for graph in (path, twin):
        onnx.checker.check_model(str(graph))
        lint.check_graph(graph)


def test_the_twin_reads_the_codes_where_they_are_stored(products):
    precision, path, twin, _ = products
    tensors = [
        {v.name: v.const_value for v in ir.load(file).graph.initializers.values()} for file in (path, twin)
    ]
    name = f"{WEIGHTS[0]}.codes"
    stored, read = (found[name] for found in tensors)
    assert isinstance(stored, ir.ExternalTensor) and isinstance(read, ir.ExternalTensor)
    assert (stored.offset, stored.length) == (read.offset, read.length)
    kinds = {"fp8": "FLOAT8E4M3FN FLOAT8E4M3FN", "nvfp4": "FLOAT4E2M1 UINT4"}
    assert f"{stored.dtype.name} {read.dtype.name}" == kinds[precision]


def test_activations_are_rounded_on_the_reference_except_within_unrounded():
    module = nn.Module()
    module.base_ar = nn.Sequential(nn.Linear(32, 8))
    module.text_head = nn.Linear(32, 8)
    round_activations(module, PRECISIONS["nvfp4"])
    x, (linear,) = random(3, 32), module.base_ar
    plain = nn.functional.linear(x, linear.weight, linear.bias)
    with torch.no_grad():
        assert torch.equal(linear(x), nn.functional.linear(rounded_to_nvfp4(x), linear.weight, linear.bias))
        assert not torch.equal(linear(x), plain)
        with unrounded(module.base_ar):
            assert torch.equal(linear(x), plain)
        head = module.text_head
        assert torch.equal(head(x), nn.functional.linear(x, head.weight, head.bias))
    assert not torch.equal(linear(x), plain)


def test_rounding_a_row_depends_on_nothing_but_the_row():
    """Its scale is its own: a row times a power of two is rounded to the same numbers times that."""
    x = random(4, 64)
    assert torch.equal(rounded_to_nvfp4(x * 2**-12), rounded_to_nvfp4(x) * 2**-12)
    assert torch.equal(rounded_to_nvfp4(x)[2:3], rounded_to_nvfp4(x[2:3]))
    assert not rounded_to_nvfp4(torch.zeros(2, 64)).any()


def test_a_graph_for_a_target_without_the_format_is_refused_with_what_it_takes(products):
    precision, path, _, _ = products
    good, bad = {"fp8": ("rtx-4090", "rtx-3090"), "nvfp4": ("rtx-5090", "rtx-4090")}[precision]
    lint.check_graph(path, target=good)
    with pytest.raises(InputError, match=rf"\[weight-format\].*int4.*got {precision}"):
        lint.check_graph(path, target=bad)


@pytest.mark.parametrize("products", ["nvfp4"], indirect=True)
def test_nvfp4_weights_without_nvfp4_activations_are_refused(products):
    model = ir.load(products[1])
    for node in [node for node in model.graph if node.op_type == "MatMul"]:
        node.replace_input_with(0, next(v for n in model.graph for v in n.outputs if v.name == "narrow"))
    with pytest.raises(
        InputError, match=r"\[nvfp4-activations\] product0: expected activations in nvfp4, got narrow"
    ):
        lint.check_graph(model)


@pytest.mark.parametrize("products", ["fp8"], indirect=True)
def test_fp8_weights_in_blocks_are_refused(products):
    model = ir.load(products[1])
    for node in [node for node in model.graph if node.op_type == "DequantizeLinear"]:
        node.attributes["block_size"] = ir.AttrInt64("block_size", 32)
    with pytest.raises(InputError, match=r"\[fp8-blocks\]"):
        lint.check_graph(model)
