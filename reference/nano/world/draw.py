"""Scenes -> images, many at once: numpy arrays give numpy arrays, torch tensors give tensors on their device.

Every shape is a signed distance. Pixels within half a pixel of its outline are blended, so that edges are
smooth. Slight noise is added, so that no two images are equal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from .world import COLORS, MAX_THINGS, SHAPES, SIDE_PIXELS, Scene, Thing

if TYPE_CHECKING:
    import torch

    Array = np.ndarray | torch.Tensor

NOISE = 2.0  # standard deviation in levels of 255
FIELDS = 9  # of a thing in an array: present, shape, x, y, radius, angle, red, green, blue
STAR_INNER = 0.5  # inner radius as a share of the outer one
CROSS_LENGTH, CROSS_WIDTH = 1.08, 0.40  # half of each, as a share of the radius
REACH = {
    "circle": 0.95,
    "square": 1.2,
    "triangle": 1.25,
    "star": 1.25,
}  # of the tips, as a share of the radius
# Number of tips; angle of one tip in the unrotated shape (0 is up); distance of the notches between tips as a
# share of that of the tips (the notches of a polygon lie on its edges).
POINTED = {
    "square": (4, -math.pi / 4, math.cos(math.pi / 4)),
    "triangle": (3, 0.0, math.cos(math.pi / 3)),
    "star": (5, 0.0, STAR_INNER),
}


def arrays_from_scenes(scenes: Sequence[Scene]) -> tuple[np.ndarray, np.ndarray]:
    """The input of `draw`: things float32 [N, 4, FIELDS] and backgrounds float32 [N, 3], colours times the
    scene's gain."""
    things = np.zeros((len(scenes), MAX_THINGS, FIELDS), np.float32)
    backgrounds = np.empty((len(scenes), 3), np.float32)
    for n, scene in enumerate(scenes):
        backgrounds[n] = [c * scene.gain for c in COLORS[scene.background]]
        for m, thing in enumerate(scene.things):
            shape, color = SHAPES.index(thing.look.shape), COLORS[thing.look.color]
            things[n, m, :6] = [1, shape, thing.x, thing.y, thing.radius, thing.angle]
            things[n, m, 6:] = [c * scene.gain for c in color]
    return things, backgrounds


def namespace(array: Array):
    """The module with the functions for an array: numpy, or torch for a tensor."""
    if isinstance(array, np.ndarray):
        return np
    import torch

    return torch


def draw(things: Array, backgrounds: Array, *, noise: Array | None) -> Array:
    """Images of scenes, all in numpy or all in torch.

    things [N, 4, FIELDS], backgrounds [N, 3], noise [N, 3, 64, 64] with standard deviation one or None ->
    uint8 [N, 3, 64, 64].
    """
    xp = namespace(things)
    image, (count, most) = backgrounds[:, :, None, None], things.shape[:2]
    present, *looks = (things[..., i].reshape(-1, 1, 1) for i in range(6))
    alpha = (present * coverage(*looks)).reshape(count, most, 1, SIDE_PIXELS, SIDE_PIXELS)
    for m in range(most):
        image = image + alpha[:, m] * (things[:, m, 6:, None, None] - image)
    if noise is not None:
        image = image + NOISE * noise
    return xp.asarray(xp.clip(xp.round(image), 0, 255), dtype=xp.uint8)


def coverage(
    shape: Array, x: Array, y: Array, radius: Array, angle: Array, *, shapes: Sequence[str] = SHAPES
) -> Array:
    """How much of each pixel a shape covers. All inputs are [N, 1, 1] -> [N, 64, 64] in [0, 1].

    `shape` holds indices of SHAPES, all of them shapes in `shapes`.
    """
    xp = namespace(x)
    places = xp.arange(SIDE_PIXELS, device=x.device, dtype=xp.float32) + 0.5
    across, down = places[None, None, :] - x, places[None, :, None] - y  # [N, 1, 64], [N, 64, 1]
    cos, sin = xp.cos(angle), xp.sin(angle)
    u, v = across * cos + down * sin, down * cos - across * sin  # rotated back: v < 0 is up
    distance, theta = xp.hypot(u, v), xp.atan2(v, u) + math.pi / 2  # theta 0 is up
    distances = {
        "circle": lambda: distance - REACH["circle"] * radius,
        "cross": lambda: to_cross(u, v, radius),
    }
    for name, (points, tip, inner) in POINTED.items():
        distances[name] = partial(to_points, distance, theta - tip, points, REACH[name] * radius, inner)
    signed = sum(distances[name]() * (shape == SHAPES.index(name)) for name in shapes)
    return xp.clip(0.5 - signed, 0, 1)


def to_points(distance: Array, theta: Array, points: int, outer: Array, inner: float) -> Array:
    """Signed distance to the outline of a figure with `points` tips.

    The tips are at `outer`, one of them at `theta` 0, and the notches at `inner` times that distance.
    """
    xp, half = namespace(distance), math.pi / points
    folded = xp.abs(xp.remainder(theta + half, 2 * half) - half)  # 0 at a tip, half at a notch
    along, beside = distance * xp.cos(folded), distance * xp.sin(folded)
    notch_x, notch_y = inner * math.cos(half), inner * math.sin(half)
    length = math.hypot(1 - notch_x, notch_y)
    return ((along - outer) * notch_y + beside * (1 - notch_x)) / length


def to_cross(u: Array, v: Array, radius: Array) -> Array:
    """Signed distance to two crossed bars."""
    xp = namespace(u)
    far, near = xp.maximum(xp.abs(u), xp.abs(v)), xp.minimum(xp.abs(u), xp.abs(v))
    return xp.maximum(near - CROSS_WIDTH * radius, far - CROSS_LENGTH * radius)


def unit_area(shape: str) -> float:
    """Area of a shape of radius one."""
    if shape == "circle":
        return math.pi * REACH[shape] ** 2
    if shape == "cross":
        return 4 * (2 * CROSS_LENGTH * CROSS_WIDTH - CROSS_WIDTH**2)
    points, _, inner = POINTED[shape]
    return points * REACH[shape] ** 2 * inner * math.sin(math.pi / points)


def images_from_scenes(scenes: Sequence[Scene], *, seed: int | None) -> np.ndarray:
    """Images as uint8 [N, 64, 64, 3]; `seed` decides the noise, and None leaves it out."""
    noise = None
    if seed is not None:
        generator = np.random.Generator(np.random.Philox(key=seed))
        noise = generator.standard_normal((len(scenes), 3, SIDE_PIXELS, SIDE_PIXELS), dtype=np.float32)
    return np.ascontiguousarray(draw(*arrays_from_scenes(scenes), noise=noise).transpose(0, 2, 3, 1))


def thing_coverage(thing: Thing) -> np.ndarray:
    """The coverage of one thing, float32 [64, 64]."""
    values = (SHAPES.index(thing.look.shape), thing.x, thing.y, thing.radius, thing.angle)
    return coverage(*(np.full((1, 1, 1), v, np.float32) for v in values), shapes=[thing.look.shape])[0]
