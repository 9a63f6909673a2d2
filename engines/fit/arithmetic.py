"""How long a painting takes at least: its operations, over what a device computes in 16 bits.

Unlike a decode step, which memory bandwidth bounds, a step of the diffusion transformer is bound by
arithmetic: each weight multiplies thousands of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from .sizes import Transformer

PAINTED_RESOLUTIONS = (512, 1024)  # what the release was trained for
TOKEN_PIXELS = 16  # pixels along a side of an image for each patch of its latent
CAPTION_TOKENS = 64
# The release's steps, and the rows of one step and of the last (docs/diffusion.md).
STEPS = {"paint": (40, 3, 1), "repaint": (50, 4, 4)}


@dataclass(frozen=True)
class Painting:
    """One image of `resolution` pixels a side by `task`: its operations, and the seconds that they take at
    least (None where the device's rate is unknown)."""

    task: str
    resolution: int
    operations: int
    seconds: float | None


def row_operations(transformer: Transformer, resolution: int, *, caption_tokens: int = CAPTION_TOKENS) -> int:
    """Floating-point operations of one row in one step: two for each weight and token, and attention."""
    tokens = 2 * (resolution // TOKEN_PIXELS) ** 2 + caption_tokens
    products = 2 * transformer.token_weights * tokens
    return products + 4 * tokens**2 * transformer.hidden_size * transformer.blocks


def paintings(transformer: Transformer | None, operations_per_s: float | None) -> tuple[Painting, ...]:
    """What each task takes at each resolution, with the release's steps; nothing without a transformer."""
    if transformer is None:
        return ()
    found = []
    for task, (steps, rows, last) in STEPS.items():
        for resolution in PAINTED_RESOLUTIONS:
            total = ((steps - 1) * rows + last) * row_operations(transformer, resolution)
            seconds = total / operations_per_s if operations_per_s else None
            found.append(Painting(task, resolution, total, seconds))
    return tuple(found)
