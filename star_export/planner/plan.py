"""`star-export plan`: what fits where, how fast it can be, and what would make it fit, from headers alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from engines.bundle.files import MANIFEST
from engines.bundle.reader import Bundle
from engines.errors import UsageError
from engines.fit import machine, work
from engines.fit.arithmetic import Painting, paintings
from engines.fit.memory import PAINTED, PROMPT_TOKENS, Use, task_memory, tasks_of, workspace_bytes
from engines.fit.sizes import Sizes, sizes_from_bundle
from engines.fit.speed import CPU, Measured, Times, measured_on, times_at
from engines.targets import Target, target_from_name
from engines.tensorrt.profiles import CAPACITY_TOKENS, MAX_ROWS

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4", "fp8", "nvfp4", "mixed")  # what to prefer comes first
RESIDENT, IN_TURN, NO = "resident", "in turn", "no"


@dataclass(frozen=True)
class Export:
    """What an export takes: the disk that it uses beside the bundle and frees, its memory and its time."""

    scratch_bytes: int
    memory_bytes: int
    seconds: float


@dataclass(frozen=True)
class Store:
    """A bundle in one precision, and what its `export` takes (None for a bundle that exists).

    `free_disk_bytes` and `free_memory_bytes` are those of this machine, None where unknown.
    """

    precision: str
    bundle_bytes: int
    weights: dict[str, int]
    export: Export | None
    free_disk_bytes: int | None
    free_memory_bytes: int | None


@dataclass(frozen=True)
class TaskFit:
    """Whether a task fits: `resident`, `in turn` or `no`, in bytes with the executor's estimated workspace.

    `remedies` say what would make it fit.
    """

    task: str
    fits: str
    resident_bytes: int
    in_turn_bytes: int
    largest: tuple[str, ...]
    remedies: tuple[str, ...]


@dataclass(frozen=True)
class Place:
    """A precision on a device. `reason` tells why the device cannot run it at all, if so.

    `limit` are the times at the device's bandwidth (None where that is unknown), `measured` the times at the
    share of it that was last measured, `share` (None where none was); a bundle that was exported with some
    components only has times if it draws and answers. `plans_bytes`, `build_memory_bytes` and `build_seconds`
    are those of its plans, None where it needs none. `paintings` are those of a model with a diffusion
    decoder, at the device's limit of arithmetic in 16 bits.
    """

    target: str
    device: str
    precision: str
    reason: str | None
    memory_bytes: int | None
    weights_bytes: int
    caches_bytes: int
    workspace_bytes: int
    tasks: tuple[TaskFit, ...]
    limit: Times | None
    share: Measured | None
    measured: Times | None
    plans_bytes: int | None
    build_memory_bytes: int | None
    build_seconds: float | None
    paintings: tuple[Painting, ...] = ()


@dataclass(frozen=True)
class Plan:
    """The answer of `plan`: one `Store` for each precision, one `Place` for each precision and device."""

    source: str
    model: str
    rows: int
    capacity_tokens: int
    stores: tuple[Store, ...]
    places: tuple[Place, ...]


@dataclass(frozen=True)
class _Device:
    """A target, or the host's CPU where `target` is None."""

    target: Target | None
    memory_bytes: int | None
    bandwidth_bytes_per_s: float | None

    @property
    def name(self) -> str:
        return self.target.name if self.target else CPU


def plan(
    source: str,
    *,
    targets: Sequence[str] = (CPU,),
    precisions: Sequence[str] = (),
    rows: int = 2,
    capacity_tokens: int | None = None,
    cpu_bandwidth_bytes_per_s: float | None = None,
) -> Plan:
    """Answer for `source`, a bundle or what `export` takes, on each of `targets` in each of `precisions`.

    A target is a name of the device table, or `cpu` for this host. A bundle has one precision; of any other
    source all are answered for unless some are named, `mixed` with its fewest bits per weight. `rows` is the
    batch, two for each image, and `capacity_tokens` that of the caches (by default the model's positions, at
    most 2048). Nothing is downloaded and no weight is read. Raises UsageError for unknown names, InputError
    and CheckpointError for an invalid bundle or checkpoint.
    """
    devices = [_device(name, cpu_bandwidth_bytes_per_s) for name in targets or (CPU,)]
    if wrong := [name for name in precisions if name not in PRECISIONS]:
        raise UsageError(
            "No such precision",
            where=f"plan: precision: expected one of {', '.join(PRECISIONS)}, got {wrong[0]!r}",
            fix="use names from the list",
        )
    if not 2 <= rows <= MAX_ROWS:
        raise UsageError(
            "rows is not a valid size",
            where=f"plan: rows: expected 2 to {MAX_ROWS}, got {rows}",
            fix="leave it out for one image",
        )
    known, stores = _known(source, precisions)
    model = next(iter(known.values())).model
    longest = min(model.max_positions, CAPACITY_TOKENS)
    capacity = longest if capacity_tokens is None else capacity_tokens
    if not 2 <= capacity <= model.max_positions:
        raise UsageError(
            "capacity_tokens is not a valid size",
            where=f"plan: capacity_tokens: expected 2 to {model.max_positions}, got {capacity}",
            fix="stay within the model's positions",
        )
    wanted = precisions or tuple(known)
    places = [
        _place(device, known[precision], known, rows=rows, capacity_tokens=capacity)
        for device in devices
        for precision in wanted
    ]
    chosen = tuple(store for store in stores if store.precision in wanted)
    return Plan(source, model.name, rows, capacity, chosen, tuple(places))


def _known(source: str, precisions: Sequence[str]) -> tuple[dict[str, Sizes], list[Store]]:
    """Precision -> sizes, of a bundle its own and of a checkpoint all, and the bundles that hold them."""
    if (Path(source) / MANIFEST).is_file():
        sizes = sizes_from_bundle(Bundle.open(source))
        if other := [name for name in precisions if name != sizes.precision]:
            raise UsageError(
                "A bundle has one precision",
                where=f"{source}: precision: expected {sizes.precision}, got {other[0]}",
                fix="leave out --precision, or plan the checkpoint that the bundle was exported from",
            )
        return {sizes.precision: sizes}, [_store(sizes, None)]
    from .source import find_source, largest_tensor_bytes, scratch_bytes, sizes_from_source

    found = find_source(source)
    known = {precision: sizes_from_source(found, precision) for precision in PRECISIONS}
    largest, scratch = largest_tensor_bytes(found.config), scratch_bytes(found.config)
    exported = Export(scratch, work.export_memory(largest), work.export_seconds(known["fp32"]))
    return known, [_store(sizes, exported) for sizes in known.values()]


def _store(sizes: Sizes, exported: Export | None) -> Store:
    return Store(
        precision=sizes.precision,
        bundle_bytes=sizes.bundle_bytes,
        weights=sizes.weights,
        export=exported,
        free_disk_bytes=machine.free_disk("."),
        free_memory_bytes=machine.free_memory(),
    )


def _device(name: str, cpu_bandwidth: float | None) -> _Device:
    if name == CPU:
        return _Device(None, machine.free_memory(), cpu_bandwidth)
    target = target_from_name(name)
    return _Device(target, target.memory_bytes, target.bandwidth_bytes_per_s)


def _place(
    device: _Device, sizes: Sizes, known: dict[str, Sizes], *, rows: int, capacity_tokens: int
) -> Place:
    target, use = device.target, _use(device, rows=rows, capacity_tokens=capacity_tokens)
    decoders = [name for name in sizes.model.cache if name in sizes.weights]
    caches = sum(sizes.cache_bytes(d, rows=rows, capacity_tokens=capacity_tokens) for d in decoders)
    bandwidth = device.bandwidth_bytes_per_s
    paints = target is None or "bf16" in target.precisions  # the diffusion decoder's type in every precision
    tasks = [task for task in tasks_of(sizes) if paints or task not in PAINTED]
    timed = "reason" in tasks  # it needs all that draws and answers
    share = measured_on(device.name, sizes) if timed else None
    painted = paintings(sizes.model.transformer, target.operations_per_s if target else None)
    return Place(
        target=device.name,
        device=target.device if target else "this host's CPU",
        precision=sizes.precision,
        reason=_reason(device, sizes.precision),
        memory_bytes=device.memory_bytes,
        weights_bytes=sizes.weights_bytes,
        caches_bytes=caches,
        workspace_bytes=workspace_bytes(sizes, use),
        tasks=tuple(_task_fit(device, sizes, known, task, use) for task in tasks),
        limit=_times(sizes, bandwidth, rows) if bandwidth and timed else None,
        share=share,
        measured=_times(sizes, share.bandwidth_bytes_per_s * share.share, rows) if share else None,
        plans_bytes=work.plans_bytes(sizes) if target else None,
        build_memory_bytes=work.build_memory(sizes) if target else None,
        build_seconds=work.build_seconds(sizes) if target else None,
        paintings=tuple(painting for painting in painted if painting.task in tasks),
    )


def _task_fit(device: _Device, sizes: Sizes, known: dict[str, Sizes], task: str, use: Use) -> TaskFit:
    taken, workspace = task_memory(sizes, task, use), workspace_bytes(sizes, use)
    fits = _fits(device, sizes, task, use)
    return TaskFit(
        task=task,
        fits=fits,
        resident_bytes=taken.resident_bytes + workspace,
        in_turn_bytes=taken.in_turn_bytes + workspace,
        largest=taken.largest,
        remedies=() if fits == RESIDENT else _remedies(device, sizes, known, task, use),
    )


def _remedies(device: _Device, sizes: Sizes, known: dict[str, Sizes], task: str, use: Use) -> tuple[str, ...]:
    """What would make `task` fit, each alone: fewer rows, a smaller capacity, another precision."""
    found = []
    if _fits(device, sizes, task, use) == IN_TURN:
        found.append(f"load in turn (--memory {(device.memory_bytes or 0) / 1e9:.1f}G)")
    least = min(use.capacity_tokens, sizes.model.image_tokens + PROMPT_TOKENS)
    others: list[tuple[str, Callable[[], str]]] = [
        ("2 rows", lambda: _fits(device, sizes, task, dataclasses.replace(use, rows=2))),
        (
            f"a capacity of {least} tokens",
            lambda: _fits(
                device, sizes, task, dataclasses.replace(use, capacity_tokens=least, prefill_tokens=least)
            ),
        ),
    ]
    better = (RESIDENT,) if found else (RESIDENT, IN_TURN)
    for words, fits in others:
        if (state := fits()) in better:
            found.append(words if state == RESIDENT else f"{words}, in turn")
    for precision, other in known.items():
        state = NO if other is sizes or _reason(device, precision) else _fits(device, other, task, use)
        if state in better:
            found.append(f"--precision {precision}" + (", in turn" if state == IN_TURN else ""))
    if not found:
        needed = task_memory(sizes, task, use).in_turn_bytes + workspace_bytes(sizes, use)
        found.append(f"a device with {needed / 1e9:.1f} GB")
    return tuple(found)


def _fits(device: _Device, sizes: Sizes, task: str, use: Use) -> str:
    taken, workspace = task_memory(sizes, task, use), workspace_bytes(sizes, use)
    memory = device.memory_bytes
    if memory is None or taken.resident_bytes + workspace <= memory:
        return RESIDENT
    return IN_TURN if taken.in_turn_bytes + workspace <= memory else NO


def _use(device: _Device, *, rows: int, capacity_tokens: int) -> Use:
    """The CPU allocates what a prompt needs; a plan may be asked for a prompt of its whole capacity."""
    prefill = capacity_tokens if device.target else PROMPT_TOKENS
    return Use(rows, capacity_tokens, prefill, on_cpu=device.target is None)


def _reason(device: _Device, precision: str) -> str | None:
    """Why `device` runs no bundle of this precision; None if it does."""
    if device.target is None or device.target.runs(precision):
        return None
    return f"runs {', '.join(device.target.precisions)}"


def _times(sizes: Sizes, bandwidth: float, rows: int) -> Times:
    return times_at(sizes, bandwidth, rows=rows, prompt_tokens=PROMPT_TOKENS)
