"""Reads an image of this world back, with no learned model: what was drawn, where, and what cannot be told.

Colours are segmented against the background, connected pixels make a thing, its moments give centre, size and rotation, and
of the five shapes drawn so the one that overlaps best is read. A thing that overlaps with none, or of no colour of the
palette, is read as unknown, so that near misses do not count.
"""

from __future__ import annotations

import cmath
import math
from dataclasses import dataclass

import numpy as np

from .draw import POINTED, thing_coverage, unit_area
from .world import COLORS, RADII, SHAPES, SIDE_PIXELS, Look, Thing

CONTRAST = 36.0  # levels (distance in RGB) from which a pixel is not background
COLOR_LIMIT = (
    55.0  # levels between a reading and a palette colour; the nearest two of the palette are 100 apart
)
AREA_LIMIT, SPECK = (
    60.0,
    14.0,
)  # pixels: less than AREA_LIMIT is no shape, less than SPECK is dirt and ignored
OVERLAP_LIMIT = 0.80  # intersection over union of a thing and the shape it is read as
EVEN = 0.8  # share of a thing's inside that must have its colour
CORE = 8  # pixels that are enough to tell a colour; edges are blends
FOLDS = {"circle": 0, "square": 4, "triangle": 3, "star": 5, "cross": 4}
SIZE_LIMIT = (RADII["small"][1] + RADII["large"][0]) / 2
RADIUS_RANGE = (RADII["small"][0] * 0.8, RADII["large"][1] * 1.2)
PALETTE = np.array(list(COLORS.values()), np.float32)  # [8, 3]


@dataclass(frozen=True)
class Found:
    """A thing in an image. `shape`, `color` and `size` are None where they cannot be told; `overlap` is with the drawn shape."""

    shape: str | None
    color: str | None
    size: str | None
    x: float
    y: float
    area: float
    overlap: float


@dataclass(frozen=True)
class Reading:
    """All that an image shows; `background` is None where it is no colour of the palette."""

    background: str | None
    things: tuple[Found, ...]


def read(image: np.ndarray) -> Reading:
    """Read an image, uint8 [64, 64, 3]. Raises ValueError for another size or type."""
    if image.shape != (SIDE_PIXELS, SIDE_PIXELS, 3) or image.dtype != np.uint8:
        raise ValueError(f"expected uint8 [64, 64, 3], got {image.dtype} {list(image.shape)}")
    pixels = image.astype(np.float32)
    background = np.median(pixels.reshape(-1, 3), axis=0)
    difference = np.linalg.norm(pixels - background, axis=-1)  # [64, 64]
    things = [found_from_pixels(pixels, background, part) for part in connected(difference > CONTRAST)]
    return Reading(nearest_color(background), tuple(thing for thing in things if thing is not None))


def connected(mask: np.ndarray) -> list[np.ndarray]:
    """The parts of a mask [H, W] that hang together by their sides, each a mask of its own."""
    height, width = mask.shape
    left, parts = set(np.flatnonzero(mask).tolist()), []
    while left:
        stack, part = [left.pop()], []
        while stack:
            part.append(at := stack.pop())
            row, column = divmod(at, width)
            for near in (
                (at - 1) if column else -1,
                (at + 1) if column < width - 1 else -1,
                at - width,
                at + width if row < height - 1 else -1,
            ):
                if near in left:
                    left.remove(near)
                    stack.append(near)
        found = np.zeros(mask.size, bool)
        found[part] = True
        parts.append(found.reshape(mask.shape))
    return parts


def found_from_pixels(pixels: np.ndarray, background: np.ndarray, part: np.ndarray) -> Found | None:
    """One connected part read as a thing; None for dirt."""
    inside = next((core for core in (shrunk(shrunk(part)), shrunk(part)) if core.sum() >= CORE), part)
    color = np.median(pixels[inside], axis=0)
    toward = color - background
    around = grown(part)
    alpha = (
        np.clip(((pixels - background) @ toward) / max(float(toward @ toward), 1.0), 0, 1) * around
    )  # [64, 64]
    area = float(alpha.sum())
    if area < SPECK:
        return None
    rows, columns = np.indices(alpha.shape) + 0.5
    x, y = float((alpha * columns).sum() / area), float((alpha * rows).sum() / area)
    even = np.mean(np.linalg.norm(pixels[inside] - color, axis=-1) < COLOR_LIMIT) >= EVEN
    shape, overlap, radius = best_shape(alpha, x, y, area)
    cut = part[[0, -1]].any() or part[:, [0, -1]].any()  # by the border
    passed = (
        not cut
        and overlap >= OVERLAP_LIMIT
        and area >= AREA_LIMIT
        and RADIUS_RANGE[0] <= radius <= RADIUS_RANGE[1]
    )
    return Found(
        shape=shape if passed else None,
        color=nearest_color(color) if even else None,
        size=("small" if radius < SIZE_LIMIT else "large") if passed else None,
        x=x,
        y=y,
        area=area,
        overlap=overlap,
    )


def best_shape(alpha: np.ndarray, x: float, y: float, area: float) -> tuple[str, float, float]:
    """The shape that, drawn with the area, centre and rotation of `alpha` [64, 64], overlaps it most: name, overlap, radius."""
    best = ("", -1.0, 0.0)
    for shape in SHAPES:
        radius = math.sqrt(area / unit_area(shape))
        drawn = thing_coverage(
            Thing(Look(shape, "", ""), x, y, radius, rotation(alpha, x, y, FOLDS[shape], shape))
        )
        overlap = float(np.minimum(alpha, drawn).sum() / np.maximum(alpha, drawn).sum())
        best = max(best, (shape, overlap, radius), key=lambda reading: reading[1])
    return best


def rotation(alpha: np.ndarray, x: float, y: float, fold: int, shape: str) -> float:
    """Angle of a shape with `fold` equal tips, from the phase of its complex moment of that order."""
    if not fold:
        return 0.0
    rows, columns = np.indices(alpha.shape) + 0.5
    places = (columns - x) + 1j * (rows - y)
    moment = complex((alpha * places**fold).sum())
    tip = -math.pi / 2 + (
        POINTED[shape][1] if shape in POINTED else 0.0
    )  # where a tip is when the angle is 0
    return (cmath.phase(moment) / fold - tip + math.pi / fold) % (2 * math.pi / fold) - math.pi / fold


def nearest_color(color: np.ndarray) -> str | None:
    """Name of the palette's colour nearest to RGB `color` [3]; None when it is none of them."""
    distances = np.linalg.norm(PALETTE - color, axis=-1)
    return list(COLORS)[int(distances.argmin())] if distances.min() <= COLOR_LIMIT else None


def shrunk(mask: np.ndarray) -> np.ndarray:
    """The pixels of a mask whose four neighbours are in it too."""
    padded = np.pad(mask, 1)
    return mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]


def grown(mask: np.ndarray) -> np.ndarray:
    """A mask and the pixels beside it."""
    padded = np.pad(mask, 1)
    return mask | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
