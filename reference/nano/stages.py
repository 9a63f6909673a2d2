"""Stages `base`, `generate` and `edit`: the base on text and pictures, then, with the base frozen, the generating parts, then editing mixed in.

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

from ..decoder import Decoder
from ..model import Star
from .batches import IGNORED, base_batch, edit_batch, generate_batch
from .cells import drawn, image_from_scenes
from .loop import Job, Losses, fused
from .recipe import IMAGE_TOKENS, SEED, TOKENS_SIDE, Stage
from .stage_eyes import OUTPUTS, new_head, read_losses
from .stage_vq import background_ids, with_one_background
from .tokens import Rows
from .vision import MERGED_SIDE, embeds_of, seen
from .wanted import OUTPUTS as WANTED_OUTPUTS
from .wanted import wanted_loss

BASE_PARTS = ("token_embedding", "vision_encoder", "base_ar")  # text_head is token_embedding, tied
READ_LAYER = 1  # of the base, counted from 0: what patches show is read after it
ASKED = ("kinds", "begins", "background", "relation", "told", "classes", "offsets", "given")  # of a batch, what heads are to tell
DRAWING_PARTS = ("stacked_ar", "image_head")
TRAINED_PARTS = ("pixel_adapter", *DRAWING_PARTS)
POINTED, EMBEDDED = 0.1, 8.0  # how far a new head's latents lie from zero, in sizes of an entry; size of a new adapter's embeddings


def causal_attention(query: Tensor, key: Tensor, value: Tensor, past_key: Tensor, past_value: Tensor, write_indices: Tensor,
                     mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`decoder.kv_cache_attention` on whole sequences from an empty cache, with gradients: every query sees itself and before.

    Written out, because on a CPU the gradient of torch's fused attention takes three times as long in bfloat16 at these lengths.
    """
    batch, heads, length, width = query.shape
    pairs, group = batch * key.shape[1], heads // key.shape[1]
    grouped = (query * width**-0.5).reshape(pairs, group * length, width)
    scores = grouped @ key.reshape(pairs, length, width).transpose(1, 2)
    future = torch.full((length, length), float("-inf"), dtype=scores.dtype, device=scores.device).triu(1)
    weights = (scores.view(pairs, group, length, length) + future).softmax(-1).to(value.dtype)
    found = weights.view(pairs, group * length, length) @ value.reshape(pairs, length, width)
    return found.view(batch, heads, length, width), past_key, past_value


def hidden_states(decoder: Decoder, embeds: Tensor, positions: Tensor) -> list[Tensor]:
    """A decoder with `causal_attention` on whole sequences: embeds [B, S, H], positions [3, B, S] -> [B, S, H] after each layer, and
    after the final norm."""
    cos, sin = (t.to(embeds.dtype) for t in decoder.rotary(positions))
    unused, states = embeds.new_empty(1, 1, 1, 1), [embeds]
    for layer in decoder.layers:
        states.append(layer(states[-1], cos, sin, (unused, unused), unused, unused)[0])
    return [*states[1:], decoder.norm(states[-1])]


def whole(decoder: Decoder, embeds: Tensor, positions: Tensor) -> Tensor:
    """The last of `hidden_states`."""
    return hidden_states(decoder, embeds, positions)[-1]


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
    losses = partial(base_losses, star, parts["head"], fused(embeds_of, compiled=compiled), fused(hidden_states, compiled=compiled))
    return Job(stage, parts, partial(base_batch, rows=rows, batch=stage.batch), losses)


def base_losses(star: Star, head: nn.Linear, see: Callable, decode: Callable, batch: dict, step: int) -> Losses:
    """Cross entropy of the answers, and `read_losses` and cross entropy of the patches' rows and columns; the shares of answer tokens
    that the model would say, with a picture and without, of shapes read right and of rows and columns."""
    labels, count = batch["labels"], len(batch["things"])
    with torch.autocast(labels.device.type, torch.bfloat16):
        embeds = star.token_embedding(batch["input_ids"]).clone()
        image = drawn(batch, step, stream=1)
        patches = batch["input_ids"][:count] == star.config.special.image_pad  # [count, S]
        pictures = see(star.vision_encoder, seen(image, sharp=batch["sharp"]))  # [count, 16, H]
        embeds[:count][patches] = pictures.flatten(0, 1).to(embeds.dtype)
        said = labels != IGNORED
        states = decode(star.base_ar, embeds, batch["position_ids"])
        logits = star.text_head(states[-1][said]).float()  # [n, V]
        read = head(states[READ_LAYER][:count][patches]).float().unflatten(0, (count, -1))  # [count, 16, outputs]
    shown, placed = read_losses(read[..., :OUTPUTS], batch), read[..., OUTPUTS:].unflatten(-1, (2, MERGED_SIDE))
    cells = torch.arange(MERGED_SIDE**2, device=labels.device)
    places = torch.stack((cells // MERGED_SIDE, cells % MERGED_SIDE), dim=1).expand(count, -1, -1)  # [count, 16, 2]
    loss = F.cross_entropy(logits, labels[said]) + shown["loss"] + F.cross_entropy(placed.flatten(0, 2), places.flatten())
    right = logits.argmax(-1) == labels[said]
    asked = said.nonzero()[:, 0] < count
    return {"loss": loss, "asked": right[asked].float().mean(), "worded": right[~asked].float().mean(), "shape": shown["shape"],
            "placed": (placed.argmax(-1) == places).float().mean()}


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
    directions = torch.linalg.qr(torch.randn(star.image_head.in_features, entries.shape[1], generator=generator))[0].to(entries)  # [H, d]
    star.image_head.weight.copy_(entries @ (POINTED * directions.T) / size)
    star.image_head.bias.copy_(-entries.square().sum(1) / (2 * size**2))
    made = star.pixel_adapter(entries)  # [K, H]
    star.pixel_adapter[-1].weight.mul_(EMBEDDED / (made - made.mean(0)).square().mean().sqrt())


def generate_job(star: Star, rows: Rows, stage: Stage, *, compiled: bool = False) -> Job:
    """Stage `generate`. The base must be the one on file already; the stack starts as a copy of it."""
    stack_from_base(star)
    start_from_codebook(star)
    batch_of = partial(generate_batch, rows=rows, batch=stage.batch, stage=stage.name)
    return picture_job(star, stage, batch_of, trained=TRAINED_PARTS, compiled=compiled)


def edit_job(star: Star, rows: Rows, stage: Stage, *, compiled: bool = False) -> Job:
    """Stage `edit`: every other batch edits, the rest draw. The adapter stays as it is, so no gradient goes through the base."""
    batch_of = partial(mixed_batch, rows=rows, batch=stage.batch, stage=stage.name)
    return picture_job(star, stage, batch_of, trained=DRAWING_PARTS, compiled=compiled)


def picture_job(star: Star, stage: Stage, batch_of: Callable[[int], dict], *, trained: tuple[str, ...], compiled: bool) -> Job:
    """Training of the generating parts. Linear heads, which are not kept, tell the row and column of a picture's next token after the
    stack's first layer, for the same reason as in the base, after the second what is wanted and what an edit's own picture has at that
    place, and after the third what is left and what the next token shows."""
    parts = freeze(star, trained=trained)
    width, device = star.image_head.in_features, star.image_head.weight.device
    outputs = {"placed": 2 * TOKENS_SIDE, **WANTED_OUTPUTS, "shown": OUTPUTS, "copied": star.codebook.embedding_dim}
    parts["heads"] = nn.ModuleDict({name: new_head(width, device, outputs=count) for name, count in outputs.items()})
    for name in WANTED_OUTPUTS:
        nn.init.zeros_(parts["heads"][name].weight)  # or what they first say of counts is wrong by hundreds, and learning starts with that
    losses = partial(picture_losses, star, parts["heads"], background_ids(star), fused(token_losses, compiled=compiled))
    return Job(stage, parts, batch_of, losses, by_muon=[p for p in star.stacked_ar.parameters() if p.ndim == 2])


def mixed_batch(step: int, *, rows: Rows, batch: int, stage: str) -> dict:
    if step % 2:
        return generate_batch(step, rows=rows, batch=batch, stage=stage)
    return edit_batch(step, rows=rows, batch=batch)


def picture_losses(star: Star, heads: nn.ModuleDict, backgrounds: Tensor, losses_of: Callable, batch: dict, step: int) -> Losses:
    """What `token_losses` says of a batch with its pictures drawn; `backgrounds`: `background_ids`."""
    with torch.autocast(batch["input_ids"].device.type, torch.bfloat16):
        image_ids = painted_ids(star, backgrounds, batch)
        asked = {name: batch[name] for name in ASKED if name in batch}
        embeds = star.token_embedding(batch["input_ids"])
        if edits := "before_things" in batch:
            embeds, asked["given_ids"] = with_pictures(star, embeds, batch, step)
        losses = losses_of(star, heads, embeds, image_ids, batch["first"], batch["position_ids"], asked)
    minimised = sum(losses[name] for name in ("tokens", "placed", "wanted", "shown", "copied") if name in losses)
    return {"loss": minimised, "edited" if edits else "drawn": losses.pop("tokens").detach(), **losses}


def token_losses(star: Star, heads: nn.ModuleDict, embeds: Tensor, image_ids: Tensor, first: Tensor, positions: Tensor,
                 asked: dict[str, Tensor]) -> Losses:
    """`tokens`: cross entropy of a picture's tokens, and `right`, the share of them that is the most probable; `placed`: cross entropy of
    their rows and columns, and of those of the given picture's; `wanted` and `left`: what `wanted_loss` says; `shown`: what
    `read_losses` says of what the next token shows, and `foreseen`, the share of its shapes that is right; `copied`, of edits: squared
    error of the entry that the given picture has where the next token is, as a share of the entries' variance.

    embeds [B, S, H] of the prompts, image_ids [B, T], first [B]: the column from which the first token is predicted, positions
    [3, B, S], asked: `wanted_tensors`, `token_tensors` and, for edits, `given` and the ids there, `given_ids`.
    """
    steps = torch.arange(IMAGE_TOKENS, device=embeds.device)
    columns = (first[:, None] + steps).unsqueeze(-1).expand(-1, -1, embeds.shape[-1])  # [B, T, H]
    embeds = embeds.scatter(1, columns[:, :-1] + 1, star.image_embedding(image_ids[:, :-1]).to(embeds.dtype))
    states = hidden_states(star.stacked_ar, whole(star.base_ar, embeds, positions), positions)
    logits = star.image_head(states[-1].gather(1, columns)).float()  # [B, T, K]

    def told(name: str, layer: int, at: Tensor) -> Tensor:
        return heads[name](F.rms_norm(states[layer].gather(1, at), at.shape[-1:])).float()

    placed = told("placed", 0, columns)
    places = torch.stack((steps // TOKENS_SIDE, steps % TOKENS_SIDE), dim=1).expand(len(embeds), -1, -1)  # [B, T, 2]
    if "given" in asked:
        placed = torch.cat([placed, told("placed", 0, asked["given"].unsqueeze(-1).expand_as(columns))], dim=1)
        places = torch.cat([places, places], dim=1)
    losses = {}
    if "given_ids" in asked:
        entries = star.codebook.weight
        losses["copied"] = F.mse_loss(told("copied", 1, columns), entries[asked["given_ids"]]) / entries.var(0).mean()
    missed, known = wanted_loss(told("wanted", 1, columns), told("left", 2, columns), asked)
    shown = read_losses(told("shown", 2, columns), asked)
    return {"tokens": F.cross_entropy(logits.flatten(0, 1), image_ids.flatten()),
            "right": (logits.argmax(-1) == image_ids).float().mean(),
            "placed": F.cross_entropy(placed.unflatten(-1, (2, TOKENS_SIDE)).flatten(0, 2), places.flatten()),
            "wanted": missed, "left": known, "shown": shown["loss"], "foreseen": shown["shape"], **losses}


@torch.no_grad()
def ids_of(star: Star, image: Tensor) -> Tensor:
    """VQ ids [B, T] of pictures [B, 3, S, S]. Latents in bfloat16, a third of the time of float32, which was half of a training step;
    the nearest entry in float32."""
    latents = star.vq_encoder.latents(image.contiguous(memory_format=torch.channels_last))
    with torch.autocast(image.device.type, enabled=False):
        return star.vq_encoder.distances(latents).argmin(-1)


def painted_ids(star: Star, backgrounds: Tensor, batch: dict) -> Tensor:
    """VQ ids [B, T] of what is to be painted: of pictures without noise, and of empty background the same everywhere. Nobody can foresee
    noise, which turns one id in four into a neighbour's, nor which of half a dozen alike ids an empty token has; and where those are
    the most probable ones, sampling leaves no room for a thing to begin."""
    return with_one_background(ids_of(star, image_from_scenes(batch, noise=None)), backgrounds, batch)


def with_pictures(star: Star, embeds: Tensor, batch: dict, step: int) -> tuple[Tensor, Tensor]:
    """An edit's embeddings [B, S, H] with its picture in its places, through the VQ and the vision encoder; that picture's ids [B, T]."""
    ids, special = batch["input_ids"], star.config.special
    before = drawn({"things": batch["before_things"], "backgrounds": batch["before_backgrounds"]}, step, stream=2)
    with torch.no_grad():
        tokens = ids_of(star, before)
        vision = embeds_of(star.vision_encoder, seen(before, sharp=torch.ones(len(ids), dtype=torch.bool, device=ids.device)))
    embeds = embeds.masked_scatter((ids == special.vision_pad).unsqueeze(-1), star.image_embedding(tokens).to(embeds.dtype))
    return embeds.masked_scatter((ids == special.image_pad).unsqueeze(-1), vision.to(embeds.dtype)), tokens
