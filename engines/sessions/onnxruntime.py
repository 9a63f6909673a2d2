"""Components on ONNX Runtime: on the CPU with memory that numpy shares, or on CUDA with memory of the device.

The CPU has no bfloat16: there a component's fp32 twin runs instead of its graph, with caches in float32.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from ..bundle.bfloat16 import float32_from_bits
from ..bundle.manifest import ComponentSpec, TensorSpec
from ..bundle.reader import Bundle
from ..bundle.tensors import check_array, check_binding, present_name
from ..errors import InputError, MissingError

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
LOG_SEVERITY = 3  # errors
_ELEMENT_TYPES = {
    "float32": 1,
    "int32": 6,
    "int64": 7,
    "bool": 9,
    "float16": 10,
    "bfloat16": 16,
}  # onnx.TensorProto
_TYPE_NAMES = {
    "tensor(float)": "float32",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
}


class HostBuffer:
    """Zeroed memory of the host, seen by numpy as `array` and by ONNX Runtime as `value`. `read()` is a view, not a copy."""

    def __init__(self, shape: tuple[int, ...], dtype: str):
        import onnxruntime

        if dtype == "bfloat16":
            raise InputError(
                "The CPU has no bfloat16",
                where=f"buffer: expected float32, got bfloat16[{','.join(map(str, shape))}]",
                fix="use the dtype that the session's spec states",
            )
        self.shape, self.dtype = tuple(shape), dtype
        self.array = np.zeros(self.shape, dtype)
        self.value = onnxruntime.OrtValue.ortvalue_from_numpy(self.array)
        assert self.value.data_ptr() == self.array.ctypes.data, (
            "ONNX Runtime copied the memory it was to share"
        )

    def write(self, array: np.ndarray) -> None:
        """Copy `array` in. Raises InputError unless shape, type and layout are the buffer's."""
        check_array(array, shape=self.shape, dtype=self.dtype)
        self.array[...] = array

    def read(self) -> np.ndarray:
        """The contents, as a view that the next step changes."""
        return self.array


class DeviceBuffer:
    """Zeroed memory of a CUDA device. numpy has no bfloat16: such contents (caches) are read as the same numbers in float32."""

    def __init__(self, shape: tuple[int, ...], dtype: str, *, device: str = "cuda"):
        import onnxruntime

        self.shape, self.dtype = tuple(shape), dtype
        self._bits = np.uint16 if dtype == "bfloat16" else np.dtype(dtype)  # what numpy holds in place of it
        self.value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(
            self.shape, _ELEMENT_TYPES[dtype], device, 0
        )
        self.value.update_inplace(np.zeros(self.shape, self._bits))

    def write(self, array: np.ndarray) -> None:
        """Copy `array` to the device. Raises InputError unless shape, type and layout are the buffer's."""
        check_array(array, shape=self.shape, dtype=self.dtype)
        self.value.update_inplace(array.view(self._bits))

    def read(self) -> np.ndarray:
        """A copy of the contents on the host."""
        if self.dtype != "bfloat16":
            return self.value.numpy()
        import onnxruntime

        host = onnxruntime.OrtValue.ortvalue_from_shape_and_type(
            self.shape, _ELEMENT_TYPES["bfloat16"], "cpu", 0
        )
        onnxruntime.copy_tensors([self.value], [host])
        return float32_from_bfloat16(host.data_ptr(), self.shape)


def float32_from_bfloat16(address: int, shape: tuple[int, ...]) -> np.ndarray:
    """The bfloat16 numbers at `address` in the host's memory, as float32 of `shape`."""
    bits = np.ctypeslib.as_array((ctypes.c_uint16 * math.prod(shape)).from_address(address))
    return float32_from_bits(bits).reshape(shape)


class OnnxRuntimeSession:
    """One component loaded into ONNX Runtime, on `device` `cpu` or `cuda`. See `engines.sessions` for the protocol.

    The files are verified before and after they are loaded, and the loaded graph's boundary against the manifest. Raises MissingError
    where ONNX Runtime or the device is absent, InputError for files that are not what the manifest says.
    """

    capacity_tokens = prefill_tokens = None

    def __init__(self, bundle: Bundle, component: str, *, device: str = "cpu"):
        runtime = _runtime(device)
        spec, on_cpu = bundle.component(component), device == "cpu"
        path = bundle.graph(component, twin=on_cpu)
        try:
            self.inference_session = runtime.InferenceSession(
                str(path),
                _options(runtime, bundle.manifest.precision),
                providers=[(PROVIDERS[device], _provider_options(device))],
            )
        except Exception as error:  # the library raises bare exceptions
            raise InputError(
                "ONNX Runtime cannot load this graph",
                where=f"{path}: {error}",
                fix="export the bundle again with this version of star-export",
            ) from None
        bundle.graph(component, twin=on_cpu)  # what was loaded is still what was verified
        if PROVIDERS[device] not in self.inference_session.get_providers():
            raise _missing(device, "ONNX Runtime could not start it (driver, CUDA or cuDNN)")
        self.component, self._buffer = component, HostBuffer if on_cpu else DeviceBuffer
        self.spec = twin_spec(spec) if on_cpu and spec.twin else spec
        check_boundary(self.inference_session, self.spec, where=str(path))
        self._running = threading.Lock()

    def buffer(self, shape: tuple[int, ...], dtype: str) -> HostBuffer | DeviceBuffer:
        """Zeroed memory where this session computes."""
        return self._buffer(shape, dtype)

    def bind(self, tensors: Mapping[str, HostBuffer | DeviceBuffer]) -> Callable[[], None]:
        """A step on these buffers, caches under their past names only. Raises InputError for what does not fit."""
        self._check_open()
        check_binding(self.spec, tensors)
        for name, tensor in tensors.items():
            if not isinstance(tensor, self._buffer):
                raise InputError(
                    "This is no memory of this session",
                    fix="make it with this session's buffer()",
                    where=f"{name}: expected a {self._buffer.__name__}, got a {type(tensor).__name__}",
                )
        binding = self.inference_session.io_binding()
        for tensor in self.spec.inputs:
            binding.bind_ortvalue_input(tensor.name, tensors[tensor.name].value)
        caches = {present_name(t.name): t.name for t in self.spec.inputs if present_name(t.name)}
        for tensor in self.spec.outputs:
            binding.bind_ortvalue_output(tensor.name, tensors[caches.get(tensor.name, tensor.name)].value)
        bound = binding, dict(tensors)  # ONNX Runtime holds addresses only: the step keeps the memory alive

        def step() -> None:
            if not self._running.acquire(blocking=False):
                raise InputError(
                    "This session is busy",
                    where=f"{self.component}: expected one thread at a time, got a second call while running",
                    fix="give each thread its own session",
                )
            try:
                self._check_open()
                self.inference_session.run_with_iobinding(bound[0])
            finally:
                self._running.release()

        return step

    def close(self) -> None:
        """Give the memory back. Steps that were bound can no longer run."""
        self.inference_session = None

    def _check_open(self) -> None:
        if self.inference_session is None:
            raise InputError(
                "This session is closed",
                where=f"{self.component}: expected an open session, got a closed one",
                fix="open it again",
            )


def twin_spec(spec: ComponentSpec) -> ComponentSpec:
    """The boundary of the fp32 twin: as `spec`, caches in float32."""

    def widened(tensors: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        return tuple(
            replace(t, dtype="float32") if t.dtype in ("bfloat16", "float16") else t for t in tensors
        )

    return replace(spec, inputs=widened(spec.inputs), outputs=widened(spec.outputs))


def check_boundary(session, spec: ComponentSpec, *, where: str) -> None:
    """Compare the loaded graph's inputs and outputs with `spec`: names, order, dtypes, ranks, fixed sizes. Raises InputError."""
    for side, expected, got in (
        ("inputs", spec.inputs, session.get_inputs()),
        ("outputs", spec.outputs, session.get_outputs()),
    ):
        wanted = [f"{t.name}:{t.dtype}{_sizes(t.shape)}" for t in expected]
        found = [f"{t.name}:{_TYPE_NAMES.get(t.type, t.type)}{_sizes(t.shape)}" for t in got]
        if wanted != found:
            at = next(
                (i for i, (a, b) in enumerate(zip(wanted, found)) if a != b), min(len(wanted), len(found))
            )
            raise InputError(
                "The graph is not what the manifest says",
                fix="export the bundle again",
                where=f"{where}: {side}[{at}]: expected {_at(wanted, at)}, got {_at(found, at)} ({len(wanted)} and {len(found)} {side})",
            )


def _sizes(shape) -> str:
    return f"[{','.join(str(size) if isinstance(size, int) else '*' for size in shape)}]"


def _at(items: list[str], index: int) -> str:
    return items[index] if index < len(items) else "nothing"


def _runtime(device: str):
    try:
        import onnxruntime
    except ImportError as error:
        raise _missing(device, f"onnxruntime cannot be imported ({error})") from None
    if PROVIDERS[device] not in onnxruntime.get_available_providers():
        raise _missing(
            device,
            f"onnxruntime {onnxruntime.__version__} has {', '.join(onnxruntime.get_available_providers())}",
        )
    return onnxruntime


def _missing(device: str, got: str) -> MissingError:
    return MissingError(
        "ONNX Runtime is not here" if device == "cpu" else "ONNX Runtime has no CUDA here",
        where=f"expected onnxruntime with {PROVIDERS[device]}, got: {got}",
        fix=f'pip install "star-export[{device}]"',
    )


def _options(runtime, precision: str):
    options = runtime.SessionOptions()
    options.log_severity_level = LOG_SEVERITY
    # Left alone, ONNX Runtime multiplies int4 and int8 weights in int8 arithmetic (level 4), 3 % off. Level 1 is float32 on the stored
    # weights; with int8's scale per channel it is 25 times slower than weights widened when they are loaded.
    if precision == "int8":
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    # Sessions take turns in the decode loop: idle threads of one that spin would hold the cores of the next (2 to 3 times slower).
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _provider_options(device: str) -> dict[str, str]:
    return {"use_tf32": "0"} if device == "cuda" else {}
