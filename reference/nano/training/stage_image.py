"""Stages `generate` and `edit`: with the base frozen, the generating parts learn to draw, then also to edit.

The frozen base is the one on file: training reads it in float16, as it is shipped, so the generating parts
are trained on exactly the base that they will meet, and its answers cannot change.

Source: docs/star.md 1.2 (the stack starts as a copy of the base's last layers) and 4 (task-progressive
training).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ...model import Star
from ..checkpoint.tokens import Rows
from ..checkpoint.vision import embeds_of, seen
from ..recipe import SEED, TOKENS_SIDE, Stage
from .batches import EDITS_PER_IMAGE, edit_batch, generate_batch
from .cells import drawn, image_from_scenes
from .loop import Job, Losses, freeze, fused
from .stage_eyes import OUTPUTS, new_head
from .stage_vq import background_ids, with_one_background
from .token_losses import token_losses
from .wanted import MEANT_OUTPUTS
from .wanted import OUTPUTS as WANTED_OUTPUTS

ASKED = (  # the tensors of a batch that the heads must tell
    *("kinds", "begins", "background", "relation", "told", "classes", "offsets"),
    *("given", "meant", "touched", "given_classes", "given_offsets"),
)
DRAWING_PARTS = ("stacked_ar", "image_head")
TRAINED_PARTS = ("pixel_adapter", *DRAWING_PARTS)
# Weights of the values that `token_losses` returns. Losses that are large until a new head has learned would
# turn the stack away from what it can do already, so they get less.
WEIGHTS = {
    "tokens": 1.0,
    "placed": 1.0,
    "wanted": 1.0,
    "shown": 1.0,
    "copied": 1.0,
    "there": 0.3,
    "meant": 0.1,
    "touched": 1.0,
}
DRAWN_EVERY = 4  # one in so many batches of stage `edit` draws
LAYER_GRAPHS = 32  # compiled per layer: with and without gradients, of a prompt and after it, in a few widths
POINTED = 0.1  # distance from zero of the latents that a new head points at, in sizes of an entry
EMBEDDED = 8.0  # size of a new adapter's embeddings


def stack_from_base(star: Star) -> None:
    """Start the stack as the base's last layers and final norm (docs/star.md 1.2)."""
    skipped = len(star.base_ar.layers) - len(star.stacked_ar.layers)
    for index, layer in enumerate(star.stacked_ar.layers):
        layer.load_state_dict(star.base_ar.layers[index + skipped].state_dict())
    star.stacked_ar.norm.load_state_dict(star.base_ar.norm.state_dict())


@torch.no_grad()
def start_from_codebook(star: Star, *, seed: int = SEED) -> None:
    """Start adapter and image head so that they know at once which entries of the codebook are alike.

    The head is the likelihood of each entry e around a latent that the stack points at, -|P h - e|^2 / T,
    which is linear in h. The adapter's embeddings are large next to what the base's layers add to them,
    because those layers were not made for image tokens.
    """
    entries = star.codebook.weight  # [K, d]
    size = entries.square().mean().sqrt()  # of one number of an entry
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(star.image_head.in_features, entries.shape[1], generator=generator)
    directions = torch.linalg.qr(noise)[0].to(entries)  # [H, d]
    star.image_head.weight.copy_(entries @ (POINTED * directions.T) / size)
    star.image_head.bias.copy_(-entries.square().sum(1) / (2 * size**2))
    made = star.pixel_adapter(entries)  # [K, H]
    star.pixel_adapter[-1].weight.mul_(EMBEDDED / (made - made.mean(0)).square().mean().sqrt())


def generate_job(star: Star, rows: Rows, stage: Stage, *, compiled: bool = False) -> Job:
    """Stage `generate`. The base must be the final one already; the stack starts as a copy of it."""
    stack_from_base(star)
    start_from_codebook(star)
    batch_of = partial(generate_batch, rows=rows, batch=stage.batch, stage=stage.name)
    return image_job(star, stage, batch_of, trained=TRAINED_PARTS, compiled=compiled)


def edit_job(star: Star, rows: Rows, stage: Stage, *, compiled: bool = False) -> Job:
    """Stage `edit`: one batch in DRAWN_EVERY draws, the others edit.

    The adapter stays as it is, so no gradient passes through the base.
    """
    stage.groups(EDITS_PER_IMAGE, "instructions on an image")
    batch_of = partial(mixed_batch, rows=rows, batch=stage.batch, stage=stage.name)
    return image_job(star, stage, batch_of, trained=DRAWING_PARTS, compiled=compiled)


def image_job(
    star: Star, stage: Stage, batch_of: Callable[[int], dict], *, trained: tuple[str, ...], compiled: bool
) -> Job:
    """Training of the generating parts.

    Linear heads, discarded after training, read the stack's hidden states. After the first layer they tell
    the row and column of an image's next token, for the same reason as in the base; after the second what is
    wanted, what an edit means, and what its given image has and shows at that place; after the third what is
    left, what the next token shows, and whether the edit touches what is there.
    """
    parts = freeze(star, trained=trained)
    width, device = star.image_head.in_features, star.image_head.weight.device
    outputs = {
        "placed": 2 * TOKENS_SIDE,
        **WANTED_OUTPUTS,
        "shown": OUTPUTS,
        "copied": star.codebook.embedding_dim,
        "meant": MEANT_OUTPUTS,
        "there": OUTPUTS,
        "touched": 1,
    }
    parts["heads"] = nn.ModuleDict(
        {name: new_head(width, device, outputs=count) for name, count in outputs.items()}
    )
    for name in WANTED_OUTPUTS:
        # With random weights the first counts would be wrong by hundreds, and the stack would learn from
        # that.
        nn.init.zeros_(parts["heads"][name].weight)
    whole = compiled and device.type == "cpu"
    if compiled and not whole:
        compile_layers(star)
    losses = partial(
        image_losses,
        star,
        parts["heads"],
        background_ids(star),
        fused(token_losses, compiled=whole),
        {} if stage.distinct else None,
    )
    return Job(
        stage,
        parts,
        batch_of,
        losses,
        by_muon=[p for p in star.stacked_ar.parameters() if p.ndim == 2],
        waiting=[p for name in trained for p in parts[name].parameters()],
    )


def compile_layers(star: Star) -> None:
    """Compile each decoder layer by itself.

    On a GPU this gains most of what compiling all of `token_losses` does, for a tenth of the compilation
    time.
    """
    torch._dynamo.config.recompile_limit = LAYER_GRAPHS
    for layer in (*star.base_ar.layers, *star.stacked_ar.layers):
        layer.compile(dynamic=False)


def mixed_batch(step: int, *, rows: Rows, batch: int, stage: str) -> dict:
    if step % DRAWN_EVERY == DRAWN_EVERY - 1:
        return generate_batch(step, rows=rows, batch=batch, stage=stage)
    return edit_batch(step, rows=rows, batch=batch)


def image_losses(
    star: Star,
    heads: nn.ModuleDict,
    backgrounds: Tensor,
    losses_of: Callable,
    known: dict | None,
    batch: dict,
    number: int,
) -> Losses:
    """`token_losses` of a batch whose images are drawn first.

    `backgrounds` are `background_ids`. `known` holds the tensors found for batches that come again, by
    number: finding them takes a third of a step.
    """
    edits = "before_things" in batch
    with torch.autocast(batch["input_ids"].device.type, torch.bfloat16):
        if known is None:
            found = found_tensors(star, backgrounds, batch, number)
        elif (found := known.get(number)) is None:
            found = known[number] = found_tensors(star, backgrounds, batch, number)
        asked, prompt = {name: batch[name] for name in ASKED if name in batch}, None
        if edits:
            given = found["given_ids"].long()
            asked["given_ids"] = given.repeat_interleave(EDITS_PER_IMAGE, 0)
            prompt = with_images(star, batch["prompt_ids"], given, found["vision"]), batch["prompt_positions"]
        embeds, image_ids = star.token_embedding(batch["input_ids"]), found["image_ids"].long()
        first, positions = batch["first"], batch["position_ids"]
        losses = losses_of(star, heads, prompt, embeds, image_ids, first, positions, asked)
    minimised = sum(weight * losses[name] for name, weight in WEIGHTS.items() if name in losses)
    return {"loss": minimised, "edited" if edits else "drawn": losses.pop("tokens").detach(), **losses}


def found_tensors(star: Star, backgrounds: Tensor, batch: dict, number: int) -> dict[str, Tensor]:
    """The `image_ids` int16 [B, T] to be painted and, for edits, `given_tensors`."""
    found = {"image_ids": painted_ids(star, backgrounds, batch).short()}
    return found | given_tensors(star, batch, number) if "before_things" in batch else found


def painted_ids(star: Star, backgrounds: Tensor, batch: dict) -> Tensor:
    """VQ ids [B, T] of the images to be painted: without noise, and with one id for all empty background.

    Noise, which turns one id in four into a neighbour's, cannot be foreseen, nor can which of half a dozen
    similar ids an empty token has. Where those are the most probable ones, sampling leaves no room for a
    thing to begin.
    """
    return with_one_background(ids_of(star, image_from_scenes(batch, noise=None)), backgrounds, batch)


@torch.no_grad()
def given_tensors(star: Star, batch: dict, number: int) -> dict[str, Tensor]:
    """VQ ids `given_ids` int16 [P, T] of the images that edits are given, with noise, and their vision
    embeddings `vision` [P, 16, H]."""
    before = {"things": batch["before_things"], "backgrounds": batch["before_backgrounds"]}
    image = drawn(before, number, stream=2)
    sharp = torch.ones(len(image), dtype=torch.bool, device=image.device)
    return {
        "given_ids": ids_of(star, image).short(),
        "vision": embeds_of(star.vision_encoder, seen(image, sharp=sharp)),
    }


@torch.no_grad()
def ids_of(star: Star, image: Tensor) -> Tensor:
    """VQ ids [B, T] of images [B, 3, S, S].

    The latents are computed in bfloat16, which takes a third of the time of float32 (half of a training
    step); the nearest entry is found in float32.
    """
    latents = star.vq_encoder.latents(image.contiguous(memory_format=torch.channels_last))
    with torch.autocast(image.device.type, enabled=False):
        return star.vq_encoder.distances(latents).argmin(-1)


def with_images(star: Star, ids: Tensor, given: Tensor, vision: Tensor) -> Tensor:
    """Embeddings [P, S, H] of edit rows ids [P, S] with their images inserted: VQ ids `given` [P, T] and
    `vision` [P, 16, H]."""
    special, embeds = star.config.special, star.token_embedding(ids)
    tokens = star.image_embedding(given).to(embeds.dtype)
    embeds = embeds.masked_scatter((ids == special.vision_pad).unsqueeze(-1), tokens)
    return embeds.masked_scatter((ids == special.image_pad).unsqueeze(-1), vision.to(embeds.dtype))
