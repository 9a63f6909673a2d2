"""What an ONNX Runtime with CUDA is asked for before its first session, on a machine without a GPU."""

from __future__ import annotations

import onnxruntime
import pytest

from engines.sessions import onnxruntime as module


def test_cuda_and_cudnn_are_loaded_from_pips_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(module.PROVIDERS.values()))
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: asked.append("cuda"), raising=False)
    assert module._runtime("cpu") is onnxruntime and asked == []
    assert module._runtime("cuda") is onnxruntime and asked == ["cuda"]
