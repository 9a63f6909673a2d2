"""The images of a benchmark for people: what was drawn, edited, answered and reasoned, each with its
verdict."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .plot import write_grid
from .score import Result

SHOWN = 36  # results per task
GRIDS = {"generate": "generated.png", "edit": "edited.png", "ask": "answered.png", "reason": "reasoned.png"}
WHITE = 255


def write_gallery(folder: Path, results: Sequence[Result]) -> list[Path]:
    """Write a grid for each task among the results into `folder`; returns the files written."""
    written = []
    for task, name in GRIDS.items():
        if found := spread([result for result in results if result.task == task], SHOWN):
            write_results(folder / name, found)
            written.append(folder / name)
    return written


def write_results(path: Path, results: Sequence[Result]) -> None:
    """Write these results as one grid, in their order."""
    panels = [panel(result) for result in results]
    widest = max(image.shape[1] for image in panels)
    padded = [np.pad(p, ((0, 0), (0, widest - p.shape[1]), (0, 0)), constant_values=WHITE) for p in panels]
    across = 6 if widest == panels[0].shape[0] else 3
    write_grid(path, padded, [caption(result) for result in results], across=across)


def spread(results: list[Result], count: int) -> list[Result]:
    """At most `count` of the results, evenly spaced."""
    return [results[i * len(results) // count] for i in range(count)] if len(results) > count else results


def panel(result: Result) -> np.ndarray:
    """The given image, the image made from it, or both side by side."""
    shown = [image for image in (result.given, result.image) if image is not None]
    gap = np.full((shown[0].shape[0], 4, 3), WHITE, np.uint8)
    return shown[0] if len(shown) == 1 else np.concatenate([shown[0], gap, shown[1]], axis=1)


def caption(result: Result) -> str:
    """Verdict, text and answer."""
    failed = [demand for demand, met in result.demands.items() if not met]
    verdict = f"WRONG: {', '.join(failed)}" if failed else "right"
    lines = [verdict, result.item.text]
    if result.answer is not None:
        lines.append(f"-> {result.answer}")
    return "|".join(lines)
