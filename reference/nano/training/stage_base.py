"""Stage `base`: the base model learns text and images, and is frozen afterwards."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from ...model import Star
from ..checkpoint.tokens import Rows
from ..checkpoint.vision import MERGED_SIDE, embeds_of, seen
from ..recipe import Stage
from .batches import IGNORED, base_batch
from .cells import drawn
from .loop import Job, Losses, freeze, fused
from .sequences import through
from .stage_eyes import OUTPUTS, new_head, read_losses

BASE_PARTS = ("token_embedding", "vision_encoder", "base_ar")  # text_head is tied to token_embedding
READ_LAYER = 1  # the base's layer, counted from 0, after which the head reads what patches show


def base_job(star: Star, rows: Rows, stage: Stage, *, compiled: bool = False) -> Job:
    """Stage `base`.

    A linear head, discarded after training, keeps reading what each patch shows, now from the hidden states
    after the decoder's first layers, and where the patch lies. Answering alone would teach this far too
    slowly, because the vision encoder's positions are relative.
    """
    parts = freeze(star, trained=BASE_PARTS)
    weight = star.token_embedding.weight
    parts["head"] = new_head(weight.shape[1], weight.device, outputs=OUTPUTS + 2 * MERGED_SIDE)
    losses = partial(
        base_losses,
        star,
        parts["head"],
        fused(embeds_of, compiled=compiled),
        fused(through, compiled=compiled),
    )
    return Job(stage, parts, partial(base_batch, rows=rows, batch=stage.batch), losses)


def base_losses(
    star: Star, head: nn.Linear, see: Callable, decode: Callable, batch: dict, step: int
) -> Losses:
    """Cross entropy of the answers, `read_losses`, and cross entropy of the patches' rows and columns.

    Also returns the shares of answer tokens that the model would say, with an image (`asked`) and without
    (`worded`), of shapes read right (`shape`), and of rows and columns told right (`placed`).
    """
    labels, count = batch["labels"], len(batch["things"])
    with torch.autocast(labels.device.type, torch.bfloat16):
        embeds = star.token_embedding(batch["input_ids"]).clone()
        image = drawn(batch, step, stream=1)
        patches = batch["input_ids"][:count] == star.config.special.image_pad  # [count, S]
        images = see(star.vision_encoder, seen(image, sharp=batch["sharp"]))  # [count, 16, H]
        embeds[:count][patches] = images.flatten(0, 1).to(embeds.dtype)
        said = labels != IGNORED
        states, _ = decode(star.base_ar, embeds, batch["position_ids"])
        logits = star.text_head(states[-1][said]).float()  # [n, V]
        read = head(states[READ_LAYER][:count][patches]).float()
    read = read.unflatten(0, (count, -1))  # [count, 16, outputs]
    shown = read_losses(read[..., :OUTPUTS], batch)
    placed = read[..., OUTPUTS:].unflatten(-1, (2, MERGED_SIDE))
    cells = torch.arange(MERGED_SIDE**2, device=labels.device)
    places = torch.stack((cells // MERGED_SIDE, cells % MERGED_SIDE), dim=1)
    places = places.expand(count, -1, -1)  # [count, 16, 2]
    place_loss = F.cross_entropy(placed.flatten(0, 2), places.flatten())
    loss = F.cross_entropy(logits, labels[said]) + shown["loss"] + place_loss
    right = logits.argmax(-1) == labels[said]
    asked = said.nonzero()[:, 0] < count
    return {
        "loss": loss,
        "asked": right[asked].float().mean(),
        "worded": right[~asked].float().mean(),
        "shape": shown["shape"],
        "placed": (placed.argmax(-1) == places).float().mean(),
    }
