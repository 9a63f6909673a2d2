"""The verb `bench`: how fast a bundle draws, or paints."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from engines.errors import UsageError

from .drawing import open_star
from .outputs import Outcome, table, text_from_bytes
from .painting import painting_from_options
from .progress_bar import ProgressBar

if TYPE_CHECKING:
    from engines import Painting


def bench(
    bundle: str,
    *,
    window: int | None = None,
    decoder: str = "vq",
    resolution: int | None = None,
    steps: int | None = None,
    backend: str = "onnxruntime",
    threads: int | None = None,
    progress: bool = True,
) -> Outcome:
    """Measure milliseconds per step and the share of the memory bandwidth with `engines.bench.bench`; of the
    diffusion decoder those of the device's arithmetic, with `engines.bench_painting.bench_painting`.

    Raises UsageError for options of the other decoder.
    """
    painting = painting_from_options(decoder, force=False, resolution=resolution, steps=steps)
    if painting and window is not None:
        raise UsageError(
            "A painting has no window",
            where=f"--window: expected --decoder vq with it, got {window} and --decoder diffusion",
            fix="omit one of them",
        )
    if painting:
        return _painting(bundle, painting, backend=backend, threads=threads, progress=progress)
    from engines.bench import bench as measure

    with (
        open_star(bundle, backend, window=window, threads=threads) as star,
        ProgressBar("bench", shown=progress) as bar,
    ):
        measured = measure(star, progress=bar)
    lines = [
        (
            timing.name,
            f"{timing.ms:.3f}",
            text_from_bytes(timing.read_bytes) if timing.read_bytes else "",
            f"{timing.share:.0%}" if timing.share else "",
        )
        for timing in measured.timings
    ]
    text = [
        f"{measured.model}, {measured.precision}, {backend} on {measured.device}; "
        f"measured read bandwidth {measured.bandwidth / 1e9:.1f} GB/s",
        table(("stage", "ms", "must read", "of the limit"), lines),
        f"one image of {measured.tokens} tokens: {measured.seconds_per_image:.3f} s; "
        f"{measured.tokens_per_forward:.2f} tokens per forward at a window of {measured.window}",
        f"loop: {measured.loop}",
        *(f"per token: {count:.2f} {name}" for name, count in measured.per_token.items()),
        *(f"decode step over {name}: {ratio:.2f}" for name, ratio in measured.ratios.items()),
    ]
    return Outcome(dataclasses.asdict(measured), "\n".join(text))


def _painting(
    bundle: str, painting: Painting, *, backend: str, threads: int | None, progress: bool
) -> Outcome:
    from engines.bench_painting import bench_painting

    with (
        open_star(bundle, backend, threads=threads) as star,
        ProgressBar("bench", shown=progress) as bar,
    ):
        measured = bench_painting(star, painting, progress=bar)
    done = f"{measured.operations_per_s / 1e9:.1f} billion operations a second"
    limit = f"{measured.share:.0%} of {measured.limit_per_s / 1e12:g} trillion"
    lines = [(timing.name, f"{timing.ms:.3f}") for timing in measured.timings]
    text = [
        f"{measured.model}, {measured.precision}, {backend} on {measured.device}",
        table(("stage", "ms"), lines),
        f"a step of {measured.rows} rows: {measured.step_operations / 1e9:.2f} billion operations; {done}, "
        + (limit if measured.limit_per_s else "of a limit that is not known"),
        f"one painting of {measured.resolution} pixels in {measured.steps} steps, after its image tokens: "
        f"{measured.seconds_per_image:.3f} s",
        *(f"step over {name}: {ratio:.2f}" for name, ratio in measured.ratios.items()),
    ]
    return Outcome(dataclasses.asdict(measured), "\n".join(text))
