"""Images of this world in the form that the vision encoder takes, many at once.

The runtime prepares one image with Pillow (`engines/inputs/preprocess.py`). `prepared` does exactly the same.
`seen` works on any device and does not round to bytes in between, so that training need not leave the device.
Tests hold the three together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...config import VisionConfig
from ...vision import VisionAttention, VisionEncoder, rotary_cos_sin, window_ids
from .layout import IMAGE_MEAN, IMAGE_STD

SEEN_PIXELS = 112  # an image of 64 is below the encoder's minimum and is enlarged to this size
ASKED_PIXELS = 56  # `ask` reduces the image to this size first (docs/star.md 3.2: it resizes twice)
MERGED_SIDE = 4  # merged patches per side


def seen(image: Tensor, *, sharp: Tensor) -> Tensor:
    """Images as the vision encoder takes them: image [N, 3, 64, 64] in [-1, 1] -> [N, 3, 112, 112] in [0, 1].

    sharp [N] bool: resized once as for `edit`, instead of twice as for `ask`.
    """
    asked = resized(resized(image, ASKED_PIXELS), SEEN_PIXELS)
    return (torch.where(sharp[:, None, None, None], resized(image, SEEN_PIXELS), asked) + 1) / 2


def prepared(images: Sequence[np.ndarray], *, sharp: bool) -> Tensor:
    """Like `seen`, but with Pillow: images uint8 [64, 64, 3] -> [N, 3, 112, 112] in [0, 1]."""
    from PIL import Image

    made = []
    for image in images:
        image = Image.fromarray(image)
        for side in (SEEN_PIXELS,) if sharp else (ASKED_PIXELS, SEEN_PIXELS):
            image = image.resize((side, side), Image.Resampling.BICUBIC)
        made.append(np.asarray(image))
    return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2).float() / 255


def resized(image: Tensor, side: int) -> Tensor:
    """Bicubic resizing as Pillow does it: along rows, then along columns, clipped to [-1, 1] after each.

    image [N, 3, R, R] in [-1, 1] -> [N, 3, side, side].
    """
    for size in ((image.shape[-2], side), (side, side)):
        image = F.interpolate(image, size=size, mode="bicubic", antialias=True).clamp(-1, 1)
    return image


def patches(image: Tensor, config: VisionConfig) -> Tensor:
    """image [N, 3, S, S] in [0, 1] -> pixel values [N, P, 3 * temporal * patch * patch], with merge x merge
    neighbours together."""
    mean, std = (torch.tensor(v, device=image.device)[:, None, None] for v in (IMAGE_MEAN, IMAGE_STD))
    patch, merge = config.patch_size, config.spatial_merge_size
    side = image.shape[-1] // patch // merge
    blocks = ((image - mean) / std).reshape(len(image), 3, side, merge, patch, side, merge, patch)
    blocks = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7)  # [N, gh, gw, merge, merge, 3, patch, patch]
    still = blocks.unsqueeze(-3).expand(*(-1,) * 6, config.temporal_patch_size, -1, -1)
    return still.reshape(len(image), (side * merge) ** 2, -1)


def embeds_of(encoder: VisionEncoder, image: Tensor) -> Tensor:
    """Run the vision encoder on many images, `seen` or `prepared`.

    image [N, 3, 112, 112] in [0, 1] -> [N, 16, H]. `VisionEncoder.forward` takes one image. This function
    runs its blocks with one row per image; a test holds the two equal.
    """
    config, side = encoder.config, SEEN_PIXELS // encoder.config.patch_size
    angles = rotary_cos_sin(config, grid_h=side, grid_w=side)
    cos, sin = (t.to(image.device)[None] for t in angles)  # [1, P, head_dim/2]
    windows = window_ids(config, grid_h=side, grid_w=side).to(image.device)
    mask = windows[:, None] == windows[None, :]  # [P, P]
    x = encoder.patch_embed(patches(image, config))  # [N, P, h]
    for index, block in enumerate(encoder.blocks):
        block_mask = None if index in config.full_attention_blocks else mask
        x = x + attended(block.attn, block.norm1(x), cos, sin, block_mask)
        x = x + block.mlp(block.norm2(x))
    return encoder.merger(x).unflatten(0, (len(image), -1))


def attended(attn: VisionAttention, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
    """`VisionAttention.forward` for many images: x [N, P, h] -> [N, P, h]."""
    query, key, value = (
        part.unflatten(-1, (-1, attn.head_dim)).transpose(1, 2) for part in attn.qkv(x).chunk(3, dim=-1)
    )
    # [N, heads, P, D]
    query, key = (attn.rotate(part.float(), cos, sin).to(value.dtype) for part in (query, key))
    # Attention is written out because its gradient is faster so; see `sequences.grouped_attention`.
    scores = query * attn.head_dim**-0.5 @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    output = scores.softmax(-1).to(value.dtype) @ value
    return attn.proj(output.transpose(1, 2).flatten(2))
