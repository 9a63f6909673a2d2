"""Layers between numbers and codes: quantisation by given scales or by found ones, and the way back.

A reader takes a layer (`parsed.Layer`) and returns the function of its inputs. Codes of FP8 and FP4 are held
as the numbers that they stand for. Quotations are from TensorRT's NvInfer.h (11.1), at the class named.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .numbers import LARGEST, RANGES, held_dtype, rounded
from .parsed import Compute, Layer, Reader

BLOCK = 16
DYNAMIC = {"to_type": "FP4", "scale_type": "FP8", "block_size": BLOCK}  # nvfp4; no other is evaluated


def quantize(layer: Layer) -> Compute:
    """IQuantizeLayer: "output = clamp(round(input / scale) + zeroPt)".

    Ties are rounded to even, and zeroPt is zero ("only symmetric").
    """
    kind, grouped = layer["to_type"], _scales(layer)

    def compute(x, scale, zero=None):
        _check_zero(zero)
        shape, scale = grouped(x.shape, scale)
        scaled = (x.reshape(shape) / scale).reshape(x.shape)
        if kind in RANGES:
            return np.clip(np.rint(scaled), *RANGES[kind]).astype(held_dtype(kind))
        return rounded(scaled.astype(np.float32), kind)

    if kind not in RANGES and kind not in ("FP8", "FP4"):
        raise layer.refuse(f"quantisation to {kind}")
    return compute


def dynamic_quantize(layer: Layer) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """IDynamicQuantizeLayer: "dynamic block quantization of its input tensor", of [..., K] in blocks of 16.

    Returns (codes [..., K], scales [..., K/16]). A block's scale is its largest magnitude / 6, divided by the
    scalar "double quantization scale factor" and rounded to FP8; its numbers are divided by that and rounded
    to FP4. The scale of a block of zeros is zero, and so are its codes. This is NVFP4 as NVIDIA's Model
    Optimizer computes it; TensorRT's documents do not say in which order it multiplies and rounds.
    """
    for name, value in DYNAMIC.items():
        if layer[name] != value:
            raise layer.refuse(f"{name} {layer[name]}", f"{name} {value}")
    if layer["axis"] != len(layer.input(0).shape) - 1 or layer["block_shape"]:
        raise layer.refuse(f"axis {layer['axis']} and block_shape {layer['block_shape']}", "the last axis")

    def compute(x: np.ndarray, whole: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        blocks = x.reshape(*x.shape[:-1], -1, BLOCK)
        largest = np.abs(blocks).max(axis=-1)
        scales = rounded(largest / np.float32(LARGEST["FP4"]) / whole, "FP8")
        steps = (scales * whole)[..., None]
        codes = rounded(np.divide(blocks, steps, out=np.zeros_like(blocks), where=steps > 0), "FP4")
        return codes.reshape(x.shape), scales

    return compute


def dequantize(layer: Layer) -> Compute:
    """IDequantizeLayer: "output = (input - zeroPt) * scale"; zeroPt is zero ("only symmetric")."""
    grouped = _scales(layer)

    def compute(x, scale, zero=None):
        _check_zero(zero)
        shape, scale = grouped(x.shape, scale)
        return np.multiply(x.reshape(shape), scale, dtype=np.float32).reshape(x.shape)

    return compute


def _scales(layer: Layer) -> Callable[[tuple[int, ...], np.ndarray], tuple[tuple[int, ...], np.ndarray]]:
    """The function that gives, from an input's shape and its scales, two shapes that broadcast.

    It returns a shape of the input, in which a blocked axis is two axes (blocks, B), and the scales, with an
    axis of 1 for B, so that no scale is copied to its elements.

    The scale is "a scalar for per-tensor, a 1D tensor for per-channel, or the same rank as the input tensor
    for block quantization". For blocks, one axis has a scale per block: "scale[r//B, s]".
    """
    axis, rank, scale_rank = layer["axis"], len(layer.input(0).shape), len(layer.input(1).shape)
    if layer["block_shape"]:
        raise layer.refuse(f"block_shape {layer['block_shape']}")

    def grouped(shape: tuple[int, ...], scale: np.ndarray) -> tuple[tuple[int, ...], np.ndarray]:
        if scale.ndim == 0:
            return shape, scale
        if scale.ndim == 1 and (rank != 1 or scale.shape == shape):
            if scale.shape != (shape[axis],):
                raise ValueError(f"{scale.shape[0]} scales for an axis of {shape[axis]}")
            return shape, scale.reshape([-1 if i == axis else 1 for i in range(rank)])
        blocked = [i for i in range(rank) if scale.shape[i] != shape[i]]
        if len(blocked) > 1 or any(shape[i] % scale.shape[i] for i in blocked):
            raise ValueError(f"scales {scale.shape} for {shape}")
        for i in blocked:
            blocks = scale.shape[i]
            shape = (*shape[:i], blocks, shape[i] // blocks, *shape[i + 1 :])
            scale = np.expand_dims(scale, i + 1)
        return shape, scale

    if scale_rank > 1 and scale_rank != rank:
        raise layer.refuse(f"scales of rank {scale_rank} for an input of rank {rank}")
    return grouped


def _check_zero(zero: np.ndarray | None) -> None:
    if zero is not None and zero.any():
        raise ValueError("a zero point other than zero")


READERS: dict[str, Reader] = {
    "QUANTIZE": quantize,
    "DYNAMIC_QUANTIZE": dynamic_quantize,
    "DEQUANTIZE": dequantize,
}
