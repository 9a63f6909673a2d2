"""The diffusion transformer: Lumina-Image-2.0's, widened by STAR for the VQ map and for a source image.

A row is one image under one caption, without padding: rows of one call share the caption's length. The
image tokens are two halves, one below the other: the noisy latent and the source, each beside the VQ map.

Source: docs/diffusion.md; diffusers 0.33, models/transformers/transformer_lumina2.py, and MM-MVR/STAR,
star/models/pixel_decoder/transformer_lumina2.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import RMSNorm, rotate_half
from .config import TIME_FEATURES, DiTConfig

ROPE_THETA = 10_000.0
FINAL_EPS = 1e-6
PATCH = 2  # places along a side of a patch


def time_features(time: float) -> Tensor:
    """Cosines and sines of a step's time in 0..1: float32 [1, 256]."""
    half = TIME_FEATURES // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32) / half)
    angles = torch.tensor(time, dtype=torch.float32) * frequencies
    return torch.cat([angles.cos(), angles.sin()])[None]


def patches_from_map(pixels: Tensor) -> Tensor:
    """[N, c, h, w] -> [N, h/2 * w/2, 4, c]: patches row by row, the places of each row by row."""
    blocks = pixels.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))  # [N, c, h/2, 2, w/2, 2]
    return blocks.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)


def map_from_patches(patches: Tensor) -> Tensor:
    """The inverse of `patches_from_map` for a square."""
    side = math.isqrt(patches.shape[1])
    blocks = patches.unflatten(2, (PATCH, PATCH)).unflatten(1, (side, side))
    return blocks.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def rotary_cos_sin(config: DiTConfig, *, caption_tokens: int, side: int) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles of a row's tokens, caption first: two of float32 [L + 2T, D/2].

    `side` counts image tokens along a side of the image. A caption's token j is at (j, 0, 0), and an image
    token at (caption_tokens, row, column), where rows run on through the lower half.
    """
    rows, columns = torch.meshgrid(torch.arange(2 * side), torch.arange(side), indexing="ij")
    image = torch.stack([torch.full((2 * side * side,), caption_tokens), rows.flatten(), columns.flatten()])
    caption = torch.stack([torch.arange(caption_tokens), *torch.zeros(2, caption_tokens, dtype=torch.int64)])
    positions = torch.cat([caption, image], dim=1).double()  # [3, M]
    angles = [
        position[:, None] * ROPE_THETA ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
        for position, size in zip(positions, config.axes)
    ]
    table = torch.cat(angles, dim=1)
    return table.cos().float(), table.sin().float()


def pairs_first(x: Tensor) -> Tensor:
    """Reorder a head's dimensions so that those that turn together, 2k and 2k+1, become k and k + D/2.

    Query and key are reordered alike, which leaves their products as they are.
    """
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


class Attention(nn.Module):
    """Grouped-query attention among all tokens of a row, with norms of query and key, without biases."""

    def __init__(self, config: DiTConfig, *, rotate: Callable):
        super().__init__()
        self.head_dim, self.rotate = config.head_dim, rotate
        size, kv_size = config.hidden_size, config.num_kv_heads * config.head_dim
        self.norm_q = RMSNorm(config.head_dim, config.norm_eps)
        self.norm_k = RMSNorm(config.head_dim, config.norm_eps)
        self.to_q = nn.Linear(size, size, bias=False)
        self.to_k = nn.Linear(size, kv_size, bias=False)
        self.to_v = nn.Linear(size, kv_size, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(size, size, bias=False)])

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        query, key, value = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, heads or KV, S, D]
            for project in (self.to_q, self.to_k, self.to_v)
        )
        query = self.rotate(pairs_first(self.norm_q(query)), cos, sin)
        key = self.rotate(pairs_first(self.norm_k(key)), cos, sin)
        attended = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        return self.to_out[0](attended.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU: linear_2(silu(linear_1(x)) * linear_3(x)), without biases."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.linear_1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.linear_2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.linear_3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)) * self.linear_3(x))


class ContextBlock(nn.Module):
    """A residual block of attention and feed-forward, each between two norms."""

    def __init__(self, config: DiTConfig, *, rotate: Callable):
        super().__init__()
        size, eps = config.hidden_size, config.norm_eps
        self.attn = Attention(config, rotate=rotate)
        self.feed_forward = FeedForward(config)
        self.norm1 = RMSNorm(size, eps)
        self.ffn_norm1 = RMSNorm(size, eps)
        self.norm2 = RMSNorm(size, eps)
        self.ffn_norm2 = RMSNorm(size, eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.norm2(self.attn(self.norm1(x), cos, sin))
        return x + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x)))


class ModulatedNorm(nn.Module):
    """The norm before attention, and what the step's time makes of a block: scales and gates."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.linear = nn.Linear(config.time_size, 4 * config.hidden_size)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)


class ModulatedBlock(nn.Module):
    """A context block whose inputs are scaled, and whose outputs are gated, by the step's time."""

    def __init__(self, config: DiTConfig, *, rotate: Callable):
        super().__init__()
        size, eps = config.hidden_size, config.norm_eps
        self.attn = Attention(config, rotate=rotate)
        self.feed_forward = FeedForward(config)
        self.norm1 = ModulatedNorm(config)
        self.ffn_norm1 = RMSNorm(size, eps)
        self.norm2 = RMSNorm(size, eps)
        self.ffn_norm2 = RMSNorm(size, eps)

    def forward(self, x: Tensor, time_embed: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        modulation = self.norm1.linear(F.silu(time_embed)).unsqueeze(1)  # [1, 1, 4H]
        scale, gate, ffn_scale, ffn_gate = modulation.chunk(4, dim=-1)
        attended = self.attn(self.norm1.norm(x) * (1 + scale), cos, sin)
        x = x + gate.tanh() * self.norm2(attended)
        passed = self.feed_forward(self.ffn_norm1(x) * (1 + ffn_scale))
        return x + ffn_gate.tanh() * self.ffn_norm2(passed)


class TimestepEmbedder(nn.Module):
    """The features of a step's time -> their embedding: [1, 256] -> [1, time_size]."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.linear_1 = nn.Linear(TIME_FEATURES, config.time_size)
        self.linear_2 = nn.Linear(config.time_size, config.time_size)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(features)))


class TimeCaptionEmbed(nn.Module):
    """The two embedders of what is no image: of the time, and of the caption's states from the text
    encoder."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.timestep_embedder = TimestepEmbedder(config)
        self.caption_embedder = nn.Sequential(
            RMSNorm(config.caption_size, config.norm_eps), nn.Linear(config.caption_size, config.hidden_size)
        )


class FinalNorm(nn.Module):
    """A layer norm without gain or bias, scaled by the step's time, and the projection to a patch."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.linear_1 = nn.Linear(config.time_size, config.hidden_size)
        self.linear_2 = nn.Linear(config.hidden_size, config.patch_size**2 * config.latent_channels)

    def forward(self, x: Tensor, time_embed: Tensor) -> Tensor:
        scale = 1 + self.linear_1(F.silu(time_embed)).unsqueeze(1)
        normed = F.layer_norm(x.float(), x.shape[-1:], eps=FINAL_EPS).to(x.dtype)
        return self.linear_2(normed * scale)


class DiT(nn.Module):
    """The whole transformer; `rotate` is an operation that a compiler may replace by its own."""

    def __init__(self, config: DiTConfig, *, rotate: Callable = rotate_half):
        super().__init__()
        self.config, size = config, config.hidden_size
        features = config.patch_size**2 * (config.latent_channels + config.vq_channels)
        self.x_embedder = nn.Linear(features, size)
        self.time_caption_embed = TimeCaptionEmbed(config)
        self.noise_refiner = nn.ModuleList(
            ModulatedBlock(config, rotate=rotate) for _ in range(config.num_refiners)
        )
        self.context_refiner = nn.ModuleList(
            ContextBlock(config, rotate=rotate) for _ in range(config.num_refiners)
        )
        self.layers = nn.ModuleList(ModulatedBlock(config, rotate=rotate) for _ in range(config.num_layers))
        self.norm_out = FinalNorm(config)
        self.ori_inp_refiner = nn.Sequential(
            nn.Linear(size, size), nn.GELU(approximate="tanh"), nn.Linear(size, size, bias=False)
        )

    def forward(
        self,
        latents: Tensor,
        source: Tensor,
        vq_map: Tensor,
        caption: Tensor,
        time: Tensor,
        caption_angles: tuple[Tensor, Tensor],
        image_angles: tuple[Tensor, Tensor],
    ) -> Tensor:
        """The velocity of `latents`: [N, T, 4, c], in patches.

        latents and source [N, T, 4, c] and vq_map [N, T, 4, C] in patches, caption [1, L, caption_size]
        without padding, time [1, 256] (`time_features`), cos and sin of the caption [L, D/2] and of both
        halves of the image [2T, D/2] (`rotary_cos_sin`).
        """
        angles = caption_angles, image_angles
        text, image, time_embed = self.refined(latents, source, vq_map, caption, time, *angles)
        text, image = self.through(range(len(self.layers)), text, image, time_embed, *angles)
        return self.velocity(image, time_embed)

    def refined(
        self,
        latents: Tensor,
        source: Tensor,
        vq_map: Tensor,
        caption: Tensor,
        time: Tensor,
        caption_angles: tuple[Tensor, Tensor],
        image_angles: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What comes before the layers: caption [N, L, H], both halves of the image [N, 2T, H] and the
        embedding of the time [1, time_size]."""
        time_embed = self.time_caption_embed.timestep_embedder(time)  # [1, time_size]
        halves = [torch.cat([half, vq_map], dim=-1).flatten(2) for half in (latents, source)]
        image = self.x_embedder(torch.cat(halves, dim=1))  # [N, 2T, H]
        text = self.time_caption_embed.caption_embedder(caption)  # [1, L, H]
        images, half = image.shape[0], latents.shape[1]
        for block in self.context_refiner:
            text = block(text, *(table[None] for table in caption_angles))
        seen = [table.expand(images, -1, -1) for table in image_angles]
        for block in self.noise_refiner:
            image = block(image, time_embed, *seen)
        image = torch.cat([image[:, :half], self.ori_inp_refiner(image[:, half:])], dim=1)
        return text.expand(images, -1, -1), image, time_embed

    def through(
        self,
        layers: range,
        text: Tensor,
        image: Tensor,
        time_embed: Tensor,
        caption_angles: tuple[Tensor, Tensor],
        image_angles: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """What `layers` make of caption [N, L, H] and both halves of the image [N, 2T, H]."""
        images, length = text.shape[:2]
        x = torch.cat([text, image], dim=1)
        both = [torch.cat(tables).expand(images, -1, -1) for tables in zip(caption_angles, image_angles)]
        for layer in layers:
            x = self.layers[layer](x, time_embed, *both)
        return x[:, :length], x[:, length:]

    def velocity(self, image: Tensor, time_embed: Tensor) -> Tensor:
        """What comes after the layers, of the upper half of the image: [N, T, 4, c]."""
        upper = image.unflatten(1, (2, -1))[:, 0]
        return self.norm_out(upper, time_embed).unflatten(2, (self.config.patch_size**2, -1))
