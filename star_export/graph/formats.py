"""Weight formats: what a bundle stores of a weight, and the numbers that it then stands for. No graphs here.

A weight [rows, ...] is quantised row by row, a row being the features that one output is computed from:
symmetric, without a zero point, each code times the scale of its block (ONNX `DequantizeLinear`). Codes are
rounded to nearest.

int4 has blocks of 128, 64 or 32 features. int8 has one block, the row, because TensorRT for RTX fuses no
smaller one: it would write the whole weight out as bf16 at every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

PIECE = 1 << 17  # numbers that are quantised at once


@dataclass(frozen=True)
class Format:
    """One way to store a weight; `code` is the type of its codes.

    `blocks` are the possible sizes of a block in features, of which the largest that divides a row is used;
    without any, a row is one block.
    """

    name: str
    code: ir.DataType
    blocks: tuple[int, ...] = ()

    @property
    def bits(self) -> int:
        """The width of a code."""
        return int(self.code.bitwidth)

    @property
    def top(self) -> int:
        """The largest code; the smallest is its negative."""
        return 2 ** (self.bits - 1) - 1

    def block(self, features: int) -> int | None:
        """The size of a block in a row of so many features; None if no block divides it."""
        if not self.blocks:
            return features
        return next((size for size in self.blocks if features % size == 0), None)

    def stored_bytes(self, rows: int, features: int, *, scale_bytes: int) -> tuple[int, int]:
        """The bytes of the codes and of the scales of a weight."""
        numbers, block = rows * features, self.block(features)
        assert block, f"{self.name}: no block divides {features} features"
        return numbers * self.bits // 8, numbers // block * scale_bytes

    def encode(self, weight: torch.Tensor, dtype: torch.dtype) -> Encoded:
        """Quantise `weight` [rows, ...], with scales in `dtype`."""
        found = [self._encode(rows, dtype) for rows in _pieces(weight)]
        codes = torch.cat([codes.flatten(1).to(torch.int8) for codes, _ in found])
        return Encoded(codes, torch.cat([scales for _, scales in found]))

    def rounded(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What `weight` stands for once it is stored so: float32, of its own shape."""
        result = torch.empty(weight.shape)
        for rows, out in zip(_pieces(weight), _pieces(result)):
            codes, scales = self._encode(rows, dtype)
            out.copy_(codes.mul_(scales.float()[..., None]).flatten(1))
        return result

    def _encode(self, rows: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes in float32 [n, blocks, block] and scales [n, blocks] of some rows [n, features]."""
        block = self.block(rows.shape[1])
        assert block, f"{self.name}: no block divides {rows.shape[1]} features"
        grouped = rows.to(torch.float32, copy=True).unflatten(1, (-1, block))
        scales = (grouped.abs().amax(-1) / self.top).to(dtype)
        safe = torch.where(scales == 0, 1, scales.float())
        return grouped.div_(safe[..., None]).round_().clamp_(-self.top, self.top), scales


@dataclass(frozen=True)
class Encoded:
    """A quantised weight: codes int8 [rows, features], whatever their width, and scales [rows, blocks]."""

    codes: torch.Tensor
    scales: torch.Tensor

    def decode(self) -> torch.Tensor:
        """The numbers that the codes stand for: float32 [rows, features]."""
        grouped = self.codes.float().unflatten(1, (self.scales.shape[1], -1))
        return (grouped * self.scales.float()[..., None]).flatten(1)


INT8 = Format("int8", ir.DataType.INT8)
INT4 = Format("int4", ir.DataType.INT4, (128, 64, 32))
FORMATS = {format.name: format for format in (INT8, INT4)}


def packed(codes: torch.Tensor) -> np.ndarray:
    """Two 4-bit codes per byte, the first in the lower half, as ONNX stores them."""
    pairs = codes.view(torch.uint8).view(-1, 2)
    return (pairs[:, 0] & 15 | pairs[:, 1] << 4).numpy()


def _pieces(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """Rows of `weight` [n, features], few enough for the processor's cache: each is read several times."""
    rows = weight.flatten(1)
    yield from rows.split(max(1, PIECE // rows.shape[1]))
