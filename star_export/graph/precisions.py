"""Precisions: which format each weight of a model has, and the type of everything else.

The name of a precision covers the whole model. What it leaves in 16 bits are norms, biases, the image table,
the codebook, which the VQ encoder compares with and which is small, and the kernels of DENSE.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import onnx_ir as ir
import torch

from .formats import FP8, INT4, INT8, NVFP4, Format

DECODERS = ("base_ar", "stacked_ar")
# Kernels beside the codebook and the pixels stay dense. In int8 they alone change 41 % of the ids that
# STAR-Nano's VQ encoder finds, and all others 4 % (`python -m tests.bench_formats`). So do both ends of the
# diffusion transformer, 0.5 % of its weights (`python -m tests.bench_diffusion_precisions`).
DENSE = (
    *("vq_encoder.conv_out.weight", "vq_encoder.quant_conv.weight", "vq_decoder.conv_out.weight"),
    "dit.x_embedder.weight",
    "dit.time_caption_embed.timestep_embedder.linear_1.weight",
    "dit.time_caption_embed.timestep_embedder.linear_2.weight",
    "dit.time_caption_embed.caption_embedder.1.weight",
    *("dit.norm_out.linear_1.weight", "dit.norm_out.linear_2.weight"),
)
# Weights by the first part of their names. The image table is left in 16 bits: its rows in int8 would change
# draws as much as all of stacked_ar does.
EVERY = (
    *DECODERS,
    "token_embedding",
    "text_head",
    "image_head",
    "vision_encoder",
    "vq_encoder",
    "vq_decoder",
    "text_embedding",
    "text_encoder",
    "dit",
)
# Trained weights of these are reported to overflow fp16 (docs/diffusion.md, "Low precision"). So they compute
# in bf16 in every precision of 16 bits, as the release does.
NEVER_FP16 = ("text_embedding", "text_encoder", "dit", "vae_encoder", "vae_decoder")


TORCH_DTYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
}


@dataclass(frozen=True)
class Precision:
    """`compute` is the type of activations, caches, scales and dense weights.

    `formats` maps the first part of a weight's name, or the first two, to its format; weights without one are
    dense. `chosen` goes before it, by a weight's whole name. `never_fp16` are the components that compute in
    bf16 where `compute` is fp16.
    """

    compute: ir.DataType
    formats: dict[str, Format] = field(default_factory=dict)
    chosen: Mapping[str, Format] = field(default_factory=dict)
    never_fp16: tuple[str, ...] = NEVER_FP16

    def within(self, component: str) -> Precision:
        """This precision as it is in one component: with another compute type where fp16 would overflow."""
        if self.compute == ir.DataType.FLOAT16 and component in self.never_fp16:
            return replace(self, compute=ir.DataType.BFLOAT16)
        return self

    @property
    def torch_dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.compute]

    @property
    def dtype_name(self) -> str:
        return str(self.torch_dtype).removeprefix("torch.")

    @property
    def dense_name(self) -> str:
        """The name of the format of dense weights: `fp32`, `fp16` or `bf16`."""
        return {4: "fp32", 2: "bf16" if self.compute == ir.DataType.BFLOAT16 else "fp16"}[
            self.compute.itemsize
        ]

    @property
    def rounds_activations(self) -> bool:
        """Whether a format multiplies by rounded activations (`nvfp4.py`)."""
        return any(found.scale for found in (*self.formats.values(), *self.chosen.values()))

    @property
    def quantised(self) -> bool:
        """Whether any weight is stored as codes."""
        return bool(self.formats or self.chosen)

    @property
    def integers(self) -> bool:
        """Whether weights are quantised, and all of them to integers."""
        found = (*self.formats.values(), *self.chosen.values())
        return bool(found) and all(format.code.is_integer() for format in found)

    @property
    def classic(self) -> bool:
        """Whether the classic dialect has all formats: its opsets have no 4-bit floats."""
        return not self.rounds_activations

    def format_of(self, name: str, shape: tuple[int, ...]) -> Format | None:
        """The format of the weight `name` of this shape; None if it is dense.

        int8 takes the place of a format that cannot divide the weight's rows into blocks.
        """
        if len(shape) < 2 or name in DENSE:
            return None
        first, second = (*name.split("."), "")[:2]
        found = self.chosen.get(name) or self.formats.get(f"{first}.{second}") or self.formats.get(first)
        if found is None or found.block(math.prod(shape[1:])):
            return found
        return INT8

    def rounded(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """`weight` as the bundle stores it, widened to float32; it keeps the checkpoint's shape."""
        found, dtype = self.format_of(name, tuple(weight.shape)), self._of_weight(name).torch_dtype
        return weight.to(dtype).float() if found is None else found.rounded(weight, dtype)

    def stored(self, name: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        """The name of the weight's format, and the bytes of each tensor that it is stored as."""
        found, own = self.format_of(name, shape), self._of_weight(name)
        if found is None:
            return own.dense_name, (int(math.prod(shape) * own.compute.itemsize),)
        scale_bytes = int(own.compute.itemsize)
        return found.name, found.stored_bytes(shape[0], math.prod(shape[1:]), scale_bytes=scale_bytes)

    def _of_weight(self, name: str) -> Precision:
        return self.within(name.partition(".")[0])


PRECISIONS = {
    "fp32": Precision(ir.DataType.FLOAT),
    "fp16": Precision(ir.DataType.FLOAT16),
    "bf16": Precision(ir.DataType.BFLOAT16),
    "int8": Precision(ir.DataType.BFLOAT16, dict.fromkeys(EVERY, INT8)),
    # Without stacked_ar, which bears other formats than int8 far worse than base_ar (docs/figures.md).
    "int4": Precision(ir.DataType.BFLOAT16, dict.fromkeys(EVERY, INT8) | {"base_ar": INT4}),
    # The diffusion transformer's refiners bear fp8 worse than its layers, which hold 86 % of its weights.
    "fp8": Precision(ir.DataType.BFLOAT16, dict.fromkeys(EVERY, INT8) | {"base_ar": FP8, "dit.layers": FP8}),
    "nvfp4": Precision(ir.DataType.BFLOAT16, dict.fromkeys(EVERY, INT8) | {"base_ar": NVFP4}),
}
MIXED = "mixed"  # the precision whose decoders have a format for each layer


def mixed(chosen: Mapping[str, Format]) -> Precision:
    """int4 in both decoders, but for the weights that `chosen` has a format for, by their whole names."""
    formats = PRECISIONS["int8"].formats | dict.fromkeys(DECODERS, INT4)
    return replace(PRECISIONS["int4"], formats=formats, chosen=chosen)


EQUAL_LAYERS = {"int4": mixed({}), "int8": PRECISIONS["int8"]}  # all layers of both decoders in one format


def precision_named(name: str) -> Precision:
    """The precision of this name; of `mixed` the smallest one, with all layers in int4."""
    return mixed({}) if name == MIXED else PRECISIONS[name]
