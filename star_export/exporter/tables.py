"""Components that are tables: rows of a weight, in a file of their own or in that of a graph that uses it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch

from engines.bundle.manifest import TableSpec
from reference.config import StarConfig
from reference.containers import LazyTensor, tensors_from_safetensors

from ..components import boundary, whole
from ..golden.oracle import image_table
from ..graph import lint
from ..graph.precisions import Precision
from ..graph.quantize import CODES, SCALES
from ..graph.wrappers import TABLE
from ..tensor_files import save_tensors

FILE = "table.data"  # the rows, and after them their scales if the rows are quantised
ROWS = 4096  # of a table that are written at once


@dataclass(frozen=True)
class Table:
    """The table of component `name`: `tensor` [rows, H], whose name in the model is `weight`.

    `graphs` are those that may store it, in the order in which they are looked at.
    """

    name: str
    weight: str
    tensor: LazyTensor
    precision: Precision
    graphs: tuple[str, ...]

    def spec(self, bundle: Path, config: StarConfig) -> TableSpec:
        """The manifest's entry, once the graphs and `write` have written their files in `bundle`."""
        precision, shape = self.precision, (self.tensor.shape[0], self.tensor.shape[1])
        name, sizes = precision.stored(self.weight, shape)
        quantised, shared = len(sizes) > 1, self._shared(bundle)
        file, offset, scales = shared or (f"{self.name}/{FILE}", 0, sizes[0])
        inputs, outputs = boundary(whole(self.name, config), config, precision.dtype_name)
        return TableSpec(
            file=file,
            offset=offset,
            shape=shape,
            dtype=name if quantised else precision.dtype_name,
            golden=f"{self.name}/golden.safetensors",
            inputs=inputs,
            outputs=outputs,
            scales_offset=scales if quantised else None,
            scales_dtype=precision.dtype_name if quantised else None,
            weights={} if shared else {name: sum(sizes)},
        )

    def write(self, bundle: Path) -> None:
        """Write the rows, unless a graph in the folder `bundle` stores them."""
        if self._shared(bundle):
            return
        (bundle / self.name).mkdir(parents=True, exist_ok=True)
        rows, dtype = self.tensor.load(), self.precision.torch_dtype
        found = self.precision.format_of(self.weight, tuple(rows.shape))
        scales: list[torch.Tensor] = []
        with open(bundle / self.name / FILE, "wb") as file:
            for some in rows.split(ROWS):
                if found is None:
                    file.write(_bytes(some.to(dtype)))
                else:
                    encoded = found.encode(some, dtype)
                    file.write(_bytes(encoded.codes))
                    scales.append(encoded.scales)
            for part in scales:
                file.write(_bytes(part))

    def _shared(self, bundle: Path) -> tuple[str, int, int] | None:
        """The file of a graph that stores the table, and the offsets of its rows and of their scales."""
        for graph in self.graphs:
            held = ir.load(bundle / graph / "model.onnx").graph.initializers
            quantised = f"{self.weight}{CODES}" in held
            rows = held.get(f"{self.weight}{CODES}" if quantised else self.weight)
            scales = held.get(f"{self.weight}{SCALES}") if quantised else rows
            if not rows or not scales:
                continue
            if isinstance(rows.const_value, ir.ExternalTensor) and isinstance(
                scales.const_value, ir.ExternalTensor
            ):
                offsets = rows.const_value.offset or 0, scales.const_value.offset or 0
                return f"{graph}/{lint.DATA_FILE}", *offsets
        return None


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def write_image_table(config: StarConfig, tensors: Mapping[str, LazyTensor], path: Path) -> None:
    """Write adapter(codebook) once: it takes as many operations as thousands of decode steps."""
    save_tensors({TABLE: image_table(config, tensors)}, path)


def stored_image_table(config: StarConfig, path: Path) -> LazyTensor:
    """adapter(codebook) [codebook_size, H] in float32, as `write_image_table` stores it."""
    shape = (config.vq.codebook_size, config.base_ar.hidden_size)
    return LazyTensor(TABLE, shape, torch.float32, path, lambda: tensors_from_safetensors(path)[TABLE].load())
