"""Stage 2: the vision encoder alone, before any question is asked, as the release's was trained before its language model.

From each merged patch a linear head, which is not kept, reads what has its centre there: shape, colour, size and where in the
patch; and the background. Questions alone teach seeing far too slowly: 256,000 of them left shapes and places at chance.
"""
from __future__ import annotations

from functools import partial
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model import Star
from .batches import IGNORED, scene_tensors
from .loop import Job, Losses
from .recipe import SEED, Stage
from .stage_vq import drawn
from .vision import MERGED_SIDE, embeds_of, seen
from .world import COLORS, RADII, SHAPES, SIDE_PIXELS, Scene, random_scene

CELL_PIXELS = SIDE_PIXELS // MERGED_SIDE
CLASSES = (1 + len(SHAPES), len(COLORS), len(RADII), len(COLORS))  # nothing or a shape, its colour, its size, the background
SHARP_SHARE = 0.3  # of pictures, as `edit` prepares them


def eyes_batch(step: int, *, batch: int) -> dict:
    """Scenes, and of each merged patch its classes [B, 16, 4] (IGNORED where there is none) and `offsets` [B, 16, 2] of a centre
    from the patch's, -1 to 1 right and down."""
    random = Random(f"{SEED} eyes {step}")
    scenes = [random_scene(random) for _ in range(batch)]
    found = [cells_of(scene) for scene in scenes]
    return {**scene_tensors(scenes), "classes": torch.tensor([classes for classes, _ in found]),
            "offsets": torch.tensor([offsets for _, offsets in found]),
            "sharp": torch.rand(batch, generator=torch.Generator().manual_seed(step)) < SHARP_SHARE}


def cells_of(scene: Scene) -> tuple[list[list[int]], list[list[float]]]:
    """Classes and offsets of each merged patch, row by row."""
    background = list(COLORS).index(scene.background)
    classes = [[0, IGNORED, IGNORED, background] for _ in range(MERGED_SIDE**2)]
    offsets = [[0.0, 0.0] for _ in classes]
    for thing in scene.things:
        column, row = int(thing.x // CELL_PIXELS), int(thing.y // CELL_PIXELS)
        look, cell = thing.look, row * MERGED_SIDE + column
        classes[cell] = [1 + SHAPES.index(look.shape), list(COLORS).index(look.color), list(RADII).index(look.size), background]
        offsets[cell] = [2 * (thing.x / CELL_PIXELS - column) - 1, 2 * (thing.y / CELL_PIXELS - row) - 1]
    return classes, offsets


def eyes_job(star: Star, stage: Stage, device: torch.device) -> Job:
    star.requires_grad_(False)
    star.vision_encoder.requires_grad_(True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        head = nn.Linear(star.token_embedding.embedding_dim, sum(CLASSES) + 2).to(device)
    return Job(stage, {"vision_encoder": star.vision_encoder, "head": head}, partial(eyes_batch, batch=stage.batch),
               partial(eyes_losses, star, head))


def eyes_losses(star: Star, head: nn.Linear, batch: dict, step: int) -> Losses:
    """Cross entropy of the classes and squared error of the offsets; shares of what is there that is told right."""
    image = drawn(batch, step, stream=3)
    with torch.autocast(image.device.type, torch.bfloat16):
        read = head(embeds_of(star.vision_encoder, seen(image, sharp=batch["sharp"])))
    *scores, offsets = read.float().split((*CLASSES, 2), dim=-1)
    there = batch["classes"][..., 1] != IGNORED  # [B, 16]
    loss = F.mse_loss(offsets[there], batch["offsets"][there])
    losses = {}
    for name, logits, wanted in zip(("shape", "color", "size", "background"), scores, batch["classes"].unbind(-1), strict=True):
        loss = loss + F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED)
        losses[name] = (logits.argmax(-1) == wanted)[there].float().mean()
    return {"loss": loss, **losses, "offset": (offsets - batch["offsets"])[there].abs().mean()}
