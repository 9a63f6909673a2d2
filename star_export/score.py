"""How well a bundle of STAR-Nano paints, edits, answers and reasons, beside what the reference reached on the same items.

The items, random numbers and judges are `reference.nano.benchmark`'s; the pictures come from the runtime on any backend and in
any precision. The reference's side is the one recorded with the weights.
"""
from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engines.errors import InputError
from engines.image import pictures_from_decoded
from engines.runtime import Star
from engines.sessions import run
from reference.nano import benchmark
from reference.nano.painter import ANSWER_TOKENS
from reference.nano.recipe import NAME

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Outcome:
    """The bundle's score, the reference's where it is recorded, and both as a table."""

    score: benchmark.Score
    reference: benchmark.Score | None
    text: str


class RuntimePainter:
    """The runtime with the methods that the benchmark asks for, drawing as the bundle says. Pictures are uint8 [64, 64, 3]."""

    batch = 4  # one after another; so often is progress told

    def __init__(self, star: Star):
        self.star = star

    def draw(self, prompts: Sequence[str], *, seed: int) -> list[np.ndarray]:
        return [self.star.generate(prompt, seed=seed + i).images[0] for i, prompt in enumerate(prompts)]

    def reason(self, prompts: Sequence[str], *, seed: int) -> tuple[list[str], list[np.ndarray]]:
        made = [self.star.generate(prompt, seed=seed + i, reason=True, max_new_tokens=ANSWER_TOKENS)
                for i, prompt in enumerate(prompts)]
        return [pictures.answer for pictures in made], [pictures.images[0] for pictures in made]

    def edit(self, pictures: Sequence[np.ndarray], texts: Sequence[str], *, seed: int) -> list[np.ndarray]:
        return [self.star.edit(picture, text, seed=seed + i).images[0]
                for i, (picture, text) in enumerate(zip(pictures, texts, strict=True))]

    def ask(self, pictures: Sequence[np.ndarray], questions: Sequence[str]) -> list[str]:
        return [self.star.ask(picture, question, max_new_tokens=ANSWER_TOKENS).text
                for picture, question in zip(pictures, questions, strict=True)]

    def rebuild(self, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
        made = []
        for picture in pictures:
            image = np.ascontiguousarray(picture.transpose(2, 0, 1)[None], np.float32) / np.float32(127.5) - np.float32(1)
            ids = run(self.star.session("vq_encoder"), {"image": image})["image_ids"]
            made += list(pictures_from_decoded(run(self.star.session("vq_decoder"), {"image_ids": ids})["image"]))
        return made


def score(bundle: str | Path, *, backend: str = "onnxruntime", full: bool = False, checkpoint: Path | None = None,
          progress: Progress = lambda what, done, total: None) -> Outcome:
    """Run the benchmark on `bundle`: a small fixed set, or with `full` enough items for narrow intervals.

    `checkpoint` is where the reference's score is recorded. Raises InputError for a bundle of another model, and what the runtime
    raises.
    """
    with Star(bundle, backend=backend) as star:
        if star.model.name != NAME:
            raise InputError("This bundle is not STAR-Nano's", fix="train one: python -m reference.nano.train --out FOLDER, then export it",
                             where=f"{bundle}: model: name: expected {NAME}, got {star.model.name}")
        counts = benchmark.FULL if full else benchmark.SMALL
        measured = benchmark.measure(RuntimePainter(star), counts, progress=progress)
    reference = recorded_score(checkpoint, full=full)
    return Outcome(measured, reference, benchmark.table(measured, reference))


def recorded_score(checkpoint: Path | None, *, full: bool) -> benchmark.Score | None:
    """What the reference reached, from `score.json` beside the weights; None where nothing is recorded."""
    path = checkpoint and checkpoint / "score.json"
    return benchmark.score_from_json(json.loads(path.read_text())["full" if full else "small"]) if path and path.exists() else None
