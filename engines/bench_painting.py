"""Measure a step of the diffusion decoder, and how close it comes to what the device can compute.

Unlike a decode step, which reads every weight for a few tokens, a step of the transformer multiplies each
weight by thousands, so arithmetic bounds it (`engines.fit.arithmetic`). The bound is the target's rate in 16
bits; a CPU has none, so its share is 0. Image tokens are random: how long a step takes does not depend on
them, and drawing them is what `engines.bench` measures.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .bench import PROMPT, SEED, Timing, device_name, in_turns, ratio
from .fit.arithmetic import row_operations
from .inputs.latents import FACTOR, time_features
from .progress import Progress, silent
from .runtime.painter import Group, Painter, guided
from .runtime.painting import Painting
from .runtime.star import Star
from .targets import target_from_name

REPEATS = 5
BARE = "the same bound calls alone"


@dataclass(frozen=True)
class PaintingBenchmark:
    """All figures of one run, of one image of `resolution` pixels in `steps` steps.

    A guided step takes `step_operations` floating-point operations, which are done at `operations_per_s`;
    `limit_per_s` is the device's rate, 0 where it is not known, and `share` the fraction that is used. An
    image takes `seconds_per_image`, after its image tokens are drawn. `ratios` divides the runtime's step by
    each peer's: 1 is equal.
    """

    model: str
    precision: str
    backend: str
    device: str
    resolution: int
    steps: int
    rows: int
    step_operations: int
    operations_per_s: float
    limit_per_s: int
    share: float
    seconds_per_image: float
    timings: tuple[Timing, ...]
    ratios: dict[str, float]


def bench_painting(
    star: Star, painting: Painting, *, repeats: int = REPEATS, progress: Progress = silent
) -> PaintingBenchmark:
    """Measure `star`: one image of a short prompt, painted with the release's guidance.

    Raises UsageError and InputError as `Star.generate` does.
    """
    painter = Painter(star.loaded, star.captions, painting, PROMPT, seed=SEED)
    rng = np.random.default_rng(SEED)
    image_ids = rng.integers(0, star.model.codebook_size, (1, star.model.image_tokens))
    groups = painter.groups(image_ids)
    calls = calls_of(painter, groups, image_ids)
    seconds = in_turns(calls, repeats=repeats, synchronize=lambda: None, progress=progress)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    operations = step_operations(star, painter, groups)
    kind, _, target = star.backend.partition(":")
    limit = target_from_name(target).operations_per_s if kind == "tensorrt" else 0
    rate = operations / median["step"]
    return PaintingBenchmark(
        model=star.model.name,
        precision=star.bundle.manifest.precision,
        backend=star.backend,
        device=device_name(star.backend, star.loaded.threads),
        resolution=painting.resolution,
        steps=painter.brush.steps,
        rows=sum(len(group.names) for group in groups),
        step_operations=operations,
        operations_per_s=rate,
        limit_per_s=limit,
        share=rate / limit if limit else 0.0,
        seconds_per_image=median["painting"],
        timings=tuple(
            Timing(name, median[name] * 1e3, 0, 0.0) for name in ("step", "text_encoder", "vae_decoder")
        ),
        ratios={BARE: ratio(seconds, "step", "bare")},
    )


def calls_of(painter: Painter, groups: list[Group], image_ids: np.ndarray) -> dict[str, Callable[[], object]]:
    """What is measured, by name: a whole painting, a guided step, its calls alone, and the other parts."""
    latents, features = groups[0].latents.read()[:1].copy(), time_features(0.5)
    decoded = np.zeros((1, painter.spec.latent_channels, painter.brush.side, painter.brush.side), np.float32)

    def step() -> np.ndarray:
        found = {name: v for group in groups for name, v in group.velocities(latents, features).items()}
        return guided(found, painter.brush, last=False)

    def bare() -> None:
        for group in groups:
            group.step()
        groups[-1].velocity.read()

    return {
        "painting": lambda: painter.paint(image_ids),
        "step": step,
        "bare": bare,
        "text_encoder": lambda: painter.encoded(painter.caption_ids),
        "vae_decoder": lambda: painter.decoded(decoded),
    }


def step_operations(star: Star, painter: Painter, groups: list[Group]) -> int:
    """Floating-point operations of a guided step, each row with the ids of its own caption."""
    transformer = star.loaded.sizes.model.transformer
    assert transformer
    resolution = painter.brush.side * FACTOR
    lengths = (painter.caption_ids.shape[1], painter.captions.empty.shape[1])  # in the order of the groups
    return sum(
        len(group.names) * row_operations(transformer, resolution, caption_tokens=length)
        for group, length in zip(groups, lengths)
    )
