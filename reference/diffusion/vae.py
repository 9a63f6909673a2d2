"""The VAE, of FLUX's kind: image <-> latents of an eighth of its side.

Source: docs/diffusion.md; diffusers 0.33, models/autoencoders/vae.py.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..image_blocks import Downsample, GroupNorm, ResnetBlock, Upsample
from .config import VAEConfig


def resnet_block(config: VAEConfig, before: int, after: int) -> ResnetBlock:
    return ResnetBlock(before, after, groups=config.norm_groups, shortcut="conv_shortcut")


class AttentionBlock(nn.Module):
    """One-head attention among all places of the map, with a residual: [N, c, h, w] -> [N, c, h, w].

    It is written out because TensorRT for RTX has no kernel for a head of 512 dimensions.
    """

    def __init__(self, config: VAEConfig, channels: int):
        super().__init__()
        self.group_norm = GroupNorm(channels, groups=config.norm_groups)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        places = self.group_norm(x).flatten(2).transpose(1, 2)  # [N, hw, c]
        query, key, value = self.to_q(places), self.to_k(places), self.to_v(places)
        scores = (query @ key.transpose(1, 2)).float() * query.shape[-1] ** -0.5  # [N, hw, hw]
        attended = scores.softmax(-1).to(x.dtype) @ value
        return x + self.to_out[0](attended).transpose(1, 2).reshape(x.shape)


class MiddleBlock(nn.Module):
    """The blocks at the lowest resolution."""

    def __init__(self, config: VAEConfig, channels: int):
        super().__init__()
        self.resnets = nn.ModuleList(resnet_block(config, channels, channels) for _ in range(2))
        self.attentions = nn.ModuleList([AttentionBlock(config, channels)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Level(nn.Module):
    """The blocks of one resolution, then the resampling, which the last level lacks."""

    def __init__(self, config: VAEConfig, before: int, after: int, *, blocks: int, last: bool, down: bool):
        super().__init__()
        self.resnets = nn.ModuleList(
            resnet_block(config, after if i else before, after) for i in range(blocks)
        )
        if not last and down:
            self.downsamplers = nn.ModuleList([Downsample(after)])
        elif not last:
            self.upsamplers = nn.ModuleList([Upsample(after)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resnets:
            x = block(x)
        for name in ("downsamplers", "upsamplers"):
            if hasattr(self, name):
                x = getattr(self, name)[0](x)
        return x


class VAEEncoder(nn.Module):
    """Image -> mean and log-variance of its latent."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = config.channels
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(
                config,
                before,
                after,
                blocks=config.blocks_per_level,
                last=level == len(widths) - 1,
                down=True,
            )
            for level, (before, after) in enumerate(zip([widths[0], *widths], widths))
        )
        self.mid_block = MiddleBlock(config, widths[-1])
        self.conv_norm_out = GroupNorm(widths[-1], groups=config.norm_groups)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """image [N, 3, 8q, 8q] in [-1, 1] -> moments [N, 2c, q, q]: the mean, then the log-variance."""
        x = self.conv_in(image)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class VAEDecoder(nn.Module):
    """Latent -> image. It takes the latents that the transformer works on, and undoes their scale."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config, widths = config, config.channels[::-1]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MiddleBlock(config, widths[0])
        self.up_blocks = nn.ModuleList(
            Level(
                config,
                before,
                after,
                blocks=config.blocks_per_level + 1,
                last=level == len(widths) - 1,
                down=False,
            )
            for level, (before, after) in enumerate(zip([widths[0], *widths], widths))
        )
        self.conv_norm_out = GroupNorm(widths[-1], groups=config.norm_groups)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """latents [N, c, q, q] -> image [N, 3, 8q, 8q], about [-1, 1] and not clipped."""
        unscaled = latents.float() / self.config.scale + self.config.shift
        x = self.mid_block(self.conv_in(unscaled.to(self.conv_in.weight.dtype)))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))
