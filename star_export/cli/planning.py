"""`star-export plan`: the plan as tables."""

from __future__ import annotations

import dataclasses
import textwrap
from typing import TYPE_CHECKING

from engines.errors import MissingError, install

from .outputs import Outcome, table, text_from_bytes

if TYPE_CHECKING:
    from engines.fit.speed import Times

    from ..planner.plan import Place, Plan, Store

UNKNOWN = "-"


def plan(
    source: str,
    *,
    target: list[str] | None = None,
    precision: list[str] | None = None,
    rows: int = 2,
    capacity_tokens: int | None = None,
) -> Outcome:
    """Say what fits where and how fast it can be, with `star_export.planner.plan.plan`.

    Raises MissingError where a checkpoint is planned without the packages of the extra `[export]`.
    """
    from ..planner.plan import CPU
    from ..planner.plan import plan as plan_of

    targets = target or [CPU]
    try:
        answer = plan_of(
            source,
            targets=targets,
            precisions=precision or (),
            rows=rows,
            capacity_tokens=capacity_tokens,
            cpu_bandwidth_bytes_per_s=_host_bandwidth() if CPU in targets else None,
        )
    except ImportError as error:
        raise MissingError(
            "The packages that the plan of a checkpoint needs are not installed",
            where=f"{source}: {error}",
            fix=f"{install('export')}, or plan a bundle, which needs none",
        ) from None
    return Outcome(dataclasses.asdict(answer), text_from_plan(answer))


def text_from_plan(answer: Plan) -> str:
    """The plan for people: the bundles, what fits where, how fast it can be, the builds, and the remedies."""
    images = answer.rows // 2
    lines = [
        f"{answer.model}: {images} {'image' if images == 1 else 'images'} at a time ({answer.rows} rows), "
        f"caches of {answer.capacity_tokens} tokens",
        "",
        table(
            ("bundle", "disk", "export: disk", "memory", "time", "here: disk free", "memory free"),
            [_store_line(store) for store in answer.stores],
        ),
        "",
        table(
            ("target", "precision", "memory", "weights", "caches", "workspace", *_tasks(answer)),
            [_memory_line(place) for place in answer.places],
        ),
        "",
        table(
            (
                *("target", "precision", "ms per image token", "ms per answer token", "s per image"),
                "measured",
            ),
            [_time_line(place) for place in answer.places],
        ),
    ]
    if painted := {place.target: place.paintings for place in answer.places if place.paintings}:
        some = next(iter(painted.values()))
        head = ("at the limit of arithmetic", *(f"{p.task}, {p.resolution} pixels" for p in some))
        counts = ("operations", *(f"{p.operations / 1e15:.3g} PFLOP" for p in some))
        rates = [(name, *(_seconds(p.seconds) for p in found)) for name, found in painted.items()]
        lines += ["", table(head, [counts, *rates])]
    builds = [place for place in answer.places if place.plans_bytes is not None and place.reason is None]
    if builds:
        head = ("target", "precision", "plans", "build: memory", "time")
        lines += ["", table(head, [_build_line(place) for place in builds])]
    if notes := _notes(answer):
        lines += ["", *notes]
    return "\n".join(lines)


def _store_line(store: Store) -> tuple[str, ...]:
    taken = store.export
    return (
        store.precision,
        text_from_bytes(store.bundle_bytes),
        _bytes(store.bundle_bytes + taken.scratch_bytes if taken else None),
        _bytes(taken.memory_bytes if taken else None, about=True),
        _minutes(taken.seconds if taken else None),
        _bytes(store.free_disk_bytes),
        _bytes(store.free_memory_bytes),
    )


def _memory_line(place: Place) -> tuple[str, ...]:
    head = (place.target, place.precision, _bytes(place.memory_bytes))
    if place.reason:
        return (*head, place.reason, "", "", *("" for _ in place.tasks))
    tasks = [
        f"{task.fits}: "
        + text_from_bytes(task.resident_bytes if task.fits == "resident" else task.in_turn_bytes)
        for task in place.tasks
    ]
    sizes = (place.weights_bytes, place.caches_bytes, place.workspace_bytes)
    return (*head, *map(text_from_bytes, sizes), *tasks)


def _time_line(place: Place) -> tuple[str, ...]:
    pairs = [
        _pair(place.limit, place.measured, name) for name in ("image_token_ms", "answer_token_ms", "image_s")
    ]
    said = f"{place.share.share:.2f} of the limit, {place.share.executor}" if place.share else "never"
    return (place.target, place.precision, *pairs, said)


def _build_line(place: Place) -> tuple[str, ...]:
    return (
        place.target,
        place.precision,
        _bytes(place.plans_bytes, about=True),
        _bytes(place.build_memory_bytes, about=True),
        _minutes(place.build_seconds),
    )


def _tasks(answer: Plan) -> list[str]:
    return [task.task for task in answer.places[0].tasks]


def _notes(answer: Plan) -> list[str]:
    """What would make fit what does not, or only in turn; and what the figures are."""
    lines = []
    for place in answer.places:
        for task in place.tasks if place.reason is None else ():
            if task.remedies:
                state = "does not fit" if task.fits == "no" else "fits only in turn"
                line = (
                    f"{place.target} {place.precision}: {task.task} {state} "
                    f"({text_from_bytes(task.resident_bytes)} resident, "
                    f"{text_from_bytes(task.in_turn_bytes)} in turn); {'; or '.join(task.remedies)}"
                )
                lines += textwrap.wrap(line, 110, subsequent_indent="  ", break_on_hyphens=False)
    if any(store.precision == "mixed" and store.export for store in answer.stores):
        lines.append("mixed: with its fewest bits per weight; more --bits make it larger, up to int8")
    commands = dict.fromkeys(place.share.command for place in answer.places if place.share)
    lines += [f"measured with: {command}" for command in commands]
    return lines


def _pair(limit: Times | None, measured: Times | None, name: str) -> str:
    """`1.73`, the time at the bandwidth limit, or `1.73; 8.26` with that at the measured share."""
    if limit is None:
        return UNKNOWN
    return "; ".join(_short(getattr(times, name)) for times in (limit, measured) if times)


def _short(value: float) -> str:
    """Three digits: `0.494`, `8.72`, `2600`."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _bytes(size: int | None, *, about: bool = False) -> str:
    return UNKNOWN if size is None else f"{'about ' if about else ''}{text_from_bytes(size)}"


def _minutes(seconds: float | None) -> str:
    if seconds is None:
        return UNKNOWN
    return f"about {seconds / 60:.0f} min" if seconds >= 120 else f"about {seconds:.0f} s"


def _seconds(seconds: float | None) -> str:
    return UNKNOWN if seconds is None else f"{_short(seconds)} s"


def _host_bandwidth() -> float:
    """The read bandwidth of this host's memory, measured in about a second."""
    from engines.bench import host_bandwidth

    return host_bandwidth()
