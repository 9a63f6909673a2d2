"""The CUDA device through cuda-python: its GPUs, one stream, memory.

This module knows neither TensorRT nor tensors. cuda-python is imported on first use. One non-blocking stream
serves all sessions of the process, so work runs in the order in which it is enqueued, and nothing waits for
the host between steps.
"""

from __future__ import annotations

import functools
import math
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import MissingError, install
from ..targets import sm_from_capability

OUT_OF_MEMORY, INSUFFICIENT_DRIVER, NO_DEVICE, NOT_FOUND = 2, 35, 100, 34  # cudaError_t
counts: Counter[str] = Counter()  # of this process: launches, writes (host to device) and syncs
_NO_DRIVER = "install the NVIDIA driver, or run on CPU: --backend onnxruntime"


@dataclass(frozen=True)
class Gpu:
    """One CUDA device."""

    name: str
    compute_capability: tuple[int, int]
    memory_bytes: int

    @property
    def sm(self) -> str:
        return sm_from_capability(self.compute_capability)


@functools.cache
def cudart() -> Any:
    """The module `cuda.bindings.runtime`. Raises MissingError when cuda-python is not installed."""
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        raise MissingError(
            "cuda-python is not installed",
            where=f"import cuda.bindings.runtime: {error}",
            fix=f"{install('rtx')} on an RTX PC, [jetpack] on a Jetson before JetPack 7.2, or [tensorrt]",
        ) from None
    return runtime


def call(name: str, *arguments: Any) -> Any:
    """Call a function of the CUDA runtime by name and return its value, its values or None.

    Raises MissingError without a driver or device, RuntimeError for any other CUDA error.
    """
    code, *values = _answer(name, *arguments)
    if int(code) == 0:
        return values[0] if len(values) == 1 else tuple(values) or None
    if int(code) in (INSUFFICIENT_DRIVER, NOT_FOUND):
        raise MissingError(
            "There is no NVIDIA driver for this CUDA version",
            fix=_NO_DRIVER,
            where=f"{name}: expected a driver for CUDA {_version(runtime_version())}, got {_driver_words()}",
        )
    if int(code) == NO_DEVICE:
        raise MissingError(
            "This machine has no NVIDIA GPU",
            where=f"{name}: expected a CUDA device, got none",
            fix=_NO_DRIVER,
        )
    raise RuntimeError(f"{name} failed with CUDA error {int(code)} ({code})")


def driver() -> Any:
    """The module `cuda.bindings.driver`. Raises MissingError when cuda-python is not installed."""
    cudart()
    from cuda.bindings import driver

    return driver


def driver_call(name: str, *arguments: Any) -> Any:
    """Call a function of the CUDA driver as `call` does. Raises RuntimeError for an error."""
    code, *values = getattr(driver(), name)(*arguments)
    if int(code):
        raise RuntimeError(f"{name} failed with CUDA error {int(code)} ({code})")
    return values[0] if len(values) == 1 else tuple(values) or None


def _answer(name: str, *arguments: Any) -> tuple:
    """The error code and the values that a function of the CUDA runtime returns.

    Raises MissingError where cuda-python itself finds no driver.
    """
    function = getattr(cudart(), name)
    try:
        return function(*arguments)
    except RuntimeError as error:  # cuda-python 12.6
        raise MissingError(
            "There is no NVIDIA driver for this CUDA version", where=f"{name}: {error}", fix=_NO_DRIVER
        ) from None


def gpus() -> tuple[Gpu, ...]:
    """The CUDA devices of this machine. Raises MissingError without cuda-python, a driver or a device."""
    found = []
    for i in range(call("cudaGetDeviceCount")):
        properties = call("cudaGetDeviceProperties", i)
        found.append(
            Gpu(properties.name.decode(), (properties.major, properties.minor), properties.totalGlobalMem)
        )
    return tuple(found)


def driver_version() -> str | None:
    """The newest CUDA version that the driver supports (such as `13.0`); None without a driver."""
    version = call("cudaDriverGetVersion")
    return _version(version) if version else None


def runtime_version() -> int:
    """The version of cuda-python's CUDA runtime, as CUDA counts: 13040 for 13.4."""
    return call("cudaRuntimeGetVersion")


@functools.cache
def stream() -> int:
    """The handle of the process's stream."""
    return int(call("cudaStreamCreateWithFlags", cudart().cudaStreamNonBlocking))


def synchronize() -> None:
    """Wait until all work on the stream is done."""
    counts["syncs"] += 1
    call("cudaStreamSynchronize", stream())


def allocate(size_bytes: int) -> int:
    """Allocate `size_bytes` of zeroed device memory and return its address.

    Raises MissingError, with the bytes asked for and free, when the memory is too small.
    """
    code, address = _answer("cudaMalloc", size_bytes)
    if int(code) == OUT_OF_MEMORY:
        free, total = call("cudaMemGetInfo")
        raise MissingError(
            "The GPU has too little free memory",
            where=f"asked {size_bytes} bytes, free {free} of {total}",
            fix="close other programs, use fewer rows or a smaller capacity, or a smaller precision",
        )
    if int(code):
        call("cudaGetDeviceCount")  # raises a better error when there is no driver or device
        raise RuntimeError(f"cudaMalloc failed with CUDA error {int(code)} ({code})")
    call("cudaMemsetAsync", address, 0, size_bytes, stream())
    return int(address)


def release(address: int) -> None:
    """Free memory once no work uses it any more. Never raises, because it also runs when the process ends."""
    cudart().cudaFree(address)


def copy_to_device(address: int, array: np.ndarray) -> None:
    """Enqueue the copy of a contiguous array to the device.

    The array may change as soon as this returns, because CUDA stages pageable memory.
    """
    counts["writes"] += 1
    call(
        "cudaMemcpyAsync",
        address,
        array.ctypes.data,
        array.nbytes,
        cudart().cudaMemcpyKind.cudaMemcpyHostToDevice,
        stream(),
    )


def copy_to_host(array: np.ndarray, address: int) -> None:
    """Fill a contiguous array from the device, after all work that is enqueued so far."""
    call(
        "cudaMemcpyAsync",
        array.ctypes.data,
        address,
        array.nbytes,
        cudart().cudaMemcpyKind.cudaMemcpyDeviceToHost,
        stream(),
    )
    synchronize()


def read_bandwidth(*, size_bytes: int = 1 << 29, repeats: int = 10) -> float:
    """Measure the bandwidth of device memory in bytes per second.

    It comes from copies within the memory, which read and write every byte once.
    """
    source, target = allocate(size_bytes), allocate(size_bytes)
    try:
        best = math.inf
        for _ in range(repeats):
            synchronize()
            started = time.perf_counter()
            call(
                "cudaMemcpyAsync",
                target,
                source,
                size_bytes,
                cudart().cudaMemcpyKind.cudaMemcpyDeviceToDevice,
                stream(),
            )
            synchronize()
            best = min(best, time.perf_counter() - started)
    finally:
        release(source)
        release(target)
    return 2 * size_bytes / best


def _driver_words() -> str:
    version = driver_version()
    return f"one for CUDA {version}" if version else "none"


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
