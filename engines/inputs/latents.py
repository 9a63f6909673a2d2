"""What the diffusion decoder's graphs are fed with, and the images that come of them. No file access.

A map is [N, c, h, w]. Its patches are [N, T, 4, c]: 2 x 2 places each, row by row.

Source: docs/diffusion.md; diffusers 0.33, transformer_lumina2.py and scheduling_flow_match_euler_discrete.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..bundle.bfloat16 import bf16_rounded
from ..bundle.manifest import DiffusionSpec
from ..errors import ParityError

FACTOR = 8  # pixels along a side of an image for each place along a side of its latent
PATCH = 2  # places along a side of a patch
SOURCE_SIDE = 1024  # pixels of the square to which an edit's image is squashed first
TIME_FEATURES = 256
ROPE_THETA = 10_000.0
LOG_VARIANCE = (-30.0, 20.0)


@dataclass(frozen=True)
class Schedule:
    """The noise levels of n steps, `sigmas` float32 [n+1] with 0 at the end, and the `times` [n] that the
    transformer is told."""

    sigmas: np.ndarray
    times: np.ndarray


def schedule(steps: int, *, shift: float, sigmas_bf16: bool) -> Schedule:
    """The schedule of `steps` steps. `sigmas_bf16` rounds the sigmas, but not the times, as the release
    does."""
    levels = np.linspace(1.0, 1 / steps, steps).astype(np.float32)
    sigmas = np.float32(shift) * levels / (1 + np.float32(shift - 1) * levels)
    times = 1 - sigmas * np.float32(1000) / np.float32(1000)
    sigmas = np.append(sigmas, np.float32(0))
    return Schedule(bf16_rounded(sigmas) if sigmas_bf16 else sigmas, times)


def time_features(time: float) -> np.ndarray:
    """Cosines and sines of a step's time in 0..1: float32 [1, 256]."""
    half = TIME_FEATURES // 2
    angles = float(time) * np.exp(-math.log(10_000) * np.arange(half) / half)
    return np.concatenate([np.cos(angles), np.sin(angles)])[None].astype(np.float32)


def rotary_cos_sin(
    axes: tuple[int, int, int], *, caption_tokens: int, side: int
) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of the rotary angles of a row's tokens, caption first: two of float32 [L + 2T, D/2].

    `side` counts patches along a side of the image, T of which are its latent's and T its source's.
    """
    rows, columns = np.divmod(np.arange(2 * side * side), side)
    before = np.full_like(rows, caption_tokens)
    none = np.zeros(caption_tokens)
    positions = np.concatenate(
        [np.stack([np.arange(caption_tokens), none, none]), np.stack([before, rows, columns])], axis=1
    )  # [3, L + 2T]
    angles = [
        position[:, None] * ROPE_THETA ** -(np.arange(0, size, 2) / size)
        for position, size in zip(positions, axes)
    ]
    table = np.concatenate(angles, axis=1)
    return np.cos(table).astype(np.float32), np.sin(table).astype(np.float32)


def patches_from_map(pixels: np.ndarray) -> np.ndarray:
    """[N, c, h, w] -> patches [N, T, 4, c]."""
    images, channels, height, width = pixels.shape
    blocks = pixels.reshape(images, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    blocks = blocks.transpose(0, 2, 4, 3, 5, 1)  # [N, h/2, w/2, 2, 2, c]
    return np.ascontiguousarray(blocks.reshape(images, -1, PATCH * PATCH, channels))


def map_from_patches(patches: np.ndarray) -> np.ndarray:
    """The inverse of `patches_from_map` for a square."""
    images, count, _, channels = patches.shape
    side = math.isqrt(count)
    blocks = patches.reshape(images, side, side, PATCH, PATCH, channels).transpose(0, 5, 1, 3, 2, 4)
    return np.ascontiguousarray(blocks.reshape(images, channels, side * PATCH, side * PATCH))


def vq_map(rows: np.ndarray, *, side: int) -> np.ndarray:
    """The codebook's rows of an image's ids [N, T, C] as a map [N, C, side, side]."""
    images, tokens, channels = rows.shape
    grid = rows.transpose(0, 2, 1).reshape(images, channels, math.isqrt(tokens), -1)
    return resized(grid, side)


def resized(pixels: np.ndarray, side: int) -> np.ndarray:
    """Interpolate a square map [N, c, h, h] to [N, c, side, side], bilinearly between the nearest places.

    Corners are not aligned, and what is made smaller is not blurred first.
    """
    size = pixels.shape[-1]
    at = np.maximum((np.arange(side) + 0.5) * (size / side) - 0.5, 0)
    low = np.minimum(at.astype(np.int64), size - 1)
    high, share = np.minimum(low + 1, size - 1), (at - low).astype(np.float32)
    columns = pixels[..., low] * (1 - share) + pixels[..., high] * share
    found = columns[:, :, low] * (1 - share)[:, None] + columns[:, :, high] * share[:, None]
    return np.ascontiguousarray(found, np.float32)


def source_from_image(image: np.ndarray, *, resolution: int) -> np.ndarray:
    """The VAE encoder's input of an image, uint8 [H, W, 3]: float32 [1, 3, R, R] in [-1, 1]."""
    from PIL import Image

    square = Image.fromarray(image).resize((SOURCE_SIDE, SOURCE_SIDE), Image.Resampling.BILINEAR)
    pixels = np.asarray(square, np.float32) / np.float32(127.5) - np.float32(1)
    return resized(pixels.transpose(2, 0, 1)[None], resolution)


def latent_from_moments(moments: np.ndarray, noise: np.ndarray, spec: DiffusionSpec) -> np.ndarray:
    """A sample of what the VAE's encoder found: moments [1, 2c, q, q] and noise [1, c, q, q] -> latent."""
    mean, log_variance = np.split(moments, 2, axis=1)
    deviation = np.exp(np.clip(log_variance, *LOG_VARIANCE) / 2)
    return ((mean + deviation * noise - spec.latent_shift) * spec.latent_scale).astype(np.float32)


def images_from_painted(image: np.ndarray) -> np.ndarray:
    """Convert the output of `vae_decoder`, float32 [N, 3, R, R] around [-1, 1], to uint8 [N, R, R, 3].

    Values are clipped and rounded, where `images_from_decoded` truncates. Raises ParityError when a value is
    not finite.
    """
    if not np.isfinite(image).all():
        raise ParityError(
            "The painted image has non-finite values",
            where=f"vae_decoder: expected finite values, got {np.sum(~np.isfinite(image))} that are not",
            fix="validate the bundle on this device: star-export validate BUNDLE",
        )
    half = np.float32(0.5)
    levels = np.rint(np.clip(image * half + half, 0, 1) * np.float32(255))
    return np.ascontiguousarray(levels.astype(np.uint8).transpose(0, 2, 3, 1))
