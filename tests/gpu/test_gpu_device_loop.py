"""The step of the loop on the device, on emulated kernels: what holds is recorded, what does not fails, and
what is missing is not run.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from engines.bundle.reader import Bundle
from engines.errors import MissingError
from engines.sessions import tensorrt as tensorrt_sessions
from engines.sessions.device_loop import KERNELS, STEPS, WHOLE
from engines.targets import TARGETS
from engines.tensorrt import device, graphs, nvrtc
from engines.tensorrt.plan import read_build
from engines.tensorrt.profiles import Limits, profiles_from_limits
from tests.gpu import device_loop, launches, loop_observed, loop_plans, toy
from tests.gpu.report import Report
from tests.gpu.runner import PREDICTIONS, run_steps
from tests.helpers.emulated import ROOT
from tests.helpers.fake_cuda import Engine, FakeCuda, built
from tests.helpers.fake_tensorrt import TRT


@pytest.fixture(autouse=True)
def small(monkeypatch) -> None:
    """Little work, and no profiler."""
    for where, name, value in (
        (device_loop, "CASES", 2),
        (device_loop, "CODEBOOKS", (90, 300)),
        (device_loop, "NODES", 2),
        (device_loop, "REPEATS", 1),
        (device_loop, "TOKENS", 22),
        (device_loop, "REAL_TOKENS", 40),
        (device_loop, "REAL_HIDDEN", 300),
        (loop_observed, "REPEATS", 1),
        (loop_observed, "SHORT", 18),
    ):
        monkeypatch.setattr(where, name, value)
    monkeypatch.setattr(launches, "traced", lambda call, path: (call(), {"traceEvents": []})[1])


def recorded(tmp_path: Path, work) -> dict:
    report = Report(tmp_path / "report.json")
    work(report)
    return report.record


def failed(record: dict) -> list[str]:
    return [name for name, check in record["checks"].items() if not check["passed"]]


def predicted() -> dict:
    return json.loads((PREDICTIONS / "device_loop.json").read_text())


def names(record: dict) -> set[str]:
    return {name for kind in ("figures", "facts", "checks") for name in record[kind]}


def test_what_holds_is_recorded_and_was_predicted(monkeypatch, tmp_path) -> None:
    FakeCuda().install(monkeypatch)
    record = recorded(tmp_path, device_loop.kernels)
    toys = recorded(tmp_path, lambda report: device_loop.toys(tmp_path, report))
    assert failed(record) == failed(toys) == [] and record["not_run"] == toys["not_run"] == []
    assert {f"{name}: as on the CPU, bit for bit" for name in KERNELS} < names(record)
    seen = names(record) | names(toys)
    assert {n for n in predicted() if not n.startswith(("plans", "TensorRT", "REQUIRE_USER"))} == seen
    nothing = dict.fromkeys(launches.KINDS, 0.0)
    for label, how, launched in (("toy N1 W1", STEPS, 1.0), ("toy N1 W16", WHOLE, 0.0)):
        calls = toys["facts"][f"{label}: calls per token, {how}"]
        assert calls == nothing | {"graph launches": launched}
        assert calls == predicted()[f"{label}: calls per token, {how}"]["expected"]
    assert toys["facts"]["toy N1 W1: calls per token, the host's loop"]["copies"] > 3


@pytest.mark.parametrize(
    "right, wrong, broken",
    [
        ("right == i && (", "(", "advance"),
        ("round < 10", "round < 9", "noise"),
        ("if (from >= kept)", "if (from >= (kept > 0))", "feed"),
    ],
)
def test_a_kernel_that_computes_otherwise_fails_its_check(
    monkeypatch, tmp_path, right, wrong, broken
) -> None:
    source = (ROOT / "engines" / "tensorrt" / "loop.cu").read_text()
    (tmp_path / "loop.cu").write_text(source.replace(right, wrong))
    FakeCuda(kernels=built(tmp_path)).install(monkeypatch)
    record = recorded(tmp_path, device_loop.results)
    assert f"{broken}: as on the CPU, bit for bit" in failed(record)
    monkeypatch.setattr(device_loop, "SHAPES", ((2, 16),))
    toys = recorded(tmp_path, lambda report: device_loop.toys(tmp_path, report))
    if broken != "feed":  # known tokens are fed again where it changes no id
        assert any("ids are the CPU's" in name for name in failed(toys))


@pytest.mark.parametrize(
    "options, broken, missing",
    [
        ({"driver": 12030}, [], ["toy N1 W16: one CUDA graph per image"]),
        ({"refused": ("cuGraphAddNode",)}, ["toy N1 W16: one CUDA graph per image is taken"], []),
        (
            {"refused": ("cuGraphInstantiate",)},
            [f"toy N1 W{w}: {how} is taken" for w, how in ((1, STEPS), (16, WHOLE), (16, STEPS))],
            [],
        ),
    ],
)
def test_a_graph_that_cannot_be_is_told_and_the_rest_goes_on(
    monkeypatch, tmp_path, options, broken, missing
) -> None:
    FakeCuda(**options).install(monkeypatch)
    monkeypatch.setattr(device_loop, "SHAPES", ((1, 1), (1, 16)))
    record = recorded(tmp_path, lambda report: device_loop.toys(tmp_path, report))
    assert failed(record) == broken and [entry["part"] for entry in record["not_run"]] == missing
    assert record["checks"]["toy N1 W16: ids are the CPU's, without a CUDA graph"]["passed"]
    assert f"toy N1 W16: {loop_observed.ON_HOST}" in record["figures"]


def test_a_wait_per_token_fails_the_check_by_both_counts(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(device_loop, "SHAPES", ((1, 1),))
    waits = "toy N1 W1: the host neither copies nor waits"
    with monkeypatch.context() as patch:
        FakeCuda().install(patch)
        launch = graphs.Graph.launch
        patch.setattr(graphs.Graph, "launch", lambda graph: (launch(graph), device.synchronize()))
        assert failed(recorded(tmp_path, lambda r: device_loop.toys(tmp_path, r))) == [waits]
    FakeCuda().install(monkeypatch)
    copy = {"cat": "cuda_runtime", "name": "cudaMemcpyAsync", "ts": 1, "dur": 1, "tid": 1}
    lengths = iter(range(1, 100))
    monkeypatch.setattr(launches, "traced", lambda call, path: {"traceEvents": [copy] * 9 * next(lengths)})
    assert failed(recorded(tmp_path, lambda r: device_loop.toys(tmp_path, r))) == [waits]


def test_without_a_gpu_the_step_is_not_run(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    step = run_steps(["device_loop"], tmp_path, tell=lambda line: None)["steps"]["device_loop"]
    assert step["status"] == "not run" and not names(step), step
    assert any(word in step["reason"] for word in ("cuda-python", "NVIDIA driver", "NVIDIA GPU"))


def test_the_toy_draws_the_same_in_any_window_and_most_guesses_are_wrong() -> None:
    drawn, forwards = [], []
    for window in (1, 2, 16):
        loop = toy.loop_on(toy.host_sessions(), images=2, window=window, tokens=64)
        drawn.append(loop.draw(*toy.prompt(2), guidance=1.0, top_k=1, top_p=1.0, seed=3))
        forwards.append(loop.forwards)
    assert all((ids == drawn[0]).all() for ids in drawn) and 63 == forwards[0] > forwards[1] > forwards[2] > 9


def test_the_toy_s_kernels_compile_for_the_chip(tmp_path) -> None:
    try:
        nvrtc.nvrtc_version()
    except MissingError as error:
        pytest.skip(f"the toy's compilation was not checked: {error.what}")
    cubin = nvrtc.cubin_from_source(toy.source_in(tmp_path), "sm_90")
    assert all(f".text.{name}".encode() in cubin for name in toy.KERNELS)


def plans_of(bundle: Path, tmp_path: Path, monkeypatch, *, shapes=((1, 1),)) -> dict:
    """What `plans` records of a bundle, with a TensorRT that has no library behind it."""
    monkeypatch.setattr(loop_plans, "exported", lambda folder: bundle)
    monkeypatch.setattr(loop_observed, "SHORT", 12)
    monkeypatch.setattr(loop_plans, "SHAPES", shapes)
    monkeypatch.setattr(loop_plans, "PROMPT", "a red circle")
    return recorded(tmp_path, lambda report: loop_plans.plans(tmp_path, report, seconds=60))


@pytest.fixture
def plans_in_numpy(monkeypatch, mini_bundle):
    """Sessions of engines that compute what ONNX Runtime computes. A caller may change what they say of
    captures.
    """
    import onnxruntime

    cuda, says = FakeCuda().install(monkeypatch), {"capturable": True}
    limits = Limits(capacity_tokens=64, prefill_tokens=32, rows=4)

    def opened(bundle: Bundle, component: str, *, target: str):
        spec, model = bundle.component(component), bundle.manifest.model
        profiles = profiles_from_limits(spec, model, limits)
        runs = onnxruntime.InferenceSession(bundle.graph(component), providers=["CPUExecutionProvider"])

        def compute(arrays):
            wanted = [t.name for t in spec.outputs]
            found = runs.run(wanted, {t.name: arrays[t.name].copy() for t in spec.inputs})
            for name, value in zip(wanted, found):
                arrays[name][...] = value

        engine = Engine(cuda, spec, profiles, compute, capturable=says["capturable"])
        return tensorrt_sessions.TensorRTSession(TRT, engine, spec, profiles)

    monkeypatch.setattr(tensorrt_sessions, "open_session", opened)
    monkeypatch.setattr("engines.runtime.loaded.plan_capacity", lambda *a, **k: 64)
    monkeypatch.setattr("engines.runtime.loaded.free_memory", lambda backend: None)
    monkeypatch.setattr(loop_plans, "built", lambda bundle, target: None)
    monkeypatch.setattr(loop_plans, "target_here", lambda: TARGETS["rtx-4090"])
    return says


def test_plans_are_observed_beside_the_host_s_loop(
    plans_in_numpy, mini_bundle, tmp_path, monkeypatch
) -> None:
    pytest.importorskip("tensorrt_rtx")
    record = plans_of(mini_bundle, tmp_path, monkeypatch, shapes=((1, 1), (2, 8)))
    assert failed(record) == [] and record["not_run"] == [], record
    assert record["figures"]["plans N1 W1: share of ids equal to the CPU's"]["min"] == 1.0
    assert "plans N2 W8: ids are the host's loop's, one CUDA graph per image" in record["checks"]
    seen = {name.replace("N2 W8", "N2 W16") for name in names(record)}
    assert seen <= predicted().keys(), seen - predicted().keys()


def test_plans_that_cannot_be_captured_fail(plans_in_numpy, mini_bundle, tmp_path, monkeypatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    plans_in_numpy["capturable"] = False
    broken = failed(plans_of(mini_bundle, tmp_path, monkeypatch))
    assert {"plans N1 W1: base_ar can be captured", f"plans N1 W1: {STEPS} is taken"} <= set(broken)


def test_plans_are_built_here_and_what_cannot_load_them_is_told(bundle_of, tmp_path, monkeypatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    FakeCuda().install(monkeypatch)  # an SM 8.9, which TensorRT itself does not see
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(loop_plans, "CAPACITY_TOKENS", 64)
    bundle = Path(shutil.copytree(bundle_of("bf16"), tmp_path / "bundle"))
    record = plans_of(bundle, tmp_path, monkeypatch)
    target = record["facts"]["TensorRT"].rpartition(" ")[2]
    assert set(read_build(Bundle.open(bundle), target).components) == set(loop_plans.COMPONENTS)
    assert (
        record["facts"]["REQUIRE_USER_ALLOCATION"] == "set" and record["figures"]["plans: build"]["min"] > 0
    )
    assert failed(record) and not any("ids" in name for name in names(record))


def test_without_tensorrt_only_the_plans_are_not_run(tmp_path, monkeypatch) -> None:
    FakeCuda().install(monkeypatch)

    def absent(target):
        raise MissingError("tensorrt is not installed", where="here", fix="install it")

    monkeypatch.setattr(loop_plans, "tensorrt_of", absent)
    record = recorded(tmp_path, lambda report: loop_plans.plans(tmp_path, report, seconds=60))
    assert [entry["part"] for entry in record["not_run"]] == ["plans"] and not names(record)
    assert "tensorrt is not installed" in record["not_run"][0]["reason"]


def test_calls_through_cuda_python_are_counted_by_kind(monkeypatch) -> None:
    cuda = FakeCuda().install(monkeypatch)
    buffer = tensorrt_sessions.DeviceBuffer((4,), "int64")

    def steps(number: int) -> None:
        for _ in range(number):
            buffer.write(np.zeros(4, np.int64))
            buffer.read()

    found = launches.own_calls_per_step(steps, short=1, long=4)
    assert (found["copies"], found["syncs"], found["graph launches"]) == (2.0, 1.0, 0.0)
    assert device.cudart() is cuda
