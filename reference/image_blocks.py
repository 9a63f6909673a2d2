"""Convolutional blocks that the VQ model and the diffusion decoder's VAE have in common."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6


class GroupNorm(nn.GroupNorm):
    """Group norm, computed in float32 whatever the dtype of x."""

    def __init__(self, channels: int, *, groups: int):
        super().__init__(groups, channels, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        normed = F.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps)
        return normed.to(x.dtype)


class ResnetBlock(nn.Module):
    """Norm, swish and 3x3 convolution, twice, with a shortcut: a 1x1 convolution where the number of channels
    changes. `shortcut` is how the checkpoint names that."""

    def __init__(self, before: int, after: int, *, groups: int, shortcut: str):
        super().__init__()
        self.norm1, self.conv1 = GroupNorm(before, groups=groups), nn.Conv2d(before, after, 3, padding=1)
        self.norm2, self.conv2 = GroupNorm(after, groups=groups), nn.Conv2d(after, after, 3, padding=1)
        self.shortcut_name = shortcut
        if before != after:
            self.add_module(shortcut, nn.Conv2d(before, after, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        shortcut = getattr(self, self.shortcut_name, None)
        return (shortcut(x) if shortcut else x) + h


class Downsample(nn.Module):
    """Halves the size: a convolution of stride two after padding one row and column of zeros at the bottom
    and right."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the size: nearest-neighbour interpolation, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
