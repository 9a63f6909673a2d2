"""Stages `base`, `generate` and `edit`: the base on text and images, then, with the base frozen, the generating parts, then editing mixed in.

The frozen base is the one on file: stage `generate` starts by reading it back as it will be shipped, in float16, so the generating parts
are trained on exactly the base they will meet, and its answers cannot change.

Source: STAR.md 1.2 (the stack starts as a copy of the base's last layers) and 4 (task-progressive training).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...model import Star
from ..checkpoint.tokens import Rows
from ..checkpoint.vision import MERGED_SIDE, embeds_of, seen
from ..recipe import IMAGE_TOKENS, SEED, TOKENS_SIDE, Stage
from .batches import EDITS_PER_IMAGE, IGNORED, base_batch, edit_batch, generate_batch
from .cells import drawn, image_from_scenes
from .loop import Job, Losses, fused
from .sequences import behind_prompt, through
from .stage_eyes import OUTPUTS, new_head, read_losses
from .stage_vq import background_ids, with_one_background
from .wanted import MEANT_OUTPUTS, meant_loss, touched_loss, wanted_loss
from .wanted import OUTPUTS as WANTED_OUTPUTS

BASE_PARTS = ("token_embedding", "vision_encoder", "base_ar")  # text_head is token_embedding, tied
READ_LAYER = 1  # of the base, counted from 0: what patches show is read after it
ASKED = (
    "kinds",
    "begins",
    "background",
    "relation",
    "told",
    "classes",
    "offsets",
    "given",
    "meant",
    "touched",
    "given_classes",
    "given_offsets",
)  # of a batch, what heads are to tell
DRAWING_PARTS = ("stacked_ar", "image_head")
TRAINED_PARTS = ("pixel_adapter", *DRAWING_PARTS)
# Of what `token_losses` returns, how much it counts: what is large at first and not yet told would turn the stack from what it can do.
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
DRAWN_EVERY = 4  # of so many batches of stage `edit` one draws
LAYER_GRAPHS = 32  # with and without gradients, before and behind a prompt, of a few widths
POINTED, EMBEDDED = (
    0.1,
    8.0,
)  # how far a new head's latents lie from zero, in sizes of an entry; size of a new adapter's embeddings


def freeze(star: Star, *, trained: tuple[str, ...]) -> dict:
    """Let only the parameters of the named components move; these components."""
    star.requires_grad_(False)
    modules = {name: star.get_submodule(name) for name in trained}
    for module in modules.values():
        module.requires_grad_(True)
    return modules


def base_job(star: Star, rows: Rows, stage: Stage, *, compiled: bool = False) -> Job:
    """Stage `base`. A linear head, which is not kept, goes on reading what each patch shows, now from the decoder's hidden states after its
    first layers, and where the patch lies: that is found out far too slowly by answering alone, for the vision encoder's positions are
    relative."""
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
    """Cross entropy of the answers, and `read_losses` and cross entropy of the patches' rows and columns; the shares of answer tokens
    that the model would say, with an image and without, of shapes read right and of rows and columns."""
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
        read = (
            head(states[READ_LAYER][:count][patches]).float().unflatten(0, (count, -1))
        )  # [count, 16, outputs]
    shown, placed = (
        read_losses(read[..., :OUTPUTS], batch),
        read[..., OUTPUTS:].unflatten(-1, (2, MERGED_SIDE)),
    )
    cells = torch.arange(MERGED_SIDE**2, device=labels.device)
    places = torch.stack((cells // MERGED_SIDE, cells % MERGED_SIDE), dim=1).expand(
        count, -1, -1
    )  # [count, 16, 2]
    loss = (
        F.cross_entropy(logits, labels[said])
        + shown["loss"]
        + F.cross_entropy(placed.flatten(0, 2), places.flatten())
    )
    right = logits.argmax(-1) == labels[said]
    asked = said.nonzero()[:, 0] < count
    return {
        "loss": loss,
        "asked": right[asked].float().mean(),
        "worded": right[~asked].float().mean(),
        "shape": shown["shape"],
        "placed": (placed.argmax(-1) == places).float().mean(),
    }


def stack_from_base(star: Star) -> None:
    """The stack starts as the base's last layers and final norm (STAR.md 1.2)."""
    skipped = len(star.base_ar.layers) - len(star.stacked_ar.layers)
    for index, layer in enumerate(star.stacked_ar.layers):
        layer.load_state_dict(star.base_ar.layers[index + skipped].state_dict())
    star.stacked_ar.norm.load_state_dict(star.base_ar.norm.state_dict())


@torch.no_grad()
def start_from_codebook(star: Star, *, seed: int = SEED) -> None:
    """New adapter and image head that know from the first step on which entries of the codebook are alike.

    The head is the likelihood of each entry e around a latent that the stack points at, -|P h - e|^2 / T, which is linear in h. The
    adapter's embeddings are large beside what the base's layers add to them, which was not made for image tokens.
    """
    entries = star.codebook.weight  # [K, d]
    size = entries.square().mean().sqrt()  # of one number of an entry
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(
        torch.randn(star.image_head.in_features, entries.shape[1], generator=generator)
    )[0].to(entries)  # [H, d]
    star.image_head.weight.copy_(entries @ (POINTED * directions.T) / size)
    star.image_head.bias.copy_(-entries.square().sum(1) / (2 * size**2))
    made = star.pixel_adapter(entries)  # [K, H]
    star.pixel_adapter[-1].weight.mul_(EMBEDDED / (made - made.mean(0)).square().mean().sqrt())


def generate_job(star: Star, rows: Rows, stage: Stage, *, compiled: bool = False) -> Job:
    """Stage `generate`. The base must be the one on file already; the stack starts as a copy of it."""
    stack_from_base(star)
    start_from_codebook(star)
    batch_of = partial(generate_batch, rows=rows, batch=stage.batch, stage=stage.name)
    return image_job(star, stage, batch_of, trained=TRAINED_PARTS, compiled=compiled)


def edit_job(star: Star, rows: Rows, stage: Stage, *, compiled: bool = False) -> Job:
    """Stage `edit`: one batch of DRAWN_EVERY draws, the rest edit. The adapter stays as it is, so no gradient goes through the base."""
    stage.groups(EDITS_PER_IMAGE, "instructions on an image")
    batch_of = partial(mixed_batch, rows=rows, batch=stage.batch, stage=stage.name)
    return image_job(star, stage, batch_of, trained=DRAWING_PARTS, compiled=compiled)


def image_job(
    star: Star, stage: Stage, batch_of: Callable[[int], dict], *, trained: tuple[str, ...], compiled: bool
) -> Job:
    """Training of the generating parts. Linear heads, which are not kept, tell the row and column of an image's next token after the
    stack's first layer, for the same reason as in the base, after the second what is wanted, what an edit means, and what its own image
    has and shows at that place, and after the third what is left, what the next token shows and whether the edit touches what is there."""
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
        nn.init.zeros_(
            parts["heads"][name].weight
        )  # or what they first say of counts is wrong by hundreds, and learning starts with that
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
    """Each decoder layer by itself: on a GPU that is most of what compiling all of `token_losses` gives, for a tenth of its compiling."""
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
    """What `token_losses` says of a batch with its images drawn. `backgrounds`: `background_ids`. `known`: what was found of batches by
    number, where they come again: finding it is a third of a step's work."""
    edits = "before_things" in batch
    with torch.autocast(batch["input_ids"].device.type, torch.bfloat16):
        if known is None or number not in known:
            found = {"image_ids": painted_ids(star, backgrounds, batch).short()} | (
                given_tensors(star, batch, number) if edits else {}
            )
            if known is not None:
                known[number] = found
        else:
            found = known[number]
        asked, prompt = {name: batch[name] for name in ASKED if name in batch}, None
        if edits:
            given = found["given_ids"].long()
            asked["given_ids"] = given.repeat_interleave(EDITS_PER_IMAGE, 0)
            prompt = with_images(star, batch["prompt_ids"], given, found["vision"]), batch["prompt_positions"]
        losses = losses_of(
            star,
            heads,
            prompt,
            star.token_embedding(batch["input_ids"]),
            found["image_ids"].long(),
            batch["first"],
            batch["position_ids"],
            asked,
        )
    minimised = sum(weight * losses[name] for name, weight in WEIGHTS.items() if name in losses)
    return {"loss": minimised, "edited" if edits else "drawn": losses.pop("tokens").detach(), **losses}


def token_losses(
    star: Star,
    heads: nn.ModuleDict,
    prompt: tuple[Tensor, Tensor] | None,
    embeds: Tensor,
    image_ids: Tensor,
    first: Tensor,
    positions: Tensor,
    asked: dict[str, Tensor],
) -> Losses:
    """`tokens`: cross entropy of an image's tokens, and `right`, the share of them that is the most probable; `placed`: cross entropy of
    their rows and columns; `wanted` and `left`: what `wanted_loss` says; `shown`: what `read_losses` says of what the next token shows, and
    `foreseen`, the share of its shapes that is right; of edits what `edit_losses` says.

    prompt: embeddings [P, L, H] and positions [3, P, L] of what comes first, each of as many rows, or None; embeds [B, S, H] of the rest,
    image_ids [B, T], first [B]: the column from which the first token is predicted, positions [3, B, S], asked: `wanted_tensors`,
    `token_tensors` and what `edit_losses` needs.
    """
    columns = first[:, None] + torch.arange(IMAGE_TOKENS, device=embeds.device)  # [B, T]
    widths = columns.unsqueeze(-1).expand(-1, -1, embeds.shape[-1])
    embeds = embeds.scatter(1, widths[:, :-1] + 1, star.image_embedding(image_ids[:, :-1]).to(embeds.dtype))
    base_past = stack_past = None
    if prompt is not None:
        (*_, hidden), base_past = through(star.base_ar, *prompt)
        given, stack_past = through(star.stacked_ar, hidden, prompt[1])
        base_past, stack_past = (
            behind_prompt(past, len(embeds) // len(hidden)) for past in (base_past, stack_past)
        )
    (*_, hidden), _ = through(star.base_ar, embeds, positions, base_past)
    states, _ = through(star.stacked_ar, hidden, positions, stack_past)
    logits = star.image_head(states[-1].gather(1, widths)).float()  # [B, T, K]
    missed, known = wanted_loss(
        told(heads["wanted"], states[1], columns), told(heads["left"], states[2], columns), asked
    )
    shown = read_losses(told(heads["shown"], states[2], columns), asked)
    losses = {
        "tokens": F.cross_entropy(logits.flatten(0, 1), image_ids.flatten()),
        "right": (logits.argmax(-1) == image_ids).float().mean(),
        "placed": place_loss(told(heads["placed"], states[0], columns)),
        "wanted": missed,
        "left": known,
        "shown": shown["loss"],
        "foreseen": shown["shape"],
    }
    return (
        losses
        if prompt is None
        else losses
        | edit_losses(heads, star.codebook.weight, given[0], states, columns, losses["placed"], asked)
    )


def edit_losses(
    heads: nn.ModuleDict,
    entries: Tensor,
    given: Tensor,
    states: list[Tensor],
    columns: Tensor,
    placed: Tensor,
    asked: dict[str, Tensor],
) -> Losses:
    """`placed`: its mean with the cross entropy of the given image's rows and columns; `copied`: squared error of the entry that the given
    image has where the next token is, as a share of the entries' variance; `there`: what `read_losses` says of what that image shows
    there, and `found`, the share of its shapes that is right; `meant`: what `meant_loss` says; `touched` and `hit`: what `touched_loss` says.

    entries [K, d] of the codebook, given [P, L, H]: hidden states of what comes first, states [B, S, H] after each layer, columns [B, T] from
    which tokens are predicted, asked: what `edit_batch` tells and `given_ids` [B, T].
    """
    copied = (
        F.mse_loss(told(heads["copied"], states[1], columns), entries[asked["given_ids"]])
        / entries.var(0).mean()
    )
    there = read_losses(
        told(heads["there"], states[1], columns),
        {name: asked["given_" + name] for name in ("classes", "offsets")},
    )
    touched, hit = touched_loss(told(heads["touched"], states[2], columns)[..., 0], asked)
    return {
        "placed": 0.5 * (placed + place_loss(told(heads["placed"], given, asked["given"]))),
        "copied": copied,
        "there": there["loss"],
        "found": there["shape"],
        "meant": meant_loss(told(heads["meant"], states[1], columns), asked),
        "touched": touched,
        "hit": hit,
    }


def told(head: nn.Linear, hidden: Tensor, columns: Tensor) -> Tensor:
    """What a head tells from hidden states [B, S, H] at columns [B, T]."""
    at = columns.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
    return head(F.rms_norm(hidden.gather(1, at), hidden.shape[-1:])).float()


def place_loss(placed: Tensor) -> Tensor:
    """Cross entropy of the rows and columns of an image's tokens, [B, T, 2 * TOKENS_SIDE]."""
    index = torch.arange(IMAGE_TOKENS, device=placed.device)
    places = torch.stack((index // TOKENS_SIDE, index % TOKENS_SIDE), dim=1).expand(
        len(placed), -1, -1
    )  # [B, T, 2]
    return F.cross_entropy(placed.unflatten(-1, (2, TOKENS_SIDE)).flatten(0, 2), places.flatten())


@torch.no_grad()
def ids_of(star: Star, image: Tensor) -> Tensor:
    """VQ ids [B, T] of images [B, 3, S, S]. Latents in bfloat16, a third of the time of float32, which was half of a training step;
    the nearest entry in float32."""
    latents = star.vq_encoder.latents(image.contiguous(memory_format=torch.channels_last))
    with torch.autocast(image.device.type, enabled=False):
        return star.vq_encoder.distances(latents).argmin(-1)


def painted_ids(star: Star, backgrounds: Tensor, batch: dict) -> Tensor:
    """VQ ids [B, T] of what is to be painted: of images without noise, and of empty background the same everywhere. Nobody can foresee
    noise, which turns one id in four into a neighbour's, nor which of half a dozen alike ids an empty token has; and where those are
    the most probable ones, sampling leaves no room for a thing to begin."""
    return with_one_background(ids_of(star, image_from_scenes(batch, noise=None)), backgrounds, batch)


@torch.no_grad()
def given_tensors(star: Star, batch: dict, number: int) -> dict[str, Tensor]:
    """Of an edit's own images, with their noise: their VQ ids `given_ids` int16 [P, T], and what the vision encoder sees, `vision` [P, 16, H]."""
    image = drawn(
        {"things": batch["before_things"], "backgrounds": batch["before_backgrounds"]}, number, stream=2
    )
    sharp = torch.ones(len(image), dtype=torch.bool, device=image.device)
    return {
        "given_ids": ids_of(star, image).short(),
        "vision": embeds_of(star.vision_encoder, seen(image, sharp=sharp)),
    }


def with_images(star: Star, ids: Tensor, given: Tensor, vision: Tensor) -> Tensor:
    """Embeddings [P, S, H] of rows ids [P, S] of edits with their images in their places: the VQ ids `given` [P, T], and what the vision
    encoder sees, `vision` [P, 16, H]."""
    special, embeds = star.config.special, star.token_embedding(ids)
    embeds = embeds.masked_scatter(
        (ids == special.vision_pad).unsqueeze(-1), star.image_embedding(given).to(embeds.dtype)
    )
    return embeds.masked_scatter((ids == special.image_pad).unsqueeze(-1), vision.to(embeds.dtype))
