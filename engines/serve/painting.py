"""The fields of an image request that are for the diffusion decoder."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

from ..bundle.manifest import ModelSpec
from ..runtime.painting import RESOLUTIONS, STEPS_LIMIT, TRAINED, Painting, checked_painting
from .fields import Fields
from .refusals import Refused

DECODERS = ("vq", "diffusion")
SETTINGS = ("resolution", "steps", "text_guidance", "image_guidance", "vq_guidance")


def decoders_of(model: ModelSpec) -> tuple[str, ...]:
    """The decoders that a bundle has."""
    return DECODERS if model.diffusion else DECODERS[:1]


def painting_of(
    fields: Fields, model: ModelSpec, *, edit: bool, size: tuple[int, int] | None
) -> Painting | None:
    """How the images of a request are painted, every setting known; None where the VQ decoder draws them,
    as it does unless another one is asked for.

    `size` is the width and height that were asked for. Raises Refused, and UsageError for a setting out of
    range.
    """
    decoder = fields.choice("decoder", DECODERS)
    resolution = fields.whole("resolution", RESOLUTIONS.start, RESOLUTIONS[-1])
    asked = Painting(
        resolution or resolution_for(size),
        steps=fields.whole("steps", 1, STEPS_LIMIT),
        text_guidance=fields.number("text_guidance"),
        image_guidance=fields.number("image_guidance"),
        vq_guidance=fields.number("vq_guidance") if edit else None,
    )
    if decoder == "diffusion":
        if model.diffusion is None:
            raise _refused(
                "This bundle has no diffusion decoder",
                where="decoder: expected vq, got diffusion",
                fix="leave it out, or ask a server whose bundle was exported with --lumina",
                param="decoder",
            )
        brush = checked_painting(asked, model, num_images=1, edit=edit)
        return replace(
            asked,
            steps=brush.steps,
            text_guidance=brush.text,
            image_guidance=brush.image,
            vq_guidance=brush.vq if edit else None,
        )
    given = {**dataclasses.asdict(asked), "resolution": resolution}
    if names := [name for name in SETTINGS if given[name] is not None]:
        raise _refused(
            "This field is for the diffusion decoder",
            where=f"{names[0]}: expected decoder diffusion beside it, got vq",
            fix='add "decoder": "diffusion", or leave it out',
            param=names[0],
        )
    return None


def resolution_for(size: tuple[int, int] | None) -> int:
    """The smallest resolution that the release was trained for and that is no smaller than the square that is
    sent; the largest one where no size was asked for, or a larger one."""
    enough = [resolution for resolution in TRAINED if size and resolution >= min(size)]
    return min(enough, default=max(TRAINED))


def _refused(what: str, *, where: str, fix: str, param: str) -> Refused:
    return Refused(400, what, where=where, fix=fix, param=param, code="invalid_value")
