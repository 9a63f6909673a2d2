"""Reads an image of this world without a learned model: what was drawn, where, and what cannot be told.

Colours are segmented against the background, and connected pixels form a thing. Its moments give centre, size
and rotation, and of the five shapes drawn with these the one that overlaps best is read. A thing that
overlaps with none, or has no colour of the palette, is read as unknown, so that near misses do not count.
"""

from __future__ import annotations

import cmath
import math
from dataclasses import dataclass

import numpy as np

from .draw import POINTED, thing_coverage, unit_area
from .world import COLORS, RADII, SHAPES, SIDE_PIXELS, Look, Thing

CONTRAST = 36.0  # levels (distance in RGB) from which on a pixel is not background
COLOR_LIMIT = 55.0  # levels between a reading and a palette colour; the palette's closest two are 100 apart
AREA_LIMIT = 60.0  # pixels; a smaller part is not a shape
SPECK = 14.0  # pixels; a smaller part is dirt and ignored
OVERLAP_LIMIT = 0.80  # intersection over union of a thing and the shape that it is read as
EVEN = 0.8  # share of a thing's inside that must have its colour
CORE = 8  # pixels that suffice to tell a colour; edges are blends
FOLDS = {"circle": 0, "square": 4, "triangle": 3, "star": 5, "cross": 4}
SIZE_LIMIT = (RADII["small"][1] + RADII["large"][0]) / 2
RADIUS_RANGE = (RADII["small"][0] * 0.8, RADII["large"][1] * 1.2)
PALETTE = np.array(list(COLORS.values()), np.float32)  # [8, 3]


@dataclass(frozen=True)
class Found:
    """A thing found in an image.

    `shape`, `color` and `size` are None if they cannot be told; `overlap` is that with the drawn shape.
    """

    shape: str | None
    color: str | None
    size: str | None
    x: float
    y: float
    area: float
    overlap: float


@dataclass(frozen=True)
class Reading:
    """All that an image shows; `background` is None if it is no colour of the palette."""

    background: str | None
    things: tuple[Found, ...]


def read(image: np.ndarray) -> Reading:
    """Read an image, uint8 [64, 64, 3]. Raises ValueError for another size or type."""
    if image.shape != (SIDE_PIXELS, SIDE_PIXELS, 3) or image.dtype != np.uint8:
        found = f"{image.dtype} {list(image.shape)}"
        raise ValueError(f"the image has the wrong size or type: expected uint8 [64, 64, 3], got {found}")
    pixels = image.astype(np.float32)
    background = np.median(pixels.reshape(-1, 3), axis=0)
    difference = np.linalg.norm(pixels - background, axis=-1)  # [64, 64]
    things = [found_from_pixels(pixels, background, part) for part in connected(difference > CONTRAST)]
    return Reading(nearest_color(background), tuple(thing for thing in things if thing is not None))


def connected(mask: np.ndarray) -> list[np.ndarray]:
    """The parts of a mask [H, W] that are connected through their sides, each as a mask of its own."""
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
    """One connected part read as a thing, or None for dirt."""
    inside = next((core for core in (shrunk(shrunk(part)), shrunk(part)) if core.sum() >= CORE), part)
    color = np.median(pixels[inside], axis=0)
    toward = color - background
    share = ((pixels - background) @ toward) / max(float(toward @ toward), 1.0)
    alpha = np.clip(share, 0, 1) * grown(part)  # [64, 64]
    area = float(alpha.sum())
    if area < SPECK:
        return None
    rows, columns = np.indices(alpha.shape) + 0.5
    x, y = float((alpha * columns).sum() / area), float((alpha * rows).sum() / area)
    even = np.mean(np.linalg.norm(pixels[inside] - color, axis=-1) < COLOR_LIMIT) >= EVEN
    shape, overlap, radius = best_shape(alpha, x, y, area)
    cut = part[[0, -1]].any() or part[:, [0, -1]].any()  # off by the border of the image
    sized = area >= AREA_LIMIT and RADIUS_RANGE[0] <= radius <= RADIUS_RANGE[1]
    passed = not cut and overlap >= OVERLAP_LIMIT and sized
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
    """The shape that overlaps `alpha` [64, 64] most when drawn with its area, centre and rotation: name,
    overlap, radius."""
    best = ("", -1.0, 0.0)
    for shape in SHAPES:
        radius = math.sqrt(area / unit_area(shape))
        angle = rotation(alpha, x, y, FOLDS[shape], shape)
        drawn = thing_coverage(Thing(Look(shape, "", ""), x, y, radius, angle))
        overlap = float(np.minimum(alpha, drawn).sum() / np.maximum(alpha, drawn).sum())
        best = max(best, (shape, overlap, radius), key=lambda reading: reading[1])
    return best


def rotation(alpha: np.ndarray, x: float, y: float, fold: int, shape: str) -> float:
    """The angle of a shape with `fold` equal tips, from the phase of its complex moment of that order."""
    if not fold:
        return 0.0
    rows, columns = np.indices(alpha.shape) + 0.5
    places = (columns - x) + 1j * (rows - y)
    moment = complex((alpha * places**fold).sum())
    tip = -math.pi / 2 + (POINTED[shape][1] if shape in POINTED else 0.0)  # where a tip is at angle 0
    return (cmath.phase(moment) / fold - tip + math.pi / fold) % (2 * math.pi / fold) - math.pi / fold


def nearest_color(color: np.ndarray) -> str | None:
    """The name of the palette colour nearest to RGB `color` [3], or None if it is too far from all of
    them."""
    distances = np.linalg.norm(PALETTE - color, axis=-1)
    return list(COLORS)[int(distances.argmin())] if distances.min() <= COLOR_LIMIT else None


def shrunk(mask: np.ndarray) -> np.ndarray:
    """The pixels of a mask whose four neighbours are in it too."""
    padded = np.pad(mask, 1)
    return mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]


def grown(mask: np.ndarray) -> np.ndarray:
    """A mask and the pixels next to it."""
    padded = np.pad(mask, 1)
    return mask | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
