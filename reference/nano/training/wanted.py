"""What a prompt wants, what of it is left to paint, and what an edit means, as targets for auxiliary heads.

The heads read the stack's hidden states and are discarded after training. A prompt decides a few nats of an
image's tokens and texture hundreds, so without such heads the stack paints fine images of anything long
before it reads. Counting needs to know what is left: a thing that has begun is no longer wanted.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..recipe import IMAGE_TOKENS, TOKENS_SIDE
from ..world.edits import KINDS as EDIT_KINDS
from ..world.edits import Edit
from ..world.prompts import Group, Request
from ..world.world import COLORS, MAX_THINGS, PLACES, RADII, RELATIONS, SHAPES, SIDE_PIXELS, Scene, Thing

FREE_COLOR, FREE_SIZE = len(COLORS), len(RADII)
# Kinds of things that a prompt can name: a shape, a colour or none, a size or none.
KINDS = len(SHAPES) * (len(COLORS) + 1) * (len(RADII) + 1)
BACKGROUNDS, RELATED = len(COLORS) + 1, len(RELATIONS) + 1  # the last of each: not stated
OUTPUTS = {"wanted": KINDS + BACKGROUNDS + RELATED, "left": KINDS}  # of the heads
# Classes of an edit: its kind; shape, colour and size of the thing that it changes or removes; those of the
# thing that it makes; its place. The last class of each but the kind means nothing, or not stated.
LOOK = (len(SHAPES) + 1, len(COLORS) + 1, len(RADII) + 1)
MEANT = (len(EDIT_KINDS), *LOOK, *LOOK, len(PLACES) + 1)
MEANT_OUTPUTS = sum(MEANT)
TOKEN_PIXELS = SIDE_PIXELS // TOKENS_SIDE


def request_of_scene(scene: Scene) -> Request:
    """All of a scene as a request, which is what an edit wants."""
    groups = tuple(Group(1, t.look.shape, t.look.color, t.look.size) for t in scene.things)
    return Request(groups, scene.background)


def wanted_tensors(requests: list[Request], scenes: list[Scene], told: list[bool]) -> dict[str, Tensor]:
    """What each row wants.

    `kinds` [B, 4] of its things (KINDS for none), `begins` [B, 4], the image token at which each of the
    scene's things begins, `background` and `relation` [B], and `told` [B], whether the row says so. The
    scene's things are in the request's order.
    """
    kinds = [[kind_of(group) for group in request.groups for _ in range(group.count)] for request in requests]
    begins = [[begin_of(thing) for thing in scene.things] for scene in scenes]
    assert all(len(k) == len(b) for k, b in zip(kinds, begins, strict=True))
    colors, relations = list(COLORS), list(RELATIONS)
    background = [colors.index(r.background) if r.background else len(colors) for r in requests]
    relation = [relations.index(r.relation) if r.relation else len(relations) for r in requests]
    return {
        "kinds": torch.tensor([k + [KINDS] * (MAX_THINGS - len(k)) for k in kinds]),
        "begins": torch.tensor([b + [0] * (MAX_THINGS - len(b)) for b in begins]),
        "background": torch.tensor(background),
        "relation": torch.tensor(relation),
        "told": torch.tensor(told),
    }


def kind_of(group: Group) -> int:
    color = FREE_COLOR if group.color is None else list(COLORS).index(group.color)
    size = FREE_SIZE if group.size is None else list(RADII).index(group.size)
    return (SHAPES.index(group.shape) * (len(COLORS) + 1) + color) * (len(RADII) + 1) + size


def begin_of(thing: Thing) -> int:
    """The first image token, row by row, that shows a thing or nearly so: the one at its top."""
    row = int(max(thing.y - thing.radius, 0) // TOKEN_PIXELS)
    return row * TOKENS_SIDE + int(max(thing.x - 0.5 * thing.radius, 0) // TOKEN_PIXELS)


def wanted_loss(wanted: Tensor, left: Tensor, asked: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The loss of what is wanted and left, and the share of tokens at which all counts left are right.

    The loss is the squared error of the counts plus the cross entropy of background and relation, averaged
    over the tokens of rows that are told. wanted [B, T, OUTPUTS["wanted"]]: counts of each kind, background
    and relation; left [B, T, OUTPUTS["left"]]: counts of what is yet to begin; asked: `wanted_tensors`.
    """
    steps = torch.arange(IMAGE_TOKENS, device=left.device)
    things = F.one_hot(asked["kinds"], KINDS + 1)[..., :KINDS].to(left.dtype)  # [B, 4, KINDS]
    ahead = (asked["begins"].unsqueeze(-1) >= steps).to(left.dtype)  # [B, 4, T]
    remaining = ahead.transpose(1, 2) @ things  # [B, T, KINDS]
    counts, background, relation = wanted.split((KINDS, BACKGROUNDS, RELATED), dim=-1)
    errors = (counts - things.sum(1, keepdim=True)).square().sum(-1)  # [B, T]
    errors = errors + (left - remaining).square().sum(-1)
    for logits, name in ((background, "background"), (relation, "relation")):
        classes = asked[name].unsqueeze(1).expand(-1, IMAGE_TOKENS)
        errors = errors + F.cross_entropy(logits.transpose(1, 2), classes, reduction="none")
    told = asked["told"].to(left.dtype).unsqueeze(1)
    right = ((left - remaining).abs() < 0.5).all(-1).to(left.dtype)
    total = (told.sum() * IMAGE_TOKENS).clamp(min=1)
    return (errors * told).sum() / total, (right * told).sum() / total


def meant_tensor(asked: list[Edit]) -> Tensor:
    """What edits mean, [B, 8], the classes of MEANT."""
    return torch.tensor([meant_by(edit) for edit in asked])


def meant_by(edit: Edit) -> list[int]:
    """The classes of MEANT for one edit."""
    old, new = (
        [None] * 3 if thing is None else [thing.look.shape, thing.look.color, thing.look.size]
        for thing in (edit.meant, edit.made)
    )
    if edit.kind == "add":
        new[2] = edit.size
    elif edit.kind == "background":
        new[1] = edit.after.background
    looks = [SHAPES, list(COLORS), list(RADII)]
    said = [
        found.index(value) if value is not None else len(found)
        for found, value in zip((*looks, *looks, PLACES), (*old, *new, edit.place), strict=True)
    ]
    return [EDIT_KINDS.index(edit.kind), *said]


def meant_loss(meant: Tensor, asked: dict[str, Tensor]) -> Tensor:
    """Cross entropies of what edits mean, averaged over the tokens of rows that are told.

    meant [B, T, MEANT_OUTPUTS]; asked: `meant` [B, 8] and `told` [B].
    """
    told = asked["told"].to(meant.dtype).unsqueeze(1)
    classes = asked["meant"].unsqueeze(1).expand(-1, IMAGE_TOKENS, -1)  # [B, T, 8]
    errors = sum(
        F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none")
        for logits, wanted in zip(meant.split(MEANT, dim=-1), classes.unbind(-1), strict=True)
    )  # [B, T]
    return (errors * told).sum() / (told.sum() * IMAGE_TOKENS).clamp(min=1)


def touched_loss(touched: Tensor, asked: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The loss of whether an edit changes or removes what is at a token, and the share of tokens told right.

    The binary cross entropy is averaged over tokens where anything is, in rows that are told. touched [B, T]:
    logits; asked: `touched` [B, T], `given_classes` [B, T, 4] and `told` [B].
    """
    counted = (asked["given_classes"][..., 0] > 0) * asked["told"].to(touched.dtype).unsqueeze(1)
    errors = F.binary_cross_entropy_with_logits(touched, asked["touched"], reduction="none")
    right = ((touched > 0) == (asked["touched"] > 0)).to(touched.dtype)
    count = counted.sum().clamp(min=1)
    return (errors * counted).sum() / count, (right * counted).sum() / count
