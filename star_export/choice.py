"""Mixed precision: int8 for the layers of the decoders where it helps most, and int4 for the others.

What a layer costs in either format is known from its shapes, and what it does to the draws is measured
(`calibration/effects.py`). All layers begin in int4. Then int8 goes to the layer that saves most divergence
per byte that it adds, and to the next, as far as the budget allows. The result is a file of the bundle.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from engines.bundle.reader import Bundle
from engines.bundle.records import strict, value_from_json
from engines.errors import UsageError

FORMATS_FILE = "formats.json"  # of a bundle in mixed precision
SMALL, LARGE = "int4", "int8"


@dataclass(frozen=True)
class Budget:
    """The bytes that the linear weights of all layers may take, with their scales, and where they come from.

    Either so many `bits` per weight were asked for; or `generate` is to be resident on a `target`, in the
    `share` of its `memory_bytes` that is not left to the system.
    """

    bytes: int
    bits: float | None = None
    target: str | None = None
    memory_bytes: int | None = None
    share: float | None = None


@dataclass(frozen=True)
class LayerFormats:
    """A layer, for example `base_ar.layers.3`, and the name of its `chosen` format.

    By a format's name, `bytes` are those of its linear weights with their scales, and `kl` the mean
    divergence per image token, in nats, if only this layer is stored so.
    """

    layer: str
    bytes: dict[str, int]
    kl: dict[str, float]
    chosen: str = SMALL

    @property
    def extra_bytes(self) -> int:
        """What int8 takes more than int4."""
        return self.bytes[LARGE] - self.bytes[SMALL]

    @property
    def saved_kl(self) -> float:
        """The divergence that int8 saves; below 0 where int4 happens to be nearer."""
        return self.kl[SMALL] - self.kl[LARGE]


@dataclass(frozen=True)
class Formats:
    """The contents of `formats.json`: a budget, and the layers of both decoders with their formats.

    `weights` counts the numbers in the linear weights of all layers. The divergence was measured on so many
    `images` of `image_tokens` each, drawn from the material whose hash is `sha256`.
    """

    budget: Budget
    weights: int
    images: int
    image_tokens: int
    sha256: str
    layers: tuple[LayerFormats, ...]

    @property
    def bytes(self) -> int:
        """Bytes of all layers in their formats."""
        return sum(layer.bytes[layer.chosen] for layer in self.layers)

    @property
    def bits(self) -> float:
        """Mean bits per weight, scales included."""
        return 8 * self.bytes / self.weights

    def wide(self) -> list[str]:
        """The names of the layers in int8."""
        return [layer.layer for layer in self.layers if layer.chosen == LARGE]


def upgrades(layers: Sequence[LayerFormats]) -> list[LayerFormats]:
    """The layers that int8 helps, beginning with the one that saves most divergence per byte."""
    helped = [layer for layer in layers if layer.saved_kl > 0 and layer.extra_bytes > 0]
    return sorted(helped, key=lambda layer: -layer.saved_kl / layer.extra_bytes)


def choose(layers: Sequence[LayerFormats], budget_bytes: int) -> tuple[LayerFormats, ...]:
    """Give int8 to layers in the order of `upgrades`, and pass over those that no longer fit the budget."""
    taken, wide = sum(layer.bytes[SMALL] for layer in layers), set()
    for layer in upgrades(layers):
        if taken + layer.extra_bytes <= budget_bytes:
            taken += layer.extra_bytes
            wide.add(layer.layer)
    return tuple(replace(layer, chosen=LARGE if layer.layer in wide else SMALL) for layer in layers)


def check_budget(budget: Budget, *, smallest_bytes: int, largest_bytes: int, weights: int) -> None:
    """Check that the budget is at least that of int4 everywhere, and at most that of int8.

    Raises UsageError with all three in bytes and in bits per weight.
    """

    def said(size: int) -> str:
        return f"{size} bytes ({8 * size / weights:.3f} bits per weight)"

    if smallest_bytes <= budget.bytes <= largest_bytes:
        return
    small = budget.bytes < smallest_bytes
    if budget.target and small:
        bits = f"{8 * smallest_bytes / weights:.3f}"
        fix = f"choose a device with more memory, or give --bits {bits} and load in turn (--memory)"
    elif budget.target:
        fix = f"export with --precision int8, with which generate is resident on {budget.target}"
    else:
        fix = f"give --bits from {8 * smallest_bytes / weights:.3f} to {8 * largest_bytes / weights:.3f}"
    got = (
        f"{-budget.bytes} bytes too few for the rest of the model" if budget.bytes < 0 else said(budget.bytes)
    )
    raise UsageError(
        "The budget is below the smallest possible" if small else "The budget is above the largest possible",
        where=f"export: {f'target {budget.target}' if budget.target else 'bits'}: expected from "
        f"{said(smallest_bytes)} in int4 to {said(largest_bytes)} in int8 for the layers of the decoders, "
        f"got {got}",
        fix=fix,
    )


def json_from_formats(formats: Formats) -> str:
    """Serialise `formats` as JSON text."""
    return json.dumps(dataclasses.asdict(formats), indent=1, allow_nan=False) + "\n"


def formats_from_json(text: str, *, where: str) -> Formats:
    """Parse `formats.json`. Raises InputError with the path of a wrong key."""
    return strict(Formats, value_from_json(text, where=where), where)


def formats_of(bundle: Bundle) -> Formats | None:
    """What a bundle in mixed precision says of its layers; None of any other bundle.

    Raises InputError for a file that is not as in the manifest.
    """
    if FORMATS_FILE not in bundle.manifest.files:
        return None
    text = bundle.read(FORMATS_FILE).decode("utf-8", errors="replace")
    return formats_from_json(text, where=f"{bundle.path}: {FORMATS_FILE}")
