"""Weight formats: what a bundle stores of a weight, and the numbers that it then stands for. No graphs here.

A weight [rows, ...] is quantised row by row, a row being the features that one output is computed from:
symmetric, without a zero point, each code times the scale of its block (ONNX `DequantizeLinear`). Codes are
rounded to nearest.

int4 has blocks of 128, 64 or 32 features. int8 and fp8 have one block, the row, because TensorRT for RTX
fuses no smaller one: it would write the whole weight out as bf16 at every step. fp8 is E4M3 (OCP 8-bit
Floating Point Specification, 1.0). Its scale comes from the largest number: since the steps of a float grow
with it, a search for a better one gains nothing.

nvfp4 is E2M1 in blocks of 16 features, with E4M3 scales and one more scale for the whole weight. That one is
a power of two, so a number that is decoded is exact in bf16. Of a few scales per block the one with the
smallest error is taken: 0.0832 of normally distributed weights in rms, instead of 0.0956 with the first.
TensorRT for RTX multiplies nvfp4 as it is stored only by activations in nvfp4, so these are rounded as well
(`nvfp4.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

PIECE = 1 << 17  # numbers that are quantised at once
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # the numbers of codes 0 to 7; those of 8 to 15 are negative
LARGEST = {ir.DataType.FLOAT8E4M3FN: 448.0, ir.DataType.FLOAT4E2M1: 6.0}
TRIED = (0.95, 1.05, 1.45, 1.55)  # scales of a block of nvfp4, in units of its largest magnitude / 6


@dataclass(frozen=True)
class Format:
    """One way to store a weight; `code` is the type of its codes.

    `blocks` are the possible sizes of a block in features, of which the largest that divides a row is used;
    without any, a row is one block. `scale` is the type of its scales, which have one more scale for all of
    them; None for the compute type, without that.
    """

    name: str
    code: ir.DataType
    blocks: tuple[int, ...] = ()
    scale: ir.DataType | None = None

    @property
    def bits(self) -> int:
        """The width of a code."""
        return int(self.code.bitwidth)

    @property
    def top(self) -> float:
        """The largest number of the code's type."""
        return LARGEST.get(self.code, 2 ** (self.bits - 1) - 1)

    @property
    def bottom(self) -> float:
        """The smallest number of the code's type, of which rounding to nearest makes no use in integers."""
        return -self.top - 1 if self.code.is_integer() else -self.top

    def nearest_(self, numbers: torch.Tensor) -> torch.Tensor:
        """Round `numbers`, which are in units of their scales, to numbers of the code's type, in place."""
        return nearest_(numbers.clamp_(self.bottom, self.top), self.code)

    def block(self, features: int) -> int | None:
        """The size of a block in a row of so many features; None if no block divides it."""
        if not self.blocks:
            return features
        return next((size for size in self.blocks if features % size == 0), None)

    def stored_bytes(self, rows: int, features: int, *, scale_bytes: int) -> tuple[int, ...]:
        """The bytes of the codes and of the scales of a weight, and of the scale of its scales.

        `scale_bytes` is the size of the compute type.
        """
        numbers, block = rows * features, self.block(features)
        assert block, f"{self.name}: no block divides {features} features"
        codes, scales = numbers * self.bits // 8, numbers // block
        if self.scale is None:
            return codes, scales * scale_bytes
        return codes, scales * int(self.scale.itemsize), scale_bytes

    def encode(self, weight: torch.Tensor, dtype: torch.dtype) -> Encoded:
        """Quantise `weight` [rows, ...], with scales in `dtype`."""
        whole = self.whole(weight)
        found = [self._encode(rows, dtype, whole) for rows in _pieces(weight)]
        codes = torch.cat([codes_from_numbers(numbers.flatten(1), self.code) for numbers, _ in found])
        scales = torch.cat([scales for _, scales in found])
        return Encoded(codes, scales, self.code, None if whole is None else whole.to(dtype))

    def rounded(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What `weight` stands for once it is stored so: float32, of its own shape."""
        result, whole = torch.empty(weight.shape), self.whole(weight)
        for rows, out in zip(_pieces(weight), _pieces(result)):
            numbers, scales = self._encode(rows, dtype, whole)
            steps = scales.float() if whole is None else scales.float() * whole
            out.copy_(numbers.mul_(steps[..., None]).flatten(1))
        return result

    def whole(self, weight: torch.Tensor) -> torch.Tensor | None:
        """The scale of a weight's scales: the smallest power of two with which none overflows.

        None where there is no such scale.
        """
        if self.scale is None:
            return None
        largest = weight.abs().amax().float() * max(TRIED) / self.top / LARGEST[self.scale]
        return torch.exp2(torch.log2(largest).ceil()) if largest > 0 else torch.ones(())

    def _encode(
        self, rows: torch.Tensor, dtype: torch.dtype, whole: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Numbers of the code's type, in float32 [n, blocks, block], and scales [n, blocks] of some rows."""
        block = self.block(rows.shape[1])
        assert block, f"{self.name}: no block divides {rows.shape[1]} features"
        grouped = rows.to(torch.float32, copy=True).unflatten(1, (-1, block))
        steps = grouped.abs().amax(-1) / self.top
        if whole is not None:
            return self._searched(grouped, steps, whole)
        scales = steps.to(dtype)
        return self._nearest(grouped, scales.float()), scales

    def _searched(
        self, grouped: torch.Tensor, steps: torch.Tensor, whole: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `_encode`, with the scales near `steps` [n, blocks] that give the smallest squared errors."""
        best = torch.full(steps.shape, torch.inf)
        numbers, scales = torch.empty(grouped.shape), torch.empty(steps.shape, dtype=torch.float8_e4m3fn)
        for factor in TRIED:
            tried = (steps * (factor / whole)).to(scales.dtype)
            found = self._nearest(grouped.clone(), tried.float() * whole)
            error = (found * (tried.float() * whole)[..., None]).sub_(grouped).square_().sum(-1)
            better = error < best
            best = torch.where(better, error, best)
            numbers = torch.where(better[..., None], found, numbers)
            scales = torch.where(better, tried.float(), scales.float()).to(scales.dtype)
        return numbers, scales

    def _nearest(self, grouped: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """The numbers of the code's type that are nearest to grouped / steps. `grouped` is overwritten."""
        safe = torch.where(steps == 0, 1, steps)
        return nearest_(grouped.div_(safe[..., None]).clamp_(-self.top, self.top), self.code)


@dataclass(frozen=True)
class Encoded:
    """A quantised weight: the bits of codes of type `code` in int8 [rows, features], whatever their width.

    A code that is an integer is its own bits, so INT8 stands for INT4 too.

    `scales` [rows, blocks] are of the compute type, or of the format's; then `whole` is the scale of them
    all, in the compute type.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    code: ir.DataType = ir.DataType.INT8
    whole: torch.Tensor | None = None

    def decode(self) -> torch.Tensor:
        """The numbers that the codes stand for: float32 [rows, features]."""
        grouped = numbers_from_codes(self.codes, self.code).unflatten(1, (self.scales.shape[1], -1))
        steps = self.scales.float() if self.whole is None else self.scales.float() * self.whole.float()
        return (grouped * steps[..., None]).flatten(1)


def nearest_(numbers: torch.Tensor, code: ir.DataType) -> torch.Tensor:
    """Round `numbers`, which lie within the range of `code`, to its nearest numbers, ties to even, in place.

    E2M1 has steps of 0.5 up to 2, of 1 up to 4 and of 2 up to 6: the parts of a number are rounded apart.
    """
    if code == ir.DataType.FLOAT8E4M3FN:
        return numbers.copy_(numbers.to(torch.float8_e4m3fn))
    if code != ir.DataType.FLOAT4E2M1:
        return numbers.round_()
    size = numbers.abs()
    result = size.clamp(max=2).mul_(2).round_().mul_(0.5)
    result += (size - 2).clamp_(0, 2).round_()
    result += size.sub_(4).clamp_(0, 2).mul_(0.5).round_().mul_(2)
    return numbers.copy_(result.copysign_(numbers))


def codes_from_numbers(numbers: torch.Tensor, code: ir.DataType) -> torch.Tensor:
    """The bits of `numbers`, which are numbers of the type `code`, in int8."""
    if code == ir.DataType.FLOAT8E4M3FN:
        return numbers.to(torch.float8_e4m3fn).view(torch.int8)
    if code != ir.DataType.FLOAT4E2M1:
        return numbers.to(torch.int8)
    sizes = torch.searchsorted(torch.tensor(E2M1), numbers.abs().contiguous(), out_int32=True)
    return (sizes | numbers.signbit().int() << 3).to(torch.int8)


def numbers_from_codes(codes: torch.Tensor, code: ir.DataType) -> torch.Tensor:
    """Invert `codes_from_numbers`, in float32."""
    if code == ir.DataType.FLOAT8E4M3FN:
        return codes.view(torch.float8_e4m3fn).float()
    if code != ir.DataType.FLOAT4E2M1:
        return codes.float()
    return torch.tensor([*E2M1, *(-number for number in E2M1)])[codes.int()]


INT8 = Format("int8", ir.DataType.INT8)
INT4 = Format("int4", ir.DataType.INT4, (128, 64, 32))
FP8 = Format("fp8", ir.DataType.FLOAT8E4M3FN)
NVFP4 = Format("nvfp4", ir.DataType.FLOAT4E2M1, (16,), ir.DataType.FLOAT8E4M3FN)
FORMATS = {format.name: format for format in (INT8, INT4, FP8, NVFP4)}


def packed(codes: torch.Tensor) -> np.ndarray:
    """Two 4-bit codes per byte, the first in the lower half, as ONNX stores them."""
    pairs = codes.view(torch.uint8).view(-1, 2)
    return (pairs[:, 0] & 15 | pairs[:, 1] << 4).numpy()


def _pieces(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """Rows of `weight` [n, features], few enough for the processor's cache: each is read several times."""
    rows = weight.flatten(1)
    yield from rows.split(max(1, PIECE // rows.shape[1]))
