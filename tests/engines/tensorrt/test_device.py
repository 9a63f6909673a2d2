"""The CUDA runtime's errors: each names what is missing, and what to do."""

import sys

import pytest

from engines.errors import MissingError
from engines.tensorrt import device


class Runtime:
    """A CUDA runtime that fails."""

    def __init__(self, code, driver=0):
        self.code, self.driver = code, driver

    def cudaDriverGetVersion(self):
        return 0, self.driver

    def cudaRuntimeGetVersion(self):
        return 0, 13040

    def cudaMemGetInfo(self):
        return 0, 5, 9

    def __getattr__(self, name):
        return lambda *arguments: (self.code, None)


@pytest.mark.parametrize(
    "code, driver, words",
    [
        (35, 0, "expected a driver for CUDA 13.4, got none"),
        (35, 12020, "expected a driver for CUDA 13.4, got one for CUDA 12.2"),
        (34, 0, "got none"),
        (100, 13040, "This machine has no NVIDIA GPU"),
    ],
)
def test_without_driver_or_gpu_the_message_names_what_is_missing(monkeypatch, code, driver, words):
    monkeypatch.setattr(device, "cudart", lambda: Runtime(code, driver))
    for action in (device.gpus, lambda: device.allocate(1)):
        with pytest.raises(MissingError) as error:
            action()
        assert words in str(error.value) and "onnxruntime" in error.value.fix


def test_a_cuda_python_that_finds_no_driver_itself_is_answered_alike(monkeypatch):
    def fails(*arguments):
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    monkeypatch.setattr(
        device, "cudart", lambda: type("Runtime", (), {"__getattr__": lambda self, name: fails})()
    )
    for action in (device.gpus, device.driver_version, lambda: device.allocate(1)):
        with pytest.raises(MissingError, match="no NVIDIA driver") as error:
            action()
        assert "libcuda.so.1" in error.value.where and "onnxruntime" in error.value.fix


def test_too_little_memory_names_bytes_asked_and_free(monkeypatch):
    monkeypatch.setattr(device, "cudart", lambda: Runtime(2))
    with pytest.raises(MissingError, match="asked 1000 bytes, free 5 of 9"):
        device.allocate(1000)


def test_another_cuda_error_is_a_bug(monkeypatch):
    monkeypatch.setattr(device, "cudart", lambda: Runtime(700))
    with pytest.raises(RuntimeError, match="700"):
        device.gpus()


def test_without_cuda_python_the_extra_is_named(monkeypatch):
    device.cudart.cache_clear()
    for name in ("cuda.bindings", "cuda.bindings.runtime"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingError, match="cuda-python is not installed") as error:
        device.cudart()
    assert ".[rtx]" in error.value.fix
    device.cudart.cache_clear()
