"""Sessions of the components that are tables: the host reads rows of a memory-mapped weight.

An engine would hold the whole weight in device memory to read one row of it per step. Only the rows that are
asked for are read here, and a weight that a graph uses too lies in the bundle once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import BinaryIO

import numpy as np

from ..bundle.bfloat16 import float32_from_bits
from ..bundle.manifest import ComponentSpec
from ..bundle.reader import Bundle
from ..bundle.tensors import check_binding
from ..errors import InputError
from . import Buffer, closed
from .array_buffer import ArrayBuffer


class _Rows:
    """A memory-mapped array [rows, n], read in float32."""

    def __init__(self, file: BinaryIO, dtype: str, offset: int, shape: tuple[int, int]):
        self.bits = dtype == "bfloat16"
        stored = np.dtype("<u2" if self.bits else dtype)
        self.array = np.memmap(file, stored, mode="r", offset=offset, shape=shape)

    def at(self, rows: np.ndarray) -> np.ndarray:
        """The rows of these numbers [...]: float32 [..., n]."""
        found = self.array[rows]
        return float32_from_bits(found) if self.bits else found.astype(np.float32)


class TableSession:
    """One table. `engines.sessions.Session` is its protocol; it takes buffers of every backend."""

    capacity_tokens: int | None = None
    prefill_tokens: int | None = None

    def __init__(self, bundle: Bundle, name: str):
        table = bundle.manifest.tables[name]
        self.name, self.rows = name, table.shape[0]
        self.spec = ComponentSpec(table.file, None, table.golden, table.inputs, table.outputs)
        self._scales: _Rows | None = None
        with bundle.opened(table.file) as file:
            self._weight: _Rows | None = _Rows(file, table.dtype, table.offset, table.shape)
            if table.scales_offset is not None and table.scales_dtype is not None:
                self._scales = _Rows(file, table.scales_dtype, table.scales_offset, (self.rows, 1))

    def buffer(self, shape: tuple[int, ...], dtype: str) -> ArrayBuffer:
        """Allocate a zeroed buffer on the host."""
        return ArrayBuffer(shape, dtype)

    def bind(self, tensors: Mapping[str, Buffer]) -> Callable[[], None]:
        """Check `tensors` and return a step, which reads the ids and writes their rows. Raises InputError.

        The step raises InputError for an id that is not a row.
        """
        self._open()
        check_binding(self.spec, tensors)
        ids, rows = tensors[self.spec.inputs[0].name], tensors[self.spec.outputs[0].name]

        def step() -> None:
            wanted = ids.read()
            if wanted.size and not (wanted.min() >= 0 and wanted.max() < self.rows):
                raise InputError(
                    "An id is not a row of the table",
                    where=f"{self.name}: expected 0 to {self.rows - 1}, got {wanted.min()} to {wanted.max()}",
                    fix="use ids of this bundle's vocabulary",
                )
            found = self._open().at(wanted)
            rows.write(found if self._scales is None else found * self._scales.at(wanted))

        return step

    def close(self) -> None:
        """Release the file. Bound steps can no longer run."""
        self._weight = self._scales = None

    def _open(self) -> _Rows:
        if self._weight is None:
            raise closed(self.name)
        return self._weight
