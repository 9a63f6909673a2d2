"""Qwen2.5-VL's vision encoder for one image, and what it derives from the image's patch grid.

Patches stay in the image processor's order: 2x2 blocks of neighbours, so that four consecutive rows become
one merged token. The release permutes patches into windows and back; here a windowed block masks by window
number, which computes the same.

Source: docs/star.md 1.1; transformers 4.51.0, models/qwen2_5_vl/modeling_qwen2_5_vl.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import VisionConfig
from .layers import GatedMLP, RMSNorm, rotate_half

ROPE_THETA = 10_000.0
RMS_NORM_EPS = 1e-6


def patch_coordinates(config: VisionConfig, *, grid_h: int, grid_w: int) -> tuple[Tensor, Tensor]:
    """Row and column of every patch in the image processor's order, two of [P] int64. The grid is given in
    patches."""
    merge = config.spatial_merge_size
    rows = torch.arange(grid_h).view(grid_h // merge, 1, merge, 1).expand(-1, grid_w // merge, -1, merge)
    columns = torch.arange(grid_w).view(1, grid_w // merge, 1, merge).expand(grid_h // merge, -1, merge, -1)
    return rows.flatten(), columns.flatten()


def rotary_angles(config: VisionConfig, *, grid_h: int, grid_w: int, rope_bf16: bool = True) -> Tensor:
    """Rotary angles of every patch, float32 [P, head_dim/2]: head_dim/4 from its row, then head_dim/4 from
    its column.

    `rope_bf16` rounds frequencies, positions and their products through bfloat16, as the release does
    (docs/star.md 1.1).
    """
    dims = config.hidden_size // config.num_heads // 2
    dtype = torch.bfloat16 if rope_bf16 else torch.float32
    frequencies = (1.0 / ROPE_THETA ** (torch.arange(0, dims, 2).float() / dims)).to(dtype)  # [head_dim/4]
    rows, columns = patch_coordinates(config, grid_h=grid_h, grid_w=grid_w)
    return torch.cat([axis[:, None].to(dtype) * frequencies for axis in (rows, columns)], dim=-1).float()


def rotary_cos_sin(
    config: VisionConfig, *, grid_h: int, grid_w: int, rope_bf16: bool = True
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of `rotary_angles`, two of float32 [P, head_dim/2].

    `rope_bf16` also rounds these through bfloat16: the release stores them in bfloat16 before it applies them
    in float32.
    """
    angles = rotary_angles(config, grid_h=grid_h, grid_w=grid_w, rope_bf16=rope_bf16)
    cos, sin = angles.cos(), angles.sin()
    return (cos.to(torch.bfloat16).float(), sin.to(torch.bfloat16).float()) if rope_bf16 else (cos, sin)


def window_ids(config: VisionConfig, *, grid_h: int, grid_w: int) -> Tensor:
    """The number of the attention window of every patch, [P] int64."""
    side = config.window_size // config.patch_size  # in patches
    rows, columns = patch_coordinates(config, grid_h=grid_h, grid_w=grid_w)
    return rows // side * -(-grid_w // side) + columns // side


class VisionAttention(nn.Module):
    """Attention among the patches that the mask lets see each other; the rotary embedding is in float32, as
    in the release."""

    def __init__(self, config: VisionConfig, *, rotate: Callable):
        super().__init__()
        self.head_dim, self.rotate = config.hidden_size // config.num_heads, rotate
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (-1, self.head_dim)).transpose(0, 1).unsqueeze(0)  # [1, heads, P, D]
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        query, key = (self.rotate(part.float(), cos, sin).to(x.dtype) for part in (query, key))
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.proj(output.squeeze(0).transpose(0, 1).flatten(1))


class VisionBlock(nn.Module):
    """A pre-norm residual block: attention, then a gated MLP with bias."""

    def __init__(self, config: VisionConfig, *, rotate: Callable):
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, RMS_NORM_EPS)
        self.attn = VisionAttention(config, rotate=rotate)
        self.norm2 = RMSNorm(config.hidden_size, RMS_NORM_EPS)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=True)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin, mask)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nn.Module):
    """A norm, then an MLP over each group of merge x merge consecutive patches: [P, h] -> [P/4, H]."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.merged_size = config.hidden_size * config.spatial_merge_size**2
        self.ln_q = RMSNorm(config.hidden_size, RMS_NORM_EPS)
        self.mlp = nn.Sequential(
            nn.Linear(self.merged_size, self.merged_size),
            nn.GELU(),
            nn.Linear(self.merged_size, config.out_hidden_size),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.ln_q(x).reshape(-1, self.merged_size))


class VisionEncoder(nn.Module):
    """Patches of one image -> embeddings for the decoder."""

    def __init__(self, config: VisionConfig, *, rotate: Callable = rotate_half):
        super().__init__()
        self.config = config
        patch_values = 3 * config.temporal_patch_size * config.patch_size**2
        # The release has a Conv3d here; on flattened patches it is a linear layer.
        self.patch_embed = nn.Linear(patch_values, config.hidden_size, bias=False)
        self.blocks = nn.ModuleList(VisionBlock(config, rotate=rotate) for _ in range(config.depth))
        self.merger = PatchMerger(config)

    def forward(
        self, pixel_values: Tensor, rotary_cos: Tensor, rotary_sin: Tensor, window_ids: Tensor
    ) -> Tensor:
        """pixel_values [P, 1176], rotary_cos and rotary_sin [P, head_dim/2] float32, window_ids [P] int64 ->
        [P/4, H]."""
        cos, sin = rotary_cos.unsqueeze(0), rotary_sin.unsqueeze(0)  # [1, P, head_dim/2]
        windows = window_ids[:, None] == window_ids[None, :]  # [P, P]
        x = self.patch_embed(pixel_values)
        for index, block in enumerate(self.blocks):
            x = block(x, cos, sin, None if index in self.config.full_attention_blocks else windows)
        return self.merger(x)
