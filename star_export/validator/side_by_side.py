"""STAR-Nano's bundles side by side: what each one costs in bytes, and how far it is from the first one.

All bundles get the items, seeds and judges of `score.py`. Beside their scores stand the images that are the
first one's id for id (`reference.nano.benchmark.identity`), and how far their distributions of image tokens
are from the first one's on the images that the first one drew (`star_export.golden.divergence`).
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engines.bundle.reader import Bundle
from engines.errors import InputError, UsageError
from engines.progress import Progress, silent
from engines.runtime.star import Star
from reference.nano.benchmark import identity
from reference.nano.benchmark import score as benchmark

from ..components import COMPONENTS, DIFFUSION
from ..golden.divergence import Spread, divergence
from .score import SETS, RuntimePainter, check_model
from .teacher_forced import forced_logits

TOKENIZER = ("tokenizer.json", "chat_template.jinja")
MAY_DIFFER = ("model: rope_bf16",)  # how the model is stored, not which one it is
OVERALL = "overall"  # beside a task's categories
POINTS = 100.0  # percentage points of a share


@dataclass(frozen=True)
class Against:
    """How far a bundle is from the first one.

    `points` maps task -> category, or `OVERALL` -> (difference, low, high): the percentage points by which
    the share of right results is larger than the first bundle's, with the 95 % interval of a paired
    difference. `first_differences` are those of `identity.first_differences`. `kl` in nats and
    `total_variation` summarise one number for each token of these images.
    """

    points: dict[str, dict[str, tuple[float, float, float]]]
    first_differences: list[int | None]
    kl: Spread
    total_variation: Spread

    @property
    def identical(self) -> int:
        """How many images of the fixed set are the first bundle's, id for id."""
        return self.first_differences.count(None)

    @property
    def median_first_difference(self) -> float | None:
        """The token from which the other images differ, in the median; None if there are none."""
        others = [token for token in self.first_differences if token is not None]
        return statistics.median(others) if others else None


@dataclass(frozen=True)
class Column:
    """A bundle beside others: its path as given, its size in bytes, its score, and, but for the first bundle,
    how far it is from that."""

    bundle: str
    precision: str
    bytes: int
    score: benchmark.Score
    against: Against | None


@dataclass(frozen=True)
class Drawn:
    """A bundle's score, the ids [n, T] of its fixed set, and its logits [n, T, V] on the first one's ids."""

    score: benchmark.Score
    image_ids: np.ndarray
    logits: np.ndarray


def compare_scores(
    bundles: Sequence[str | Path | Bundle],
    *,
    backend: str = "onnxruntime",
    window: int | None = None,
    full: bool = False,
    threads: int | None = None,
    progress: Progress = silent,
) -> list[Column]:
    """Score `bundles`, at least two, and compare all others with the first: a column for each, in order.

    `full` runs the set of items with narrow intervals. Before anything is scored, every bundle is opened and
    draws from one prompt on `backend`. Raises UsageError for fewer than two bundles, InputError for a bundle
    of another model or tokenizer than the first one's, and the errors of the runtime.
    """
    opened = [bundle if isinstance(bundle, Bundle) else Bundle.open(bundle) for bundle in bundles]
    check_comparable(opened)
    for i, bundle in enumerate(opened):
        with Star(bundle, backend=backend, window=window, threads=threads) as star:
            _check_runs(star)
        progress("check, in bundles", i + 1, len(opened))
    columns: list[Column] = []
    first: Drawn | None = None
    for i, bundle in enumerate(opened):

        def part(what: str, done: int, total: int, i: int = i) -> None:
            progress(f"bundle {i + 1} of {len(opened)}: {what}", i * total + done, len(opened) * total)

        with Star(bundle, backend=backend, window=window, threads=threads) as star:
            painter = RuntimePainter(star)
            score = benchmark.measure(painter, SETS["full" if full else "small"], progress=part)
            image_ids = identity.drawn_ids(painter, full=full)
            logits = _fixed_set_logits(star, image_ids if first is None else first.image_ids, full, progress)
        drawn = Drawn(score, image_ids, logits)
        manifest = bundle.manifest
        size = sum(file.size for file in manifest.files.values())
        against = _against(drawn, first, bundle) if first else None
        columns.append(Column(str(bundle.path), manifest.precision, size, score, against))
        first = first or drawn
    return columns


def check_comparable(bundles: Sequence[Bundle]) -> None:
    """Check that there are two bundles, and that all are STAR-Nano's, with the first one's shapes, sampling
    and tokenizer. Raises UsageError and InputError."""
    if len(bundles) < 2:
        raise UsageError(
            "There is nothing to compare with",
            where=f"bundles: expected at least two bundles, got {len(bundles)}",
            fix="star-export score BUNDLE --compare OTHER",
        )
    first = bundles[0].manifest
    facts = dict(_facts(dataclasses.asdict(first.model), "model"))
    for bundle in bundles:
        check_model(bundle)
        files, as_first = bundle.manifest.files, f"as in {bundles[0].path}"
        for place, fact in _facts(dataclasses.asdict(bundle.manifest.model), "model"):
            if place not in MAY_DIFFER and fact != facts.get(place):
                raise InputError(
                    "These bundles are of different models",
                    where=f"{bundle.path}: {place}: expected {facts.get(place)}, {as_first}, got {fact}",
                    fix="compare bundles of checkpoints that have one configuration and one sampling",
                )
        for name in TOKENIZER:
            if name in files and name in first.files and files[name] != first.files[name]:
                raise InputError(
                    "These bundles have different tokenizers",
                    where=f"{bundle.path}: {name}: expected SHA-256 {first.files[name].sha256[:12]}, "
                    f"{as_first}, got {files[name].sha256[:12]}",
                    fix="compare bundles that were exported with one tokenizer",
                )


def _facts(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """The leaves of nested objects: `model: sampling: generate: top_k` and its value."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _facts(inner, f"{place}: {key}")
    else:
        yield place, value


def _check_runs(star: Star) -> None:
    """Load every component and ask for the logits of one image. Raises what scoring would raise later."""
    star.loaded.sessions(*(COMPONENTS.keys() - set(DIFFUSION)))
    prompt = star.chat.generate_prompt(identity.prompts()[0], num_images=1)
    ids = np.zeros((1, star.model.image_tokens), np.int64)
    logits = forced_logits(star, prompt, ids, guidance=star.model.sampling.generate.guidance)
    if count := int((~np.isfinite(logits)).sum()):
        raise InputError(
            "This bundle does not compute numbers",
            where=f"{star.bundle.path}: image_head: logits: expected finite numbers, got {count} NaN or Inf "
            f"of {logits.size}",
            fix=f"star-export validate {star.bundle.path} names the component",
        )


def _fixed_set_logits(star: Star, image_ids: np.ndarray, full: bool, progress: Progress) -> np.ndarray:
    """Logits float32 [n, T, V] for the fixed set of prompts, on the images `image_ids` [n, T]."""
    found = []
    for i, (text, ids) in enumerate(zip(identity.prompts(full=full), image_ids, strict=True)):
        prompt = star.chat.generate_prompt(text, num_images=1)
        found.append(forced_logits(star, prompt, ids[None], guidance=star.model.sampling.generate.guidance))
        progress("compare distributions, in images", i + 1, len(image_ids))
    return np.concatenate(found)


def _against(drawn: Drawn, first: Drawn, bundle: Bundle) -> Against:
    settings = bundle.manifest.model.sampling.generate
    top_k = min(settings.top_k, drawn.logits.shape[-1])
    apart = divergence(drawn.logits, first.logits, top_k=top_k, top_p=settings.top_p)
    return Against(
        points=_points(drawn.score, first.score),
        first_differences=identity.first_differences(drawn.image_ids, first.image_ids),
        kl=Spread.of(apart.kl),
        total_variation=Spread.of(apart.total_variation),
    )


def _points(
    score: benchmark.Score, first: benchmark.Score
) -> dict[str, dict[str, tuple[float, float, float]]]:
    """The paired differences of each task and category, in points."""
    found: dict[str, dict[str, tuple[float, float, float]]] = {}
    both = list(zip(score.results, first.results, strict=True))
    for task, categories in score.right.items():
        pairs = [(ours.item.category, ours.right, other.right) for ours, other in both if ours.task == task]
        for category in (OVERALL, *categories):
            ours, others = zip(*(right for name, *right in pairs if category in (OVERALL, name)))
            difference, low, high = (POINTS * x for x in benchmark.paired_difference(ours, others))
            found.setdefault(task, {})[category] = difference, low, high
    return found
