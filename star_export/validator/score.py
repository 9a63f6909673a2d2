"""The score of STAR-Nano's bundle in drawing, editing, answering and reasoning, beside the reference's.

The items, random numbers and judges are those of `reference.nano.benchmark.score`; the images come from the
runtime, on any backend and in any precision. The reference's score was recorded with the weights and travels
in the bundle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engines.bundle.reader import Bundle
from engines.bundle.typed_paths import output_folder
from engines.errors import InputError
from engines.inputs.preprocess import images_from_decoded
from engines.progress import Progress, silent
from engines.runtime.painting import Painting, checked_painting
from engines.runtime.star import Star
from engines.sessions import run
from reference.nano.benchmark import identity
from reference.nano.benchmark import score as benchmark
from reference.nano.benchmark.gallery import write_gallery
from reference.nano.recipe import NAME
from reference.nano.world.world import SIDE_PIXELS

from ..scores import SCORE, ids_from_score, score_of_kind

PAINTED = (
    "What is drawn, edited and reasoned was painted by the diffusion decoder, at {0} pixels, and judged at "
    "{1}. Answers and reconstructions are not painted, and a reference's score is that of the VQ decoder."
)
PSNR_SHORTFALL = 0.5  # dB; 6 % more error in the image, which is invisible
SETS = {"small": benchmark.SMALL, "full": benchmark.FULL}


@dataclass(frozen=True)
class ScoreReport:
    """The bundle's score, the reference's if it was recorded, and a table of both.

    `first_differences` tells, for each image of a fixed set that was recorded too, the first token whose id
    is not that of the fp32 reference, or None if all are; `image_ids` int64 [n, T] has what was drawn.
    """

    score: benchmark.Score
    reference: benchmark.Score | None
    first_differences: list[int | None]
    image_ids: np.ndarray | None
    text: str


class RuntimePainter:
    """The runtime behind the methods that the benchmark calls, with the bundle's sampling settings.

    Images are uint8 [64, 64, 3]. With a `painting`, those that are drawn and edited are the diffusion
    decoder's, shrunk to that side.
    """

    batch = 4  # items between two reports of progress; they run one by one

    def __init__(self, star: Star, *, painting: Painting | None = None):
        self.star, self.painting = star, painting

    def draw(self, prompts: Sequence[str], *, seed: int) -> list[np.ndarray]:
        return [
            judged(self.star.generate(prompt, seed=seed + i, painting=self.painting).images[0])
            for i, prompt in enumerate(prompts)
        ]

    def draw_ids(self, prompts: Sequence[str], *, seed: int) -> list[np.ndarray]:
        return [self.star.generate(prompt, seed=seed + i).image_ids[0] for i, prompt in enumerate(prompts)]

    def reason(self, prompts: Sequence[str], *, seed: int) -> tuple[list[str], list[np.ndarray]]:
        how: dict[str, Any] = {"max_new_tokens": benchmark.ANSWER_TOKENS, "painting": self.painting}
        made = [
            self.star.generate(prompt, seed=seed + i, reason=True, **how) for i, prompt in enumerate(prompts)
        ]
        return [images.answer or "" for images in made], [judged(images.images[0]) for images in made]

    def edit(self, images: Sequence[np.ndarray], texts: Sequence[str], *, seed: int) -> list[np.ndarray]:
        return [
            judged(self.star.edit(image, text, seed=seed + i, painting=self.painting).images[0])
            for i, (image, text) in enumerate(zip(images, texts, strict=True))
        ]

    def ask(self, images: Sequence[np.ndarray], questions: Sequence[str]) -> list[str]:
        return [
            self.star.ask(image, question, max_new_tokens=benchmark.ANSWER_TOKENS).text
            for image, question in zip(images, questions, strict=True)
        ]

    def rebuild(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        made = []
        for image in images:
            planes = np.ascontiguousarray(image.transpose(2, 0, 1)[None], np.float32)  # [1, 3, 64, 64]
            scaled = planes / np.float32(127.5) - np.float32(1)
            ids = run(self.star.session("vq_encoder"), {"image": scaled})["image_ids"]
            decoded = run(self.star.session("vq_decoder"), {"image_ids": ids})["image"]
            made += list(images_from_decoded(decoded))
        return made


def judged(image: np.ndarray) -> np.ndarray:
    """`image` uint8 [R, R, 3] at the side that the scorer reads.

    By Pillow's bilinear filter, which blurs as it shrinks: the rule for the source of an edit
    (docs/diffusion.md, "Images").
    """
    if len(image) == SIDE_PIXELS:
        return image
    from PIL import Image

    side = (SIDE_PIXELS, SIDE_PIXELS)
    return np.asarray(Image.fromarray(image).resize(side, Image.Resampling.BILINEAR))


def score(
    bundle: str | Path | Bundle,
    *,
    backend: str = "onnxruntime",
    window: int | None = None,
    full: bool = False,
    images: str | Path | None = None,
    painting: Painting | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> ScoreReport:
    """Run the benchmark on `bundle`: a small fixed set, or with `full` enough items for narrow intervals.

    `images` is a folder for grids of what was drawn, edited, answered and reasoned. With a `painting`, the
    diffusion decoder makes the images that are drawn and edited. Raises InputError for a bundle of another
    model, and the errors of the runtime.
    """
    folder = None if images is None else output_folder(images)
    kind = "full" if full else "small"
    with Star(bundle, backend=backend, window=window, threads=threads) as star:
        check_model(star.bundle)
        if painting:
            checked_painting(painting, star.model, num_images=1, edit=False)
        reference = recorded_score(star.bundle, kind)
        painter = RuntimePainter(star, painting=painting)
        measured = benchmark.measure(painter, SETS[kind], progress=progress)
        drawn = identity.drawn_ids(painter) if reference else None
        first = [] if drawn is None else identity.first_differences(drawn, recorded_ids(star.bundle))
    if folder is not None:
        write_gallery(folder, measured.results)
    text = benchmark.table(measured, reference)
    text = f"{text}\n{identity.line(first)}" if first else text
    if painting:
        text = f"{text}\n{PAINTED.format(painting.resolution, SIDE_PIXELS)}"
    return ScoreReport(measured, reference, first, drawn, text)


def check_model(bundle: Bundle) -> None:
    """Raise InputError unless `bundle` is STAR-Nano's."""
    if (name := bundle.manifest.model.name) != NAME:
        raise InputError(
            "Only STAR-Nano's bundles can be scored",
            where=f"{bundle.path}: model: name: expected {NAME}, got {name}",
            fix="star-export export nano --out BUNDLE",
        )


def recorded_ids(bundle: Bundle) -> np.ndarray:
    """The ids int64 [n, T] of the fp32 reference's images of the fixed set. Raises InputError."""
    return ids_from_score(bundle.read(SCORE), where=str(bundle.path / SCORE))


def recorded_score(bundle: Bundle, kind: str) -> benchmark.Score | None:
    """The reference's score on the small or full set, or None if the weights were never scored."""
    if SCORE not in bundle.manifest.files:
        return None
    return score_from_bytes(bundle.read(SCORE), kind, where=str(bundle.path / SCORE))


def score_from_bytes(data: bytes, kind: str, *, where: str) -> benchmark.Score:
    """Read the score of a kind from the bytes of a recorded file. Raises InputError."""
    return benchmark.score_from_json(score_of_kind(data, kind, where=where))


def shortfalls(measured: benchmark.Score, reference: benchmark.Score) -> dict[str, tuple[float, float]]:
    """Task -> how far its share of right results is below the reference's, and how far it may be by chance.

    The latter is the 95 % limit of a difference of two shares (Newcombe 1998, method 10). Both scores are
    samples: once rounding changes one draw, all later draws change, so the same seed in another precision is
    another sample. For `rebuild`, both numbers are PSNR in dB.
    """
    found = {"rebuild": (max(0.0, reference.psnr - measured.psnr), PSNR_SHORTFALL)}
    for task in benchmark.GOALS:
        (right, asked), (ours, tried) = reference.overall(task), measured.overall(task)
        below = right / asked - benchmark.interval(right, asked)[0]
        above = benchmark.interval(ours, tried)[1] - ours / tried
        found[task] = max(0.0, right / asked - ours / tried), math.hypot(below, above)
    return found


def shown(score: benchmark.Score, task: str) -> str:
    """Format a task's overall score."""
    return f"{score.psnr:.2f} dB" if task == "rebuild" else "{}/{}".format(*score.overall(task))
