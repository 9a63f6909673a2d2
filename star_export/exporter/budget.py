"""Mixed precision of an export: what its layers take, what a device leaves for them, and their formats.

Everything but the divergence follows from shapes, so a budget that cannot be met is refused before any work.
"""

from __future__ import annotations

import math

from engines.errors import UsageError
from engines.fit.memory import Use, task_memory, workspace_bytes
from engines.targets import Target, target_from_name
from engines.tensorrt.profiles import CAPACITY_TOKENS
from reference.config import StarConfig

from ..calibration.effects import Effects
from ..calibration.run import material_hash
from ..choice import LARGE, SMALL, Budget, Formats, LayerFormats, check_budget, choose
from ..components import whole
from ..graph.formats import FORMATS
from ..graph.precisions import DECODERS, EQUAL_LAYERS, MIXED, Precision, mixed
from ..graph.repeat import layer_of
from ..planner.source import Source, shapes_of, sizes_from_source

TASK = "generate"
SHARE = 0.9  # of a device's memory; the rest is for its system, its display and the executor's own needs
Shapes = dict[str, tuple[int, ...]]


def check_mixed(precision: str, *, bits: float | None, target: str | None) -> None:
    """Check that mixed precision has one budget, and no other precision has any. Raises UsageError."""
    given = [f"{name} {value}" for name, value in (("bits", bits), ("target", target)) if value is not None]
    if precision != MIXED and given:
        raise UsageError(
            "A budget without mixed precision",
            where=f"export: precision: expected {MIXED} with {given[0]}, got {precision}",
            fix="add --precision mixed, or leave the budget out",
        )
    if precision == MIXED and len(given) != 1:
        raise UsageError(
            "Mixed precision needs one budget",
            where=f"export: expected bits or target, got {' and '.join(given) or 'neither'}",
            fix="give --bits B or --target T",
        )


def layers_of(config: StarConfig) -> dict[str, Shapes]:
    """Layer, such as `base_ar.layers.3` -> the shapes of its linear weights by name, of both decoders."""
    found: dict[str, Shapes] = {}
    for name in DECODERS:
        for weight, shape in shapes_of(whole(name, config), config).items():
            if len(shape) > 1 and (layer := layer_of(weight)) is not None:
                found.setdefault(f"{name}.layers.{layer}", {})[weight] = shape
    return found


def bytes_of(shapes: Shapes, precision: Precision) -> int:
    """Bytes of weights of these shapes in `precision`, with their scales."""
    return sum(sum(precision.stored(name, shape)[1]) for name, shape in shapes.items())


def budget_of(config: StarConfig, *, bits: float | None, target: str | None) -> Budget:
    """The budget that `bits` or a `target` gives.

    Raises UsageError for an unknown target, one that has not both formats, and a budget that int4 everywhere
    exceeds or that int8 everywhere keeps within.
    """
    layers = layers_of(config).values()
    weights = sum(math.prod(shape) for shapes in layers for shape in shapes.values())
    smallest, largest = (
        sum(bytes_of(shapes, EQUAL_LAYERS[name]) for shapes in layers) for name in (SMALL, LARGE)
    )
    if target is not None:
        budget = _budget_on(target_from_name(target), config)
    else:
        assert bits is not None
        asked = bits * weights / 8
        # What is no number of bytes is outside of the bounds as well.
        budget = Budget(int(asked) if math.isfinite(asked) else 0, bits=bits)
    check_budget(budget, smallest_bytes=smallest, largest_bytes=largest, weights=weights)
    return budget


def _budget_on(target: Target, config: StarConfig) -> Budget:
    """What `generate` leaves for the layers in a share of the target's memory, as `plan` counts it.

    Two rows, and a cache and a prompt of all positions, at most CAPACITY_TOKENS.
    """
    if not target.runs(MIXED):
        raise UsageError(
            f"{target.name} does not run mixed engines",
            where=f"export: target {target.name}: expected a device with {SMALL} and {LARGE}, got one with "
            f"{', '.join(target.precisions)}",
            fix="choose another device; `star-export targets` describes them",
        )
    sizes = sizes_from_source(Source(config, copied_bytes=0), LARGE)
    layers = sum(bytes_of(shapes, EQUAL_LAYERS[LARGE]) for shapes in layers_of(config).values())
    capacity = min(sizes.model.max_positions, CAPACITY_TOKENS)
    use = Use(2, capacity, capacity, on_cpu=False)
    rest = task_memory(sizes, TASK, use).resident_bytes + workspace_bytes(sizes, use) - layers
    left = int(SHARE * target.memory_bytes) - rest
    return Budget(left, target=target.name, memory_bytes=target.memory_bytes, share=SHARE)


def formats_of(config: StarConfig, budget: Budget, effects: Effects) -> Formats:
    """Choose the layers' formats by what was measured."""
    layers, kl = layers_of(config), effects.kl()
    found = []
    for name, shapes in layers.items():
        sizes = {format: bytes_of(shapes, equal) for format, equal in EQUAL_LAYERS.items()}
        found.append(LayerFormats(name, sizes, kl[name]))
    return Formats(
        budget=budget,
        weights=sum(math.prod(shape) for shapes in layers.values() for shape in shapes.values()),
        images=effects.images,
        image_tokens=config.vq.image_tokens,
        sha256=material_hash(effects.decodes.material),
        layers=choose(found, budget.bytes),
    )


def precision_of(config: StarConfig, formats: Formats) -> Precision:
    """The precision with the layers in their formats."""
    layers = layers_of(config)
    return mixed({weight: FORMATS[LARGE] for name in formats.wide() for weight in layers[name]})
