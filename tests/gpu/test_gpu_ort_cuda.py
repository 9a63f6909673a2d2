"""The step of ONNX Runtime's CUDA provider, on the CPU with the miniature model: every part, and what does
not load."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from engines.bundle.reader import Bundle
from engines.sessions import open_session, run
from tests.gpu import ort_cuda
from tests.gpu.adapt import adapted_bundle
from tests.gpu.report import Report


@pytest.fixture
def measured(bundle_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Measure the miniature bundle in a precision; the record."""
    for name, value in {
        "IMAGES": 1,
        "QUESTIONS": 1,
        "STEPS": 2,
        "SHORT": 2,
        "LONG": 4,
        "CAPACITY_TOKENS": 32,
    }.items():
        monkeypatch.setattr(ort_cuda, name, value)

    def run(precision: str) -> dict:
        report = Report(tmp_path / "report.json")
        plan = ort_cuda.Plan(
            device="cpu",
            precisions=(precision,),
            score=False,
            repeats=1,
            limit_seconds=60,
            bundle=lambda name, out: Path(shutil.copytree(bundle_of(name), out)),
        )
        ort_cuda.measure(plan, tmp_path, report)
        return json.loads((tmp_path / "report.json").read_text())

    return run


def test_a_precision_that_loads_is_measured_in_all_parts(measured) -> None:
    record = measured("fp32")
    facts, figures = record["facts"], record["figures"]
    assert record["checks"] == {
        "fp32: ids equal the CPU's": {"passed": True, "detail": "images [1.0, 1.0], answers [True]"}
    }
    assert record["not_run"] == []
    assert figures["fp32: share of image ids equal to the CPU's"]["min"] == 1.0
    assert figures["fp32: decode step, CUDA graph off"]["unit"] == "ms"
    assert (
        facts["fp32: operators not taken by CPU"] == {}
        and facts["fp32 as exported: base_ar"]["CPU"]["TensorScatter"] == 8
    )
    assert set(facts["fp32: per image token"]) >= {"kernel launches", "syncs", "copies", "GPU ms"}


def test_a_precision_that_does_not_load_says_which_operator_is_missing_and_is_not_run(measured) -> None:
    record = measured("int4")
    refused = record["facts"]["int4: operators not taken by CPU"]
    assert "DequantizeLinear-24 (int4, bfloat16)" in refused and "Resize-19 (bfloat16, -, float)" in refused
    assert (
        "does not load" in record["facts"]["int4 as exported: base_ar"]
        and "does not load" in record["facts"]["int4 adapted: base_ar"]
    )
    assert "int4 adapted: ids, score, time" in record["not_run"][0]["part"]
    assert record["figures"] == {} and record["checks"] == {}


def test_ids_that_differ_fail_the_check(measured, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def drawn(star, real=ort_cuda.drawn):
        found = real(star)
        calls.append(found)
        if len(calls) == 2:
            found["images"][0][0, 3] += 1
        return found

    monkeypatch.setattr(ort_cuda, "drawn", drawn)
    record = measured("fp32")
    assert not record["checks"]["fp32: ids equal the CPU's"]["passed"]
    assert record["figures"]["fp32: share of image ids equal to the CPU's"]["min"] == 15 / 16


def test_an_adapted_bundle_is_valid_and_has_no_operator_that_cuda_lacks(bundle_of, tmp_path: Path) -> None:
    import onnx_ir as ir

    bundle = adapted_bundle(bundle_of("int4"), tmp_path / "adapted")
    opened = Bundle.open(bundle)
    for component in opened.manifest.components:
        nodes = list(ir.load(opened.graph(component)).graph)
        assert not [n for n in nodes if n.op_type == "DequantizeLinear"]
        assert not [n for n in nodes if n.op_type == "Resize" and n.inputs[0].dtype == ir.DataType.BFLOAT16]
    for component, count, bits in (("base_ar", 7 * 4, 4), ("text_head", 1, 8), ("image_head", 1, 8)):
        graph = ir.load(bundle / component / "model.onnx").graph
        fused = [n for n in graph if n.op_type == "MatMulNBits"]
        assert len(fused) == count and {n.attributes["bits"].value for n in fused} == {bits}, component


def test_twins_and_tables_of_an_adapted_bundle_read_what_they_did(bundle_of, tmp_path: Path) -> None:
    bundles = bundle_of("int4"), adapted_bundle(bundle_of("int4"), tmp_path / "adapted")
    shown = np.arange(6).reshape(1, 6)
    feeds = {
        "text_head": {"hidden_states": np.random.default_rng(0).standard_normal((1, 1, 64), np.float32)},
        "image_embedding": {"image_ids": shown},
        "token_embedding": {"input_ids": shown},
    }
    for name, given in feeds.items():
        found = []
        for bundle in bundles:
            with closing(open_session(Bundle.open(bundle), name)) as session:
                found.append(list(run(session, given).values())[0])
        np.testing.assert_array_equal(*found, err_msg=name)
