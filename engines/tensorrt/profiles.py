"""Optimisation profiles: the ranges of shapes that a plan is built for.

They are derived from a component's dynamic axes, or given by the caller, and checked. A component with new
positions has two profiles in one engine: for a decoder prefill (S up to a limit) and decode (S = 1), and for
the image head window (S up to a few tokens) and decode.
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
ROWS, MAX_ROWS = 4, 256  # by default two images under guidance
PREFILL_OPT, PATCHES_OPT = 64, 1024
CAPTION_OPT, CAPTION_MAX = 64, 256  # ids that the diffusion decoder's text encoder reads
SIDES = (8, 64, 128)  # of a latent: images of 64, 512 and 1024 pixels
WINDOW_OPT, WINDOW_MAX = 16, 32  # tokens of an image that the image head draws in one step


@dataclass(frozen=True)
class Range:
    """The smallest shape of one input, the shape to optimise for, and the largest."""

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
    """The sizes that a device must hold.

    The cache capacity and the longest prefill are in tokens; a batch has two rows per image under guidance.
    """

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
    """Turn options into limits.

    The capacity defaults to the model's positions, at most 2048, and the prefill to the capacity. Raises
    UsageError for a size out of bounds.
    """
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
                f"{name} is not a valid size",
                where=f"{name}: expected {low} to {high}, got {value!r}",
                fix="stay within the model's positions; the prefill may not exceed the capacity",
            )
    return Limits(capacity, prefill, rows)


def profiles_from_limits(spec: ComponentSpec, model: ModelSpec, limits: Limits) -> tuple[Profile, ...]:
    """The profiles of one component: each axis from 1 (patches: one merged token) to what `limits` allows."""
    merged = model.vision.spatial_merge_size**2  # patches per token
    tokens, images, patches = limits.prefill_tokens, limits.rows // 2, merged * limits.prefill_tokens
    axes: dict[str, tuple[int, ...]] = {
        "B": (1, 2, limits.rows),
        "N": (1, 1, images),
        "S": (1, min(PREFILL_OPT, tokens), tokens),
        "P": (merged, min(PATCHES_OPT, patches), patches),
        CAPACITY: (limits.capacity_tokens,) * 3,
        "L": (1, CAPTION_OPT, CAPTION_MAX),
        "Q": SIDES,
        "T": tuple((side // 2) ** 2 for side in SIDES),
    }
    if "T" in axes_of(spec):  # a call of the diffusion transformer has the rows of one caption
        axes["N"] = (1, 2, limits.rows)
    if unknown := sorted(axes_of(spec) - set(axes)):
        raise _refusal(spec.graph, f"axes of {', '.join(axes)}", unknown[0])
    if "S" not in axes_of(spec):
        return (_profile("all", spec, axes),)
    decode = _profile("decode", spec, axes | {"S": (1, 1, 1)})
    if CAPACITY in axes_of(spec):
        return _profile("prefill", spec, axes), decode
    window = min(WINDOW_MAX, tokens)
    return _profile("window", spec, axes | {"S": (1, min(WINDOW_OPT, window), window)}), decode


def check_profiles(profiles: tuple[Profile, ...], spec: ComponentSpec, model: ModelSpec) -> None:
    """Check that the profiles fit the component and the model.

    Raises InputError naming the profile and the input.
    """
    if not profiles:
        raise _refusal(spec.graph, "at least one profile", "none")
    for profile in profiles:
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
    if len({largest((profile,), spec, axis=CAPACITY) for profile in profiles}) > 1:
        raise _refusal(spec.graph, "one cache capacity in all profiles", "several")


def largest(profiles: tuple[Profile, ...], spec: ComponentSpec, *, axis: str) -> int | None:
    """The largest size of `axis` in any profile (the capacity for `C`, the longest prefill for `S`).

    None for a component without this axis.
    """
    sizes = [
        profile.inputs[tensor.name].max[tensor.shape.index(axis)]
        for profile in profiles
        for tensor in spec.inputs
        if axis in tensor.shape
    ]
    return max(sizes, default=None)


def axes_of(spec: ComponentSpec) -> set[str]:
    """The symbolic axes of the component's inputs."""
    return set().union(*(symbols_of(tensor.shape) for tensor in spec.inputs))


def fits(profile: Profile, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the shapes of all inputs, by name, lie within the profile."""
    return all(
        low <= size <= high
        for name, r in profile.inputs.items()
        for low, size, high in zip(r.min, shapes[name], r.max)
    )


def _profile(name: str, spec: ComponentSpec, axes: Mapping[str, tuple[int, ...]]) -> Profile:
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
    """The sizes of the axes at one end of a profile.

    Raises InputError where two inputs disagree or a fixed size differs.
    """
    symbols: dict[str, tuple[int, str]] = {}
    for name, r in profile.inputs.items():
        got = SimpleNamespace(shape=getattr(r, end), dtype=expected[name].dtype)
        if wrong := disagreements(expected[name], got, symbols):
            raise _refusal(f"{where}: {end}: {name}", "shapes that fit together", wrong[0])
    return {symbol: size for symbol, (size, _) in symbols.items()}


def _check_positions(sizes: list[dict[str, int]], model: ModelSpec, where: str) -> None:
    low, _, high = sizes
    capacity, longest = high.get(CAPACITY), high.get(CAPACITY, model.max_positions)
    caches = f"{where}: past_key_values"
    if low.get(CAPACITY) != capacity:
        raise _refusal(caches, "a fixed capacity", f"{low[CAPACITY]} to {capacity}")
    if capacity is not None and capacity > model.max_positions:
        raise _refusal(caches, f"at most the model's {model.max_positions} positions", str(capacity))
    if high.get("S", 0) > longest:
        raise _refusal(f"{where}: S", f"at most {longest} new positions", str(high["S"]))


def _refusal(where: str, expected: str, got: str) -> InputError:
    return InputError(
        "These profiles cannot be built",
        where=f"{where}: expected {expected}, got {got}",
        fix="correct the profile, or leave profiles out: the defaults follow from capacity, prefill and rows",
    )
