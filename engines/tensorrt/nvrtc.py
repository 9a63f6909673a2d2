"""Kernels compiled where they run: CUDA source through NVRTC, kept in memory.

cuda-python and its NVRTC are imported on first use.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import MissingError
from . import device

WHILE_VERSION = (12, 4)  # of CUDA, the first whose kernels can set a graph's condition


@functools.cache
def nvrtc_version() -> tuple[int, int]:
    """The version of NVRTC. Raises MissingError where it is not installed."""
    try:
        from cuda.bindings import nvrtc

        code, major, minor = nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:  # no cuda-python, or no library
        raise MissingError(
            "NVRTC is not installed",
            where=f"libnvrtc: expected NVIDIA's run-time compiler, got {str(error).splitlines()[0]}",
            fix="pip install nvidia-cuda-nvrtc (CUDA 12: nvidia-cuda-nvrtc-cu12), or the CUDA toolkit",
        ) from None
    if int(code):
        raise RuntimeError(f"nvrtcVersion failed with {code}")
    return major, minor


@functools.cache
def cubin_from_source(source: Path, sm: str) -> bytes:
    """Compile `source` for an architecture such as `sm_89`.

    STAR_WHILE is defined where a kernel can set the condition of a WHILE node. Raises MissingError without
    NVRTC, and RuntimeError with its log when it cannot compile this, such as for an architecture newer than
    itself.
    """
    version = nvrtc_version()
    from cuda.bindings import nvrtc

    code, program = nvrtc.nvrtcCreateProgram(source.read_bytes(), source.name.encode(), 0, [], [])
    _check(code, "nvrtcCreateProgram")
    try:
        flags = [f"--gpu-architecture={sm}", "--std=c++17"]
        flags += ["-DSTAR_WHILE"] if version >= WHILE_VERSION else []
        code = nvrtc.nvrtcCompileProgram(program, len(flags), [flag.encode() for flag in flags])[0]
        if int(code):
            log = bytes(nvrtc.nvrtcGetProgramLogSize(program)[1])
            nvrtc.nvrtcGetProgramLog(program, log)
            words = log.decode(errors="replace").strip("\0 \n")
            raise RuntimeError(f"NVRTC cannot compile {source.name} for {sm}: {code}: {words}")
        cubin = bytes(nvrtc.nvrtcGetCUBINSize(program)[1])
        _check(nvrtc.nvrtcGetCUBIN(program, cubin)[0], "nvrtcGetCUBIN")
        return cubin
    finally:
        nvrtc.nvrtcDestroyProgram(program)


class Kernel:
    """One kernel of a compiled source, whose parameter is one struct of 64-bit fields."""

    def __init__(self, module: Any, name: str):
        self._function = device.driver_call("cuModuleGetFunction", module, name.encode())

    def launch(self, fields: np.ndarray, *, blocks: tuple[int, int], threads: int) -> None:
        """Enqueue it on the process's stream. `fields` is the struct; CUDA copies it."""
        parameters = np.array([fields.ctypes.data], np.uint64)  # a pointer to each parameter
        device.counts["launches"] += 1
        device.driver_call(
            "cuLaunchKernel",
            self._function,
            *(*blocks, 1),
            *(threads, 1, 1),
            0,
            device.stream(),
            parameters.ctypes.data,
            0,
        )


@functools.cache
def kernels_from_source(source: Path, *names: str) -> tuple[Kernel, ...]:
    """The kernels `names` of `source`, compiled for this device and loaded, once per process.

    Raises what `cubin_from_source` raises.
    """
    cubin = cubin_from_source(source, device.gpus()[0].sm)
    device.stream()  # makes the device's context current
    module = device.driver_call("cuModuleLoadData", cubin)
    return tuple(Kernel(module, name) for name in names)


def _check(code: Any, what: str) -> None:
    if int(code):
        raise RuntimeError(f"{what} failed with {code}")
