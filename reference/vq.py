"""STAR-VQ: image <-> image ids. A convolutional encoder and decoder share one codebook.

Source: docs/star.md 1.5; MM-MVR/STAR, star/models/pixel_encoder/vq_model.py.
"""

from __future__ import annotations

import math
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from .config import VQConfig
from .image_blocks import Downsample, GroupNorm, ResnetBlock, Upsample

NORM_GROUPS = 32
norm = partial(GroupNorm, groups=NORM_GROUPS)
resnet_block = partial(ResnetBlock, groups=NORM_GROUPS, shortcut="nin_shortcut")


class AttentionBlock(nn.Module):
    """Multi-head attention among all places of the map, with a residual: [N, c, h, w] -> [N, c, h, w]."""

    def __init__(self, channels: int, *, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        query, key, value = (
            project(h).flatten(2).unflatten(1, (self.num_heads, -1)).transpose(2, 3)  # [N, heads, hw, D]
            for project in (self.q, self.k, self.v)
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        return x + self.proj_out(attended.transpose(2, 3).reshape(x.shape))


class Level(nn.Module):
    """The blocks of one resolution: residual blocks, each followed by attention at the lowest one, then the
    resampling."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        blocks: int,
        heads: int,
        resample: tuple[str, nn.Module] | None,
    ):
        super().__init__()
        self.res = nn.ModuleList(
            resnet_block(in_channels if i == 0 else out_channels, out_channels) for i in range(blocks)
        )
        self.attn = nn.ModuleList(
            AttentionBlock(out_channels, num_heads=heads) for _ in range(blocks if heads else 0)
        )
        if resample is not None:
            self.add_module(*resample)

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[index](x)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                x = getattr(self, name)(x)
        return x


def middle(channels: int, num_heads: int) -> nn.Sequential:
    """The blocks at the lowest resolution, between the levels of an encoder or decoder and the latent."""
    return nn.Sequential(
        resnet_block(channels, channels),
        AttentionBlock(channels, num_heads=num_heads),
        resnet_block(channels, channels),
    )


class VQEncoder(nn.Module):
    """Image -> the id of the nearest codebook entry at each place, row by row."""

    def __init__(self, config: VQConfig, codebook: nn.Embedding):
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        self.conv_in = nn.Conv2d(3, config.ch, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        for level, (before, width) in enumerate(zip([config.ch, *widths], widths)):
            lowest = level == len(widths) - 1
            self.conv_blocks.append(
                Level(
                    before,
                    width,
                    blocks=config.res_blocks,
                    heads=config.num_heads if lowest else 0,
                    resample=None if lowest else ("downsample", Downsample(width)),
                )
            )
        self.mid = middle(widths[-1], config.num_heads)
        self.norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 3, padding=1)
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_dim, 1)
        self.codebook = codebook

    def latents(self, image: Tensor) -> Tensor:
        """image [N, 3, R, R] in [-1, 1] -> the values to be quantised, [N, codebook_dim, h, w]."""
        x = self.conv_in(image)
        for level in self.conv_blocks:
            x = level(x)
        x = self.conv_out(F.silu(self.norm_out(self.mid(x))))
        return self.quant_conv(x)

    def distances(self, latents: Tensor) -> Tensor:
        """latents [N, codebook_dim, h, w] -> [N, T, K] float32: |z - e|^2 to every entry e, less |z|^2, which
        all share."""
        z = latents.flatten(2).transpose(1, 2).float()  # [N, T, codebook_dim]
        entries = self.codebook.weight.float()  # [K, codebook_dim]
        return entries.square().sum(-1) - 2 * (z @ entries.T)

    def forward(self, image: Tensor) -> Tensor:
        """image [N, 3, R, R] in [-1, 1] -> image_ids [N, T] int64: the nearest entries. The lowest index wins
        a tie."""
        return self.distances(self.latents(image)).argmin(-1)


class VQDecoder(nn.Module):
    """Image ids -> image. `conv_blocks.0` is the lowest resolution."""

    def __init__(self, config: VQConfig, codebook: nn.Embedding):
        super().__init__()
        widths = [config.ch * m for m in reversed(config.ch_mult)]
        self.side = math.isqrt(config.image_tokens)
        self.codebook = codebook
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.z_channels, 1)
        self.conv_in = nn.Conv2d(config.z_channels, widths[0], 3, padding=1)
        self.mid = middle(widths[0], config.num_heads)
        self.conv_blocks = nn.ModuleList()
        for level, (before, width) in enumerate(zip([widths[0], *widths], widths)):
            last = level == len(widths) - 1
            self.conv_blocks.append(
                Level(
                    before,
                    width,
                    blocks=config.res_blocks + 1,
                    heads=0 if level else config.num_heads,
                    resample=None if last else ("upsample", Upsample(width)),
                )
            )
        self.norm_out = norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, image_ids: Tensor) -> Tensor:
        """image_ids [N, T] int64 -> image [N, 3, R, R], about [-1, 1] and not clipped."""
        z = self.codebook(image_ids).unflatten(1, (self.side, self.side))  # [N, h, w, codebook_dim]
        z = z.permute(0, 3, 1, 2)  # [N, codebook_dim, h, w]
        x = self.mid(self.conv_in(self.post_quant_conv(z)))
        for level in self.conv_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))
