"""What an ONNX Runtime with CUDA is asked for before its first session, on a machine without a GPU."""

from __future__ import annotations

import itertools
from pathlib import Path

import onnxruntime
import pytest

from engines.errors import InputError
from engines.sessions import onnxruntime as module


def test_cuda_and_cudnn_are_loaded_from_pips_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(module.PROVIDERS.values()))
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: asked.append("cuda"), raising=False)
    assert module._runtime("cpu") is onnxruntime and asked == []
    assert module._runtime("cuda") is onnxruntime and asked == ["cuda"]


def test_a_step_is_captured_when_it_runs_again_and_only_so_many_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_run_options", lambda key, value: int(value))
    session = object.__new__(module.OnnxRuntimeSession)
    session.cuda_graph, session._graphs, session._buffer = True, itertools.count(), module.DeviceBuffer
    steps = [session._options_of_runs() for _ in range(module.GRAPHS_LIMIT + 2)]
    assert [next(step) for step in steps] == [-1] * len(steps)
    wanted = [*range(module.GRAPHS_LIMIT), -1, -1]
    assert [next(step) for step in steps] == wanted == [next(step) for step in steps]
    session.cuda_graph = False
    assert list(itertools.islice(session._options_of_runs(), 3)) == [None] * 3


def test_a_graph_with_nodes_elsewhere_is_loaded_without_cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def session(runtime, path, entries, providers, **options):
        asked.append(providers)
        if refuses:
            raise InputError("ONNX Runtime cannot load this graph", where="a node on the CPU", fix="none")
        return "session"

    monkeypatch.setattr(module, "_inference_session", session)
    arguments = onnxruntime, Path("model.onnx"), {}, [("CUDAExecutionProvider", {"use_tf32": "0"})]
    for refuses in (True, False):
        assert module._with_cuda_graph(*arguments) == (None if refuses else "session")
    assert asked[0] == [("CUDAExecutionProvider", {"use_tf32": "0", "enable_cuda_graph": "1"})]


def test_run_options_name_the_graph() -> None:
    assert isinstance(module._run_options("gpu_graph_id", "3"), onnxruntime.RunOptions)
