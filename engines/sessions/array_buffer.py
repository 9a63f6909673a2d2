"""Host memory as a buffer of the sessions that compute in numpy: the interpreter's and those of tables."""

from __future__ import annotations

import numpy as np

from ..bundle.bfloat16 import float32_from_bits
from ..bundle.tensors import check_array


class ArrayBuffer:
    """Zeroed host memory. `array` holds a bfloat16 tensor as float32 values."""

    def __init__(self, shape: tuple[int, ...], dtype: str):
        self.shape, self.dtype = tuple(shape), dtype
        self.array = np.zeros(self.shape, "float32" if dtype == "bfloat16" else dtype)

    def write(self, array: np.ndarray) -> None:
        """Copy `array` into the buffer. Raises InputError unless its shape, dtype and layout match."""
        check_array(array, shape=self.shape, dtype=self.dtype)
        if self.dtype == "bfloat16":
            array = float32_from_bits(array.view(np.uint16))
        self.array[...] = array

    def read(self) -> np.ndarray:
        """Return the contents as a view, which the next step changes."""
        return self.array
