"""The rung of paintings: the diffusion decoder's whole way, from prompt to pixels, as the reference went it.

The reference paints its own image tokens step by step, each row alone, with schedule and guidance of its own
(`reference.diffusion.tasks`). The candidate is the runtime: captions, noise, maps, rows that share a call,
schedule, guidance and all graphs.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from engines.errors import MissingError
from engines.inputs.latents import images_from_painted, map_from_patches
from engines.progress import Progress
from engines.runtime.painter import Painter
from engines.runtime.star import Star

from ..golden.compare import Comparison, compare
from ..golden.paintings import PAINTINGS, RecordedPainting, paintings_of
from ..golden.tasks import tasks_of
from ..golden.tolerances import bounded_in
from .certificate import Row, rows_from_results
from .evidence import ShownImage
from .rungs import no_room
from .subject import Subject

# Of the standard deviation, in float32: what the component table allows one call of `dit` or `vae_decoder`.
# The miniature's clean bundles are below 1e-5, and the smallest of the planted faults, time from rounded
# sigmas, is 6e-4 (tests/star_export/validator/test_paintings.py).
TOLERANCE = 2e-4
NOTE = (
    "Seed {}, {} steps, {} pixels. The reference painted it at the export, with this bundle's rounded "
    "weights."
)


def paintings(subject: Subject, progress: Progress) -> tuple[list[Row], str]:
    """Compare the latents after each step, and the image, of a painting and a painted edit.

    Where the reference drew the image tokens of their prompts too, those are compared first. In 16 bits the
    tolerance is a multiple of the reference's own noise, and other ids are only reported.
    """
    recorded = paintings_of(subject.bundle)
    if not recorded:
        return [], f"left out: the bundle has no {PAINTINGS}: export it again, with all components"
    rows: list[Row] = []
    try:
        with subject.star() as star:
            if refusal := no_room(star):
                return [], f"left out: {refusal}"
            for i, (name, one) in enumerate(recorded.items()):
                progress(f"painting: {name}", i, len(recorded))
                if tasks_of(subject.bundle):
                    rows += rows_from_results("runtime", f"{name}: image tokens", _tokens(subject, star, one))
                got = painted(star, one)
                results = compared(subject, name, one, got)
                rows += rows_from_results("runtime", f"{name}: {one.painting.steps} steps", results)
                if subject.evidence:
                    subject.evidence.add("runtime", name, results)
                    if np.isfinite(got["image"]).all():
                        subject.evidence.images.append(_shown(one, got))
    except MissingError as error:
        return rows, f"left out: {error.what}: {error.where}"
    return rows, ""


def painted(star: Star, one: RecordedPainting) -> dict[str, np.ndarray]:
    """What the runtime paints of the recorded image ids, as it was recorded."""
    assert star.captions
    painter = Painter(star.loaded, star.captions, one.painting, one.prompt, seed=one.seed, image=one.image)
    latents = [map_from_patches(found) for found, _ in painter.followed(one.image_ids)]
    return {"latents": np.stack(latents), "image": painter.decoded(latents[-1])}


def compared(
    subject: Subject, name: str, one: RecordedPainting, got: dict[str, np.ndarray]
) -> list[Comparison]:
    """The latents step by step, and the image."""
    wanted, noise = one.case.outputs, one.case.noise_in(subject.compute)
    table = dict.fromkeys(wanted, TOLERANCE)
    tolerances = bounded_in(table, subject.compute, noise, where=f"{PAINTINGS}: {name}")
    results = []
    for step, latents in enumerate(wanted["latents"], start=1):
        ours = {"latents": got["latents"][step - 1]} if step <= len(got["latents"]) else {}
        found = compare(ours, {"latents": latents}, tolerances=tolerances)
        results += [replace(result, place=f"step {step}") for result in found]
    return results + compare({"image": got["image"]}, {"image": wanted["image"]}, tolerances=tolerances)


def _tokens(subject: Subject, star: Star, one: RecordedPainting) -> list[Comparison]:
    """The image tokens that the runtime draws of the prompt."""
    if one.image is None:
        drawn = star.generate(one.prompt, seed=one.seed)
    else:
        drawn = star.edit(one.image, one.prompt, seed=one.seed)
    tolerance = 0.0 if subject.compute == "fp32" else 1.0
    return compare(
        {"image_ids": drawn.image_ids}, {"image_ids": one.image_ids}, tolerances={"image_ids": tolerance}
    )


def _shown(one: RecordedPainting, got: dict[str, np.ndarray]) -> ShownImage:
    title = f"Painted: {one.prompt}" if one.image is None else f"Painted edit: {one.prompt}"
    ours, wanted = (images_from_painted(side["image"])[0] for side in (got, one.case.outputs))
    note = NOTE.format(one.seed, one.painting.steps, one.painting.resolution)
    return ShownImage(title, note, ours, wanted, given=one.image)
