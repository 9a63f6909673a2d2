"""What one does with the diffusion decoder: paint the image of image ids, or an edit of a source image.

These functions take ids, arrays and noise, never text or files.

Source: docs/diffusion.md; diffusers 0.33, pipelines/lumina2/pipeline_lumina2.py and
schedulers/scheduling_flow_match_euler_discrete.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import VAEConfig
from .dit import DiT, map_from_patches, patches_from_map, rotary_cos_sin, time_features
from .text_encoder import TextEncoder

MAX_LOG_VARIANCE = (-30.0, 20.0)
SOURCE_SIDE = 1024  # pixels of the square to which an edit's image is squashed first


@dataclass(frozen=True)
class Schedule:
    """The noise levels of n steps: `sigmas` [n+1], the last one 0, and the `times` [n] that the model is
    told; both float32."""

    sigmas: Tensor
    times: Tensor


def schedule(steps: int, *, shift: float, sigmas_bf16: bool) -> Schedule:
    """The schedule of `steps` steps. `sigmas_bf16` rounds the sigmas, but not the times, as the release
    does."""
    levels = np.linspace(1.0, 1 / steps, steps).astype(np.float32)
    sigmas = torch.from_numpy(shift * levels / (1 + (shift - 1) * levels))
    times = 1 - sigmas * 1000 / 1000
    sigmas = torch.cat([sigmas, torch.zeros(1)])
    return Schedule(sigmas.to(torch.bfloat16).float() if sigmas_bf16 else sigmas, times)


@dataclass(frozen=True)
class Guidance:
    """The weights of the text, of the image (VQ map or source) and, in an edit, of the VQ map."""

    text: float
    image: float
    vq: float = 0.0


@dataclass(frozen=True)
class Row:
    """One condition of the transformer: caption [1, L, T], vq_map [N, C, q, q], source [N, c, q, q]."""

    caption: Tensor
    vq_map: Tensor
    source: Tensor


def vq_map(codebook: nn.Embedding, image_ids: Tensor, *, side: int) -> Tensor:
    """The codebook's rows of image ids [N, T] as a map [N, C, side, side], interpolated bilinearly."""
    rows = codebook(image_ids).transpose(1, 2)  # [N, C, T]
    grid = rows.unflatten(2, (math.isqrt(image_ids.shape[1]), -1))
    return F.interpolate(grid, size=(side, side), mode="bilinear", align_corners=False)


def encode_text(embedding: nn.Embedding, encoder: TextEncoder, input_ids: Tensor) -> Tensor:
    """input_ids [1, L] -> the caption that the transformer takes, [1, L, T]."""
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    return encoder(embedding(input_ids), positions)


def source_latent(moments: Tensor, noise: Tensor, vae: VAEConfig) -> Tensor:
    """A sample of the VAE encoder's distribution: moments [N, 2c, q, q], noise [N, c, q, q] -> latent."""
    mean, log_variance = moments.chunk(2, dim=1)
    deviation = (log_variance.clamp(*MAX_LOG_VARIANCE) / 2).exp()
    return (mean + deviation * noise - vae.shift) * vae.scale


def generate_rows(caption: Tensor, empty: Tensor, vq: Tensor, *, latent_channels: int) -> dict[str, Row]:
    """The rows of an image: u without condition, i with the image tokens, t with the text too."""
    none, no_source = torch.zeros_like(vq), vq.new_zeros(vq.shape[0], latent_channels, *vq.shape[2:])
    return {
        "u": Row(empty, none, no_source),
        "i": Row(empty, vq, no_source),
        "t": Row(caption, vq, no_source),
    }


def edit_rows(caption: Tensor, empty: Tensor, vq: Tensor, source: Tensor) -> dict[str, Row]:
    """The rows of an edit: u without condition, i with the source, t with the text too, and x with the text
    and the image tokens, but without the source."""
    none, no_source = torch.zeros_like(vq), torch.zeros_like(source)
    return {
        "u": Row(empty, none, no_source),
        "i": Row(empty, none, source),
        "t": Row(caption, none, source),
        "x": Row(caption, vq, no_source),
    }


def velocity(dit: DiT, row: Row, latents: Tensor, time: float) -> Tensor:
    """What the transformer makes of `latents` [N, c, q, q] under one condition, in one call."""
    length, side = row.caption.shape[1], latents.shape[2] // dit.config.patch_size
    tables = rotary_cos_sin(dit.config, caption_tokens=length, side=side)
    of_caption, of_image = (tuple(t[part] for t in tables) for part in (slice(length), slice(length, None)))
    maps = (patches_from_map(x) for x in (latents, row.source, row.vq_map))
    return map_from_patches(dit(*maps, row.caption, time_features(time), of_caption, of_image))


def guided(found: dict[str, Tensor], guidance: Guidance, *, last: bool) -> Tensor:
    """Combine the velocities of the rows. A text guidance of at most 1 is none, and the last step has only
    that of an edit's image tokens."""
    text = found["t"]
    if guidance.text <= 1:
        return text
    v = text
    if not last:
        v = found["u"] + guidance.text * (text - found["i"]) + guidance.image * (found["i"] - found["u"])
    return v + guidance.vq * (found["x"] - found["u"]) if "x" in found else v


def needed_rows(rows: dict[str, Row], guidance: Guidance, *, last: bool) -> dict[str, Row]:
    """The rows that a step's velocity depends on."""
    if guidance.text <= 1:
        return {"t": rows["t"]}
    if not last:
        return rows
    return {name: rows[name] for name in (("u", "t", "x") if "x" in rows else ("t",))}


@dataclass(frozen=True)
class Step:
    """A step's guided velocity, and the latents after it; both [N, c, q, q]."""

    guided: Tensor
    latents: Tensor


def paint(
    dit: DiT,
    rows: dict[str, Row],
    noise: Tensor,
    steps: Schedule,
    guidance: Guidance,
    *,
    latents_bf16: bool = False,
) -> Iterator[Step]:
    """Follow the velocity from `noise` [N, c, q, q] to an image's latents, step by step.

    `latents_bf16` rounds the latents after each step, as the release does.
    """

    def held(x: Tensor) -> Tensor:
        return x.to(torch.bfloat16).float() if latents_bf16 else x

    latents, count = held(noise), len(steps.times)
    for k in range(count):
        last = k == count - 1
        wanted = needed_rows(rows, guidance, last=last)
        found = {name: velocity(dit, row, latents, float(steps.times[k])) for name, row in wanted.items()}
        v = guided(found, guidance, last=last)
        latents = held(latents + (steps.sigmas[k] - steps.sigmas[k + 1]) * v)
        yield Step(v, latents)


def images_from_decoded(decoded: Tensor) -> Tensor:
    """The VAE decoder's output [N, 3, H, W] -> uint8 [N, H, W, 3], rounded half to even."""
    levels = (decoded / 2 + 0.5).clamp(0, 1) * 255
    return levels.round().to(torch.uint8).permute(0, 2, 3, 1)


def source_from_square(square: Tensor, *, side: int) -> Tensor:
    """An image squashed to a square, uint8 [S, S, 3] -> the VAE encoder's input [1, 3, side, side].

    Interpolated bilinearly between the nearest pixels alone: what is made smaller is not blurred first.
    """
    image = square.permute(2, 0, 1)[None].float() / 127.5 - 1
    return F.interpolate(image, size=(side, side), mode="bilinear", align_corners=False)
