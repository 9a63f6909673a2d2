"""Recipes: the ranges of shapes that a plan is built for, derived from a component's dynamic axes and checked.

A component with caches has two optimisation profiles of one engine: prefill (S up to a limit) and decode (S = 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace

from ..bundle.manifest import ComponentSpec, ModelSpec, TensorSpec
from ..bundle.tensors import disagreements, shape_from_symbols, symbols_of
from ..errors import InputError, UsageError
from .network import CAPACITY

CAPACITY_TOKENS = (
    2048  # holds the longest prompt of the release's tasks (about 1,250 tokens) and 576 image tokens
)
ROWS, MAX_ROWS = 4, 256  # the default: two images under guidance
PREFILL_OPT, PATCHES_OPT = 64, 1024


@dataclass(frozen=True)
class Range:
    """The smallest, the best served and the largest shape of one input."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


@dataclass(frozen=True)
class Profile:
    """One optimisation profile: a range for every input."""

    name: str
    inputs: dict[str, Range]


@dataclass(frozen=True)
class Limits:
    """What a device is to hold: cache capacity and longest prefill in tokens, rows of a batch (two per image under guidance)."""

    capacity_tokens: int
    prefill_tokens: int
    rows: int


def limits_from_options(
    model: ModelSpec,
    *,
    capacity_tokens: int | None = None,
    prefill_tokens: int | None = None,
    rows: int = ROWS,
) -> Limits:
    """Options as limits; the capacity defaults to the model's positions or 2048, the prefill to the capacity. Or UsageError."""
    capacity = min(model.max_positions, CAPACITY_TOKENS) if capacity_tokens is None else capacity_tokens
    prefill = capacity if prefill_tokens is None else prefill_tokens
    bounds = {
        "capacity_tokens": (capacity, 2, model.max_positions),
        "prefill_tokens": (prefill, 1, capacity),
        "rows": (rows, 2, MAX_ROWS),
    }
    for name, (value, low, high) in bounds.items():
        if type(value) is not int or not low <= value <= high:
            raise UsageError(
                f"This {name} cannot be built",
                where=f"{name}: expected {low} to {high}, got {value!r}",
                fix="capacity is bounded by the model's positions, prefill by the capacity, rows are two per image",
            )
    return Limits(capacity, prefill, rows)


def recipe_from_limits(spec: ComponentSpec, model: ModelSpec, limits: Limits) -> tuple[Profile, ...]:
    """The profiles of one component: each of its axes from 1 (patches: one merged token) to what `limits` allow."""
    merged = model.vision.spatial_merge_size**2  # patches per token
    tokens, images, patches = limits.prefill_tokens, limits.rows // 2, merged * limits.prefill_tokens
    axes = {
        "B": (1, 2, limits.rows),
        "N": (1, 1, images),
        "S": (1, min(PREFILL_OPT, tokens), tokens),
        "P": (merged, min(PATCHES_OPT, patches), patches),
        CAPACITY: (limits.capacity_tokens,) * 3,
    }
    if unknown := sorted(axes_of(spec) - set(axes)):
        raise _refusal(spec.graph, f"axes of {', '.join(axes)}", unknown[0])
    if CAPACITY not in axes_of(spec):
        return (_profile("all", spec, axes),)
    return _profile("prefill", spec, axes), _profile("decode", spec, axes | {"S": (1, 1, 1)})


def check_recipe(recipe: tuple[Profile, ...], spec: ComponentSpec, model: ModelSpec) -> None:
    """Refuse profiles that do not fit the component or the model: InputError naming profile and input."""
    if not recipe:
        raise _refusal(spec.graph, "at least one profile", "none")
    for profile in recipe:
        where = f"{spec.graph}: profile {profile.name}"
        expected = {t.name: t for t in spec.inputs}
        if unknown := sorted(set(profile.inputs) - set(expected)):
            raise _refusal(f"{where}: {unknown[0]}", f"one of {', '.join(expected)}", f"{unknown[0]!r}")
        if missing := [name for name in expected if name not in profile.inputs]:
            raise _refusal(f"{where}: {missing[0]}", "a range for this input", "none")
        _check_order(profile, where)
        _check_positions(
            [_symbols(expected, profile, end, where) for end in ("min", "opt", "max")], model, where
        )
    if len({largest((profile,), spec, axis=CAPACITY) for profile in recipe}) > 1:
        raise _refusal(spec.graph, "one cache capacity in all profiles", "several")


def largest(recipe: tuple[Profile, ...], spec: ComponentSpec, *, axis: str) -> int | None:
    """The largest size of `axis` in any profile: of `C` the fixed capacity, of `S` the longest prefill. None without it."""
    sizes = [
        profile.inputs[tensor.name].max[tensor.shape.index(axis)]
        for profile in recipe
        for tensor in spec.inputs
        if axis in tensor.shape
    ]
    return max(sizes, default=None)


def axes_of(spec: ComponentSpec) -> set[str]:
    """The symbols of the component's inputs."""
    return set().union(*(symbols_of(tensor.shape) for tensor in spec.inputs))


def fits(profile: Profile, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether `shapes` (of all inputs, by name) lie within the profile."""
    return all(
        low <= size <= high
        for name, r in profile.inputs.items()
        for low, size, high in zip(r.min, shapes[name], r.max)
    )


def _profile(name: str, spec: ComponentSpec, axes: Mapping[str, tuple[int, int, int]]) -> Profile:
    ends = [{symbol: sizes[i] for symbol, sizes in axes.items()} for i in range(3)]
    return Profile(
        name, {t.name: Range(*(shape_from_symbols(t.shape, end) for end in ends)) for t in spec.inputs}
    )


def _check_order(profile: Profile, where: str) -> None:
    for name, r in profile.inputs.items():
        if not len(r.min) == len(r.opt) == len(r.max):
            raise _refusal(f"{where}: {name}", "min, opt and max of one rank", f"{r.min}, {r.opt}, {r.max}")
        for low, best, high in zip(r.min, r.opt, r.max):
            if not 1 <= low <= best <= high:
                raise _refusal(f"{where}: {name}", "1 <= min <= opt <= max", f"{r.min}, {r.opt}, {r.max}")


def _symbols(expected: Mapping[str, TensorSpec], profile: Profile, end: str, where: str) -> dict[str, int]:
    """Sizes of the axes at one end of a profile; InputError where two inputs disagree or a fixed size differs."""
    symbols: dict[str, tuple[int, str]] = {}
    for name, r in profile.inputs.items():
        got = SimpleNamespace(shape=getattr(r, end), dtype=expected[name].dtype)
        if wrong := disagreements(expected[name], got, symbols):
            raise _refusal(f"{where}: {end}: {name}", "shapes that fit together", wrong[0])
    return {symbol: size for symbol, (size, _) in symbols.items()}


def _check_positions(sizes: list[dict[str, int]], model: ModelSpec, where: str) -> None:
    low, _, high = sizes
    if low.get(CAPACITY) != high.get(CAPACITY):
        raise _refusal(
            f"{where}: past_key_values", "a fixed capacity", f"{low[CAPACITY]} to {high[CAPACITY]}"
        )
    if high.get(CAPACITY, 0) > model.max_positions:
        raise _refusal(
            f"{where}: past_key_values",
            f"at most the model's {model.max_positions} positions",
            str(high[CAPACITY]),
        )
    if high.get("S", 0) > high.get(CAPACITY, model.max_positions):
        raise _refusal(
            f"{where}: S", f"at most {high.get(CAPACITY, model.max_positions)} new positions", str(high["S"])
        )


def _refusal(where: str, expected: str, got: str) -> InputError:
    return InputError(
        "This recipe cannot be built",
        where=f"{where}: expected {expected}, got {got}",
        fix="correct the profile, or leave recipes out: they are derived from capacity, prefill and rows",
    )
