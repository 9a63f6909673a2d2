"""`star-export score`: the score of one bundle, or of several side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.errors import UsageError

from .outputs import Outcome, table, text_from_bytes
from .painting import painting_from_options
from .progress_bar import ProgressBar

if TYPE_CHECKING:
    from ..golden.divergence import Spread
    from ..validator.side_by_side import Against, Column


def score(
    bundle: str,
    *,
    compare: list[str] | None = None,
    full: bool = False,
    pictures: str | None = None,
    window: int | None = None,
    decoder: str = "vq",
    resolution: int | None = None,
    steps: int | None = None,
    backend: str = "onnxruntime",
    threads: int | None = None,
    progress: bool = True,
) -> Outcome:
    """Run the task benchmark of STAR-Nano with `star_export.validator.score.score`.

    With `compare`, run it on these bundles too, with `star_export.validator.side_by_side.compare_scores`.
    With `decoder` "diffusion", what it paints is judged. Raises UsageError for pictures or paintings of
    several bundles.
    """
    from reference.nano.benchmark.score import json_from_score

    from ..validator.score import score as measure
    from ..validator.side_by_side import compare_scores

    if compare is not None and pictures is not None:
        raise UsageError(
            "Pictures are written for one bundle at a time",
            where="--pictures: expected no --compare beside it",
            fix=f"star-export score {bundle} --pictures {pictures}",
        )
    painting = painting_from_options(decoder, force=False, resolution=resolution, steps=steps)
    if compare is not None and painting:
        raise UsageError(
            "Paintings are scored for one bundle at a time",
            where="--decoder: expected vq with --compare, got diffusion",
            fix="score each bundle by itself",
        )
    with ProgressBar("score", shown=progress) as bar:
        running: dict[str, Any] = {
            "backend": backend,
            "window": window,
            "threads": threads,
            "progress": bar,
        }
        if compare is not None:
            bundles = [bundle, *compare]
            columns = compare_scores(bundles, full=full, **running)
            return Outcome(data_from_columns(columns), text_from_columns(columns))
        measured = measure(bundle, full=full, images=pictures, painting=painting, **running)
    data = {
        "decoder": decoder,
        "score": json_from_score(measured.score),
        "reference": measured.reference and json_from_score(measured.reference),
        "first_differences": measured.first_differences,
    }
    return Outcome(data, measured.text)


def data_from_columns(columns: list[Column]) -> dict:
    """The columns for `--json`: an object per bundle, in order, with its 95 % intervals."""
    from reference.nano.benchmark.score import interval, json_from_score

    from ..validator.side_by_side import OVERALL

    def of(column: Column) -> dict:
        tasks = {
            task: {OVERALL: column.score.overall(task), **categories}
            for task, categories in column.score.right.items()
        }
        against = column.against
        return {
            "bundle": column.bundle,
            "precision": column.precision,
            "bytes": column.bytes,
            "score": json_from_score(column.score),
            "intervals": {
                task: {name: interval(*pair) for name, pair in pairs.items()} for task, pairs in tasks.items()
            },
            "against_first": against
            and dataclasses.asdict(against)
            | {
                "identical": against.identical,
                "median_first_difference": against.median_first_difference,
            },
        }

    return {"bundles": [of(column) for column in columns]}


def text_from_columns(columns: list[Column]) -> str:
    """The columns for people: a line per figure."""
    names = _names(columns)
    lines = [
        ("precision", *(column.precision for column in columns)),
        ("size", *(text_from_bytes(column.bytes) for column in columns)),
    ]
    for task in columns[0].score.right:
        lines += _task_lines(columns, task)
    lines += [
        ("rebuild: PSNR in dB", *(f"{column.score.psnr:.2f}" for column in columns)),
        ("identical images", *_cells(columns, lambda a: f"{a.identical} of {len(a.first_differences)}")),
        ("  first other token, median", *_cells(columns, _median)),
        *_spread_lines(columns, "KL in nats", lambda against: against.kl),
        *_spread_lines(columns, "total variation", lambda against: against.total_variation),
    ]
    notes = [
        f"Differences, identical images, KL and total variation are against {names[0]}.",
        "KL and total variation: per token, guided and filtered, on the images that it drew.",
        "In parentheses: 95 % intervals, Wilson's of a share and Newcombe's of a paired difference.",
    ]
    return "\n".join([table(("", *names), lines), *notes])


def _names(columns: list[Column]) -> list[str]:
    """The folders' names, or their paths as given where two have the same."""
    names = [Path(column.bundle).name for column in columns]
    return names if len(set(names)) == len(names) else [column.bundle for column in columns]


def _task_lines(columns: list[Column], task: str) -> list[tuple[str, ...]]:
    """What came out right, its share, and the difference to the first bundle's share."""
    from reference.nano.benchmark.score import interval

    from ..validator.side_by_side import OVERALL, POINTS

    def share(right: int, asked: int) -> str:
        low, high = interval(right, asked)
        return f"{POINTS * right / asked:.1f} ({POINTS * low:.1f} to {POINTS * high:.1f})"

    def difference(against: Against) -> str:
        points, low, high = against.points[task][OVERALL]
        return f"{points:+.1f} ({low:+.1f} to {high:+.1f})"

    pairs = [column.score.overall(task) for column in columns]
    return [
        (f"{task}: right", *(f"{right} of {asked}" for right, asked in pairs)),
        ("  in percent", *(share(*pair) for pair in pairs)),
        ("  difference in points", *_cells(columns, difference)),
    ]


def _spread_lines(
    columns: list[Column], name: str, spread: Callable[[Against], Spread]
) -> list[tuple[str, ...]]:
    return [
        (f"{name}: mean", *_cells(columns, lambda against: f"{spread(against).mean:.3g}")),
        ("  95th percentile", *_cells(columns, lambda against: f"{spread(against).percentile_95:.3g}")),
        ("  largest", *_cells(columns, lambda against: f"{spread(against).largest:.3g}")),
    ]


def _median(against: Against) -> str:
    median = against.median_first_difference
    return "" if median is None else f"{median:g}"


def _cells(columns: list[Column], text: Callable[[Against], str]) -> list[str]:
    """A cell for each bundle, empty for the first one."""
    return [text(column.against) if column.against else "" for column in columns]
