"""Losses of an image's tokens, and of the heads that are trained beside them and discarded afterwards."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...model import Star
from ..recipe import IMAGE_TOKENS, TOKENS_SIDE
from .loop import Losses
from .sequences import behind_prompt, through
from .stage_eyes import read_losses
from .wanted import meant_loss, touched_loss, wanted_loss


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
    """The losses of an image's tokens, the losses of the heads, and shares that are only recorded.

    `tokens` is the cross entropy of the tokens and `right` the share of them that is the most probable;
    `placed` is the cross entropy of their rows and columns; `wanted` and `left` come from `wanted_loss`;
    `shown` is `read_losses` of what the next token shows and `foreseen` the share of its shapes told right;
    edits add `edit_losses`.

    prompt: embeddings [P, L, H] and positions [3, P, L] of what comes first, shared by equally many rows
    each, or None; embeds [B, S, H] of the rest; image_ids [B, T]; first [B], the column from which the first
    token is predicted; positions [3, B, S]; asked: `wanted_tensors`, `token_tensors` and what `edit_losses`
    needs.
    """
    columns = first[:, None] + torch.arange(IMAGE_TOKENS, device=embeds.device)  # [B, T]
    widths = columns.unsqueeze(-1).expand(-1, -1, embeds.shape[-1])
    embeds = embeds.scatter(1, widths[:, :-1] + 1, star.image_embedding(image_ids[:, :-1]).to(embeds.dtype))
    base_past = stack_past = None
    if prompt is not None:
        (*_, hidden), base_past = through(star.base_ar, *prompt)
        given, stack_past = through(star.stacked_ar, hidden, prompt[1])
        times = len(embeds) // len(hidden)
        base_past, stack_past = (behind_prompt(past, times) for past in (base_past, stack_past))
    (*_, hidden), _ = through(star.base_ar, embeds, positions, base_past)
    states, _ = through(star.stacked_ar, hidden, positions, stack_past)
    logits = star.image_head(states[-1].gather(1, widths)).float()  # [B, T, K]
    wanted, left = told(heads["wanted"], states[1], columns), told(heads["left"], states[2], columns)
    missed, known = wanted_loss(wanted, left, asked)
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
    if prompt is None:
        return losses
    entries, placed = star.codebook.weight, losses["placed"]
    return losses | edit_losses(heads, entries, given[0], states, columns, placed, asked)


def edit_losses(
    heads: nn.ModuleDict,
    entries: Tensor,
    given: Tensor,
    states: list[Tensor],
    columns: Tensor,
    placed: Tensor,
    asked: dict[str, Tensor],
) -> Losses:
    """The losses of the heads that only edits have, and shares that are only recorded.

    `placed` is its mean with the cross entropy of the given image's rows and columns; `copied` is the squared
    error of the entry that the given image has where the next token is, as a share of the entries' variance;
    `there` is `read_losses` of what that image shows there and `found` the share of its shapes told right;
    `meant` is `meant_loss`; `touched` and `hit` come from `touched_loss`.

    entries [K, d] of the codebook; given [P, L, H], hidden states of what comes first; states [B, S, H] after
    each layer; columns [B, T] from which tokens are predicted; asked: the tensors of `edit_batch` and
    `given_ids` [B, T].
    """
    copied = F.mse_loss(told(heads["copied"], states[1], columns), entries[asked["given_ids"]])
    shown = {name: asked["given_" + name] for name in ("classes", "offsets")}
    there = read_losses(told(heads["there"], states[1], columns), shown)
    touched, hit = touched_loss(told(heads["touched"], states[2], columns)[..., 0], asked)
    return {
        "placed": 0.5 * (placed + place_loss(told(heads["placed"], given, asked["given"]))),
        "copied": copied / entries.var(0).mean(),
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
    places = torch.stack((index // TOKENS_SIDE, index % TOKENS_SIDE), dim=1)
    places = places.expand(len(placed), -1, -1)  # [B, T, 2]
    return F.cross_entropy(placed.unflatten(-1, (2, TOKENS_SIDE)).flatten(0, 2), places.flatten())
