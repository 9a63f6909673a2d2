"""The scenes of a step as images, and which of their tokens show the same, or only background."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor

from ..recipe import SEED, TOKENS_SIDE
from ..world.draw import arrays_from_scenes, draw
from ..world.world import SIDE_PIXELS, random_scene

BARE = 16  # one in so many scenes is bare


def scenes_of(step: int, *, batch: int, seed: int = SEED) -> dict:
    """The scenes of a step as arrays for `draw`; one in BARE is bare, as after an edit that removes the only
    thing."""
    random = Random(f"{seed} vq {step}")
    scenes = [random_scene(random) for _ in range(batch)]
    scenes[BARE - 2 :: BARE] = [replace(scene, things=()) for scene in scenes[BARE - 2 :: BARE]]
    things, backgrounds = arrays_from_scenes(scenes)
    return {"things": torch.from_numpy(things), "backgrounds": torch.from_numpy(backgrounds)}


def drawn(batch: dict, step: int, *, stream: int = 0) -> Tensor:
    """Images of a batch with its noise, float32 [B, 3, 64, 64] in [-1, 1], on the batch's device."""
    device = batch["things"].device
    generator = torch.Generator(device).manual_seed(SEED * 1_000_003 + 7 * step + stream)
    noise = torch.randn(len(batch["things"]), 3, SIDE_PIXELS, SIDE_PIXELS, generator=generator, device=device)
    return image_from_scenes(batch, noise=noise)


def image_from_scenes(batch: dict, *, noise: Tensor | None) -> Tensor:
    """Images of a batch, float32 [B, 3, 64, 64] in [-1, 1], with noise [B, 3, 64, 64] or without."""
    return draw(batch["things"], batch["backgrounds"], noise=noise).float() / 127.5 - 1


def without(batch: dict, kept: Tensor) -> dict:
    """The scenes with only those of their things that are `kept` [B, 4]."""
    things = batch["things"]
    return batch | {"things": torch.cat([things[..., :1] * kept.unsqueeze(-1), things[..., 1:]], dim=-1)}


def with_fewer_things(batch: dict, step: int) -> dict:
    """The scenes with about half of their things."""
    things = batch["things"]
    generator = torch.Generator(things.device).manual_seed(SEED * 1_000_003 + 7 * step + 5)
    return without(batch, torch.rand(things.shape[:2], generator=generator, device=things.device) < 0.5)


def same_cells(batch: dict, other: dict) -> Tensor:
    """1.0 for tokens [B, h, w] whose pixels are the same in both batches, before noise."""
    differs = image_from_scenes(batch, noise=None) != image_from_scenes(other, noise=None)
    changed = differs.any(1, keepdim=True).float()
    return 1 - F.max_pool2d(changed, SIDE_PIXELS // TOKENS_SIDE).squeeze(1)


def empty_cells(batch: dict) -> Tensor:
    """1.0 for tokens [B, h, w] that show only background."""
    return same_cells(batch, batch | {"things": batch["things"][:, :0]})
