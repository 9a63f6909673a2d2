"""How well a bundle of STAR-Nano paints, edits, answers and reasons, beside what the reference reached on the same items.

The items, random numbers and judges are `reference.nano.benchmark.score`'s; the images come from the runtime on any backend and in
any precision. The reference's side was recorded with the weights, and travels in the bundle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engines.bundle.reader import Bundle
from engines.errors import InputError
from engines.inputs.preprocess import images_from_decoded
from engines.progress import Progress, silent
from engines.runtime.star import Star
from engines.sessions import run
from reference.nano.benchmark import score as benchmark
from reference.nano.benchmark.gallery import write_gallery
from reference.nano.recipe import NAME

from ..scores import SCORE, score_of_kind

PSNR_SHORTFALL = 0.5  # dB: 6 % more error in the image, which nobody sees
SETS = {"small": benchmark.SMALL, "full": benchmark.FULL}


@dataclass(frozen=True)
class ScoreReport:
    """The bundle's score, the reference's where it is recorded, and both as a table."""

    score: benchmark.Score
    reference: benchmark.Score | None
    text: str


class RuntimePainter:
    """The runtime with the methods that the benchmark asks for, drawing as the bundle says. Images are uint8 [64, 64, 3]."""

    batch = 4  # one after another; so often is progress told

    def __init__(self, star: Star):
        self.star = star

    def draw(self, prompts: Sequence[str], *, seed: int) -> list[np.ndarray]:
        return [self.star.generate(prompt, seed=seed + i).images[0] for i, prompt in enumerate(prompts)]

    def reason(self, prompts: Sequence[str], *, seed: int) -> tuple[list[str], list[np.ndarray]]:
        made = [
            self.star.generate(prompt, seed=seed + i, reason=True, max_new_tokens=benchmark.ANSWER_TOKENS)
            for i, prompt in enumerate(prompts)
        ]
        return [images.answer for images in made], [images.images[0] for images in made]

    def edit(self, images: Sequence[np.ndarray], texts: Sequence[str], *, seed: int) -> list[np.ndarray]:
        return [
            self.star.edit(image, text, seed=seed + i).images[0]
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
            image = np.ascontiguousarray(image.transpose(2, 0, 1)[None], np.float32) / np.float32(
                127.5
            ) - np.float32(1)
            ids = run(self.star.session("vq_encoder"), {"image": image})["image_ids"]
            made += list(
                images_from_decoded(run(self.star.session("vq_decoder"), {"image_ids": ids})["image"])
            )
        return made


def score(
    bundle: str | Path | Bundle,
    *,
    backend: str = "onnxruntime",
    full: bool = False,
    images: str | Path | None = None,
    progress: Progress = silent,
) -> ScoreReport:
    """Run the benchmark on `bundle`: a small fixed set, or with `full` enough items for narrow intervals.

    `images` is a folder for grids of what was drawn, edited, answered and reasoned. Raises InputError for a bundle of another
    model, and what the runtime raises.
    """
    kind = "full" if full else "small"
    with Star(bundle, backend=backend) as star:
        if star.model.name != NAME:
            raise InputError(
                "This bundle is not STAR-Nano's",
                fix="star-export export nano --out BUNDLE",
                where=f"{star.bundle.path}: model: name: expected {NAME}, got {star.model.name}",
            )
        reference = recorded_score(star.bundle, kind)
        measured = benchmark.measure(RuntimePainter(star), SETS[kind], progress=progress)
    if images is not None:
        write_gallery(Path(images), measured.results)
    return ScoreReport(measured, reference, benchmark.table(measured, reference))


def recorded_score(bundle: Bundle, kind: str) -> benchmark.Score | None:
    """What the reference reached on the small or full set; None in a bundle of weights that were not measured."""
    return (
        score_from_bytes(bundle.file(SCORE).read_bytes(), kind, where=str(bundle.path / SCORE))
        if SCORE in bundle.manifest.files
        else None
    )


def score_from_bytes(data: bytes, kind: str, *, where: str) -> benchmark.Score:
    """The score of a kind out of a recorded file's bytes. Raises InputError."""
    return benchmark.score_from_json(score_of_kind(data, kind, where=where))


def shortfalls(measured: benchmark.Score, reference: benchmark.Score) -> dict[str, tuple[float, float]]:
    """Task -> how far the share of right results falls short of the reference's, and how far chance alone may make it: the 95 % limit
    of a difference of two shares (Newcombe 1998, method 10). Both are samples: where rounding turns one draw, all that follow are
    others, so the same seed in another precision is another sample. `rebuild`: of PSNR in dB."""
    found = {"rebuild": (max(0.0, reference.psnr - measured.psnr), PSNR_SHORTFALL)}
    for task in benchmark.GOALS:
        (right, asked), (ours, tried) = reference.overall(task), measured.overall(task)
        below = right / asked - benchmark.interval(right, asked)[0]
        above = benchmark.interval(ours, tried)[1] - ours / tried
        found[task] = max(0.0, right / asked - ours / tried), math.hypot(below, above)
    return found


def shown(score: benchmark.Score, task: str) -> str:
    """A task's overall score in a word."""
    return f"{score.psnr:.2f} dB" if task == "rebuild" else "{}/{}".format(*score.overall(task))
