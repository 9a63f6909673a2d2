"""Stage `eyes`: the vision encoder alone, before any question, like the release's before its language model.

From each merged patch a linear head, discarded after training, reads what has its centre there (shape,
colour, size and where in the patch) and the background. Questions alone teach seeing far too slowly: after
256,000 of them shapes and places were at chance. (Where in the image a patch lies cannot be learned here: the
encoder's positions are relative, and on an empty background all patches are alike.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...model import Star
from ..checkpoint.vision import embeds_of, seen
from ..recipe import SEED, Stage
from ..world.world import COLORS, RADII, SHAPES, random_scene
from .batches import IGNORED, cell_tensors, scene_tensors
from .cells import drawn
from .loop import Job, Losses, fused

# Nothing or a shape, its colour, its size, the background.
CLASSES = (1 + len(SHAPES), len(COLORS), len(RADII), len(COLORS))
OUTPUTS = sum(CLASSES) + 2
SHARP_SHARE = 0.3  # share of the images that are prepared as for `edit`


def eyes_batch(step: int, *, batch: int) -> dict:
    """Scenes, and their `cell_tensors`."""
    random = Random(f"{SEED} eyes {step}")
    scenes = [random_scene(random) for _ in range(batch)]
    return {
        **scene_tensors(scenes),
        **cell_tensors(scenes),
        "sharp": torch.rand(batch, generator=torch.Generator().manual_seed(step)) < SHARP_SHARE,
    }


def eyes_job(star: Star, stage: Stage, device: torch.device, *, compiled: bool = False) -> Job:
    """Stage `eyes`."""
    star.requires_grad_(False)
    star.vision_encoder.requires_grad_(True)
    head = new_head(star.token_embedding.embedding_dim, device)
    see = partial(fused(embeds_of, compiled=compiled), star.vision_encoder)
    return Job(
        stage,
        {"vision_encoder": star.vision_encoder, "head": head},
        partial(eyes_batch, batch=stage.batch),
        partial(eyes_losses, see, head),
    )


def eyes_losses(see: Callable[[Tensor], Tensor], head: nn.Linear, batch: dict, step: int) -> Losses:
    image = drawn(batch, step, stream=3)
    with torch.autocast(image.device.type, torch.bfloat16):
        read = head(see(seen(image, sharp=batch["sharp"])))
    return read_losses(read.float(), batch)


def new_head(width: int, device: torch.device, *, outputs: int = OUTPUTS) -> nn.Linear:
    """A linear head on hidden states [..., width]; equal seeds give equal heads."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return nn.Linear(width, outputs).to(device)


def read_losses(read: Tensor, batch: dict) -> Losses:
    """The losses of what a head read from n patches or tokens, [B, n, OUTPUTS].

    The loss is the cross entropy of the classes plus the squared error of the offsets. Also returns, of what
    is there, the shares told right.
    """
    *scores, offsets = read.split((*CLASSES, 2), dim=-1)
    there = (batch["classes"][..., 1] != IGNORED).to(read.dtype)  # [B, n]
    count, errors = there.sum().clamp(min=1), offsets - batch["offsets"]
    loss = (errors.square().mean(-1) * there).sum() / count
    losses, names = {}, ("shape", "color", "size", "background")
    for name, logits, wanted in zip(names, scores, batch["classes"].unbind(-1), strict=True):
        loss = loss + F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED)
        losses[name] = ((logits.argmax(-1) == wanted) * there).sum() / count
    return {"loss": loss, **losses, "offset": (errors.abs().mean(-1) * there).sum() / count}
