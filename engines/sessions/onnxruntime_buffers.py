"""Memory that ONNX Runtime computes on: of the host, shared with numpy, or of a CUDA device."""

from __future__ import annotations

import ctypes
import math

import numpy as np

from ..bundle.bfloat16 import float32_from_bits
from ..bundle.tensors import check_array
from ..errors import InputError

# The numbers are those of onnx.TensorProto.DataType.
ELEMENT_TYPES = {"float32": 1, "int32": 6, "int64": 7, "bool": 9, "float16": 10, "bfloat16": 16}


class HostBuffer:
    """Zeroed host memory, shared by numpy (`array`) and ONNX Runtime (`value`). `read()` returns a view."""

    def __init__(self, shape: tuple[int, ...], dtype: str):
        import onnxruntime

        if dtype == "bfloat16":
            raise InputError(
                "The CPU backend does not support bfloat16",
                where=f"buffer: expected float32, got bfloat16[{','.join(map(str, shape))}]",
                fix="use the dtype in the session's spec",
            )
        self.shape, self.dtype = tuple(shape), dtype
        self.array = np.zeros(self.shape, dtype)
        self.value = onnxruntime.OrtValue.ortvalue_from_numpy(self.array)
        shared = self.value.data_ptr() == self.array.ctypes.data
        assert shared, "ONNX Runtime copied the array instead of sharing its memory"

    def write(self, array: np.ndarray) -> None:
        """Copy `array` into the buffer. Raises InputError unless its shape, dtype and layout match."""
        check_array(array, shape=self.shape, dtype=self.dtype)
        self.array[...] = array

    def read(self) -> np.ndarray:
        """Return the contents as a view, which the next step changes."""
        return self.array


class DeviceBuffer:
    """Zeroed memory of a CUDA device."""

    def __init__(self, shape: tuple[int, ...], dtype: str, *, device: str = "cuda"):
        import onnxruntime

        self.shape, self.dtype = tuple(shape), dtype
        self._bits = np.uint16 if dtype == "bfloat16" else np.dtype(dtype)  # the numpy dtype of its bits
        self.value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(
            self.shape, ELEMENT_TYPES[dtype], device, 0
        )
        self.value.update_inplace(np.zeros(self.shape, self._bits))

    def write(self, array: np.ndarray) -> None:
        """Copy `array` to the device. Raises InputError unless its shape, dtype and layout match."""
        check_array(array, shape=self.shape, dtype=self.dtype)
        self.value.update_inplace(array.view(self._bits))

    def read(self) -> np.ndarray:
        """Copy the contents to the host. numpy has no bfloat16, so such values are returned as float32."""
        if self.dtype != "bfloat16":
            return self.value.numpy()
        import onnxruntime

        host = onnxruntime.OrtValue.ortvalue_from_shape_and_type(
            self.shape, ELEMENT_TYPES["bfloat16"], "cpu", 0
        )
        onnxruntime.copy_tensors([self.value], [host])
        return float32_from_bfloat16(host.data_ptr(), self.shape)


def float32_from_bfloat16(address: int, shape: tuple[int, ...]) -> np.ndarray:
    """Read bfloat16 values at `address` in host memory, as float32 of `shape`."""
    bits = np.ctypeslib.as_array((ctypes.c_uint16 * math.prod(shape)).from_address(address))
    return float32_from_bits(bits).reshape(shape)
