"""The settings of the diffusion decoder: their ranges, and what they are where none was given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ..bundle.manifest import ModelSpec
from ..errors import InputError, UsageError
from ..inputs.latents import FACTOR, PATCH
from ..ranges import between, is_whole

TRAINED = (512, 1024)  # the resolutions that the release was trained for
RESOLUTIONS = range(64, 1024 + 1, FACTOR * PATCH)
STEPS_LIMIT = 1000
GUIDANCE_LIMIT = 1e3
LATENTS = ("fp32", "bf16")
Preview = Callable[[int, Callable[[], np.ndarray]], None]


@dataclass(frozen=True)
class Painting:
    """How images are painted. None stands for the release's defaults (docs/diffusion.md).

    `resolution` is in pixels. `noise` float32 [N, c, q, q], q an eighth of the resolution, replaces the noise
    that the seed gives, and in an edit `source_noise` [1, c, q, q] that of the source. `latents` is the type
    that they are held in between steps; the release's is bf16. `preview` is called after each step but the
    last with its number, from 1 on, and a function that decodes the images to which it leads, uint8 [N, R,
    R, 3].
    """

    resolution: int = 1024
    steps: int | None = None
    text_guidance: float | None = None
    image_guidance: float | None = None
    vq_guidance: float | None = None
    noise: np.ndarray | None = None
    source_noise: np.ndarray | None = None
    latents: str = "fp32"
    preview: Preview | None = None


GENERATE = Painting(steps=40, text_guidance=4.5, image_guidance=1.05, vq_guidance=0.0)
EDIT = Painting(steps=50, text_guidance=3.0, image_guidance=1.8, vq_guidance=1.0)


@dataclass(frozen=True)
class Brush:
    """The settings of a painting, all known and checked; `side` is that of a latent."""

    side: int
    steps: int
    text: float
    image: float
    vq: float
    latents_bf16: bool
    noise: np.ndarray | None
    source_noise: np.ndarray | None


def checked_painting(painting: Painting, model: ModelSpec, *, num_images: int, edit: bool) -> Brush:
    """Check the settings, and fill in the defaults of the task.

    Raises UsageError for a setting out of range, and InputError for a bundle without a diffusion decoder and
    for noise of another shape or with numbers that are not finite.
    """
    if model.diffusion is None:
        raise InputError(
            "This bundle has no diffusion decoder",
            where="decoder: expected a bundle with the component dit, got one without",
            fix="draw with --decoder vq, or export a checkpoint that has lumina-image2 (export --lumina)",
        )
    if not is_whole(painting.resolution) or painting.resolution not in RESOLUTIONS:
        raise UsageError(
            "resolution is out of range",
            where=f"resolution: expected a multiple of {RESOLUTIONS.step} from {RESOLUTIONS.start} to "
            f"{RESOLUTIONS[-1]}, got {painting.resolution}",
            fix=f"use {' or '.join(map(str, TRAINED))}, which the release was trained for",
        )
    if painting.latents not in LATENTS:
        raise UsageError(
            "No such type of latents",
            where=f"latents: expected {' or '.join(LATENTS)}, got {painting.latents!r}",
            fix="omit it to use fp32",
        )
    if not edit and painting.vq_guidance is not None:
        raise UsageError(
            "vq_guidance is for edits",
            where=f"vq_guidance: expected none, got {painting.vq_guidance}",
            fix="leave it out: image_guidance weighs the image tokens of a new image",
        )
    defaults = EDIT if edit else GENERATE
    names = ("steps", "text_guidance", "image_guidance", "vq_guidance")
    given = {name: value for name in names if (value := getattr(painting, name)) is not None}
    filled = replace(defaults, **given)
    side = painting.resolution // FACTOR
    shape = (model.diffusion.latent_channels, side, side)
    return Brush(
        side,
        between("steps", filled.steps if filled.steps is not None else 0, STEPS_LIMIT),
        text=_weight("text_guidance", filled.text_guidance),
        image=_weight("image_guidance", filled.image_guidance),
        vq=_weight("vq_guidance", filled.vq_guidance),
        latents_bf16=painting.latents == "bf16",
        noise=_noise("noise", painting.noise, (num_images, *shape)),
        source_noise=_noise("source_noise", painting.source_noise, (1, *shape)) if edit else None,
    )


def _weight(name: str, value: float | None) -> float:
    if value is None or not abs(value) <= GUIDANCE_LIMIT:
        raise UsageError(
            f"{name} is out of range",
            where=f"{name}: expected a number from {-GUIDANCE_LIMIT:g} to {GUIDANCE_LIMIT:g}, got {value}",
            fix="omit it to use the default",
        )
    return float(value)


def _noise(name: str, array: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray | None:
    if array is None:
        return None
    floats = array.dtype.kind == "f"
    with np.errstate(over="ignore"):
        noise = array.astype(np.float32) if floats else array
    finite = not floats or bool(np.isfinite(noise).all())
    if not floats or not finite or array.shape != shape:
        more = "" if finite else " with NaN or Inf in float32"
        raise InputError(
            "This noise does not fit the painting",
            where=f"{name}: expected finite floats{list(shape)} (images, channels, and twice resolution / "
            f"{FACTOR}), got {array.dtype}{list(array.shape)}{more}",
            fix="give noise of this shape, or leave it out: the seed gives some",
        )
    return noise
