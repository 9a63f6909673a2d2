"""The step of TensorRT for RTX: a real library builds and says no, a fake one says yes, and a probe that
crashes is an answer.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from engines import targets
from tests.gpu import rtx, rtx_probe
from tests.gpu.report import Report
from tests.gpu.runner import PREDICTIONS
from tests.helpers import fake_tensorrt


@pytest.fixture
def bundle(tmp_path) -> Path:
    """A decoder of one layer, made by hand."""
    from tests.helpers.decoder_bundle import write_decoder_bundle

    return write_decoder_bundle(tmp_path / "bundle")


def test_the_table_of_targets_stays_what_it_is() -> None:
    target = rtx_probe.foreign_target("CURRENT", here=(9, 0))
    assert (target.sm, target.compute_capability, target.builder) == ("CURRENT", (9, 0), "tensorrt_rtx")
    assert target.name not in targets.TARGETS and targets.TARGETS["a100"].sm == "sm_80"


def test_a_real_library_builds_for_another_chip_and_its_answer_is_recorded(
    bundle, tmp_path, monkeypatch
) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(rtx, "COMPONENT", "base_ar")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # where there is a GPU, not to run on it
    report = Report(tmp_path / "report.json")
    assert not rtx.probed(tmp_path, bundle, "SM80", report) and not rtx.probed(
        tmp_path, bundle, "CURRENT", report
    )
    facts = report.record["facts"]
    assert (facts["SM80: build"], facts["SM80: load"], facts["CURRENT: build"]) == (
        "a plan",
        "refused",
        "no plan",
    )
    assert facts["SM80: load: said"]["validity"] == "INVALID" and any(
        "deserializeCudaEngine" in s for s in facts["SM80: load: said"]["said"]
    )
    assert any("generateForCurrent" in said for said in facts["CURRENT: build: said"]["said"])
    assert facts.keys() <= json.loads((PREDICTIONS / "rtx.json").read_text()).keys()


def test_a_plan_that_loads_is_run_once(bundle, tmp_path, monkeypatch) -> None:
    from engines.bundle.reader import Bundle
    from engines.tensorrt import device

    blocks: dict = {}
    monkeypatch.setattr(
        device,
        "allocate",
        lambda size: blocks.setdefault((block := np.zeros(size, np.uint8)).ctypes.data, block).ctypes.data,
    )
    monkeypatch.setattr(device, "release", lambda address: None)
    monkeypatch.setattr(device, "stream", lambda: fake_tensorrt.STREAM)
    monkeypatch.setattr(
        device, "copy_to_device", lambda address, a: ctypes.memmove(address, a.ctypes.data, a.nbytes)
    )
    monkeypatch.setattr(
        device, "copy_to_host", lambda a, address: ctypes.memmove(a.ctypes.data, address, a.nbytes)
    )
    diagnostics = {"VERSION_MISMATCH": 1, "UNSUPPORTED_CC": 2}
    runtime = SimpleNamespace(
        get_engine_validity=lambda data: (SimpleNamespace(name="SUBOPTIMAL"), 2),
        deserialize_cuda_engine=lambda data: fake_tensorrt.Engine(blocks),
    )
    module = SimpleNamespace(
        Runtime=lambda log: runtime,
        EngineInvalidityDiagnostics=SimpleNamespace(__members__=diagnostics),
        ExecutionContextAllocationStrategy=fake_tensorrt.TRT.ExecutionContextAllocationStrategy,
    )
    (tmp_path / "a.plan").write_bytes(b"plan")
    found = rtx_probe.load(module, None, Bundle.open(bundle), "base_ar", "SM80", tmp_path / "a.plan")
    assert (found["answer"], found["validity"], found["diagnostics"], found["finite"]) == (
        "ran",
        "SUBOPTIMAL",
        ["UNSUPPORTED_CC"],
        True,
    )
    assert found["largest"] > 0


@pytest.mark.parametrize(
    "code, answer",
    [
        (
            "import os, signal; print('loaded', flush=True); os.kill(os.getpid(), signal.SIGSEGV)",
            "crashed with status -11",
        ),
        ("import time; time.sleep(60)", "no answer within 1 s"),
    ],
)
def test_a_probe_that_ends_badly_is_an_answer(monkeypatch, tmp_path, code, answer) -> None:
    monkeypatch.setattr(rtx, "PROBE_SECONDS", 1)
    script = tmp_path / "python"
    script.write_text(f"#!{sys.executable}\n{code}\n")
    script.chmod(0o755)
    monkeypatch.setattr(rtx.sys, "executable", str(script))
    found = rtx.answer("load")
    assert found["answer"] == answer and ("crashed" not in answer or "loaded" in found["output"][0])
