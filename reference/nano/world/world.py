"""The world of STAR-Nano: up to four coloured shapes on a coloured background, 64 pixels square.

A `Scene` is what an image shows; `draw.py` draws it and `scorer.py` reads it from an image. Positions and
radii are in pixels, with x to the right and y down; angles are in radians. This module knows nothing of text,
tensors or files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

SIDE_PIXELS = 64
MAX_THINGS = 4
SHAPES = ("circle", "square", "triangle", "star", "cross")
COLORS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (250, 225, 50),
    "purple": (140, 50, 170),
    "orange": (245, 125, 20),
    "white": (245, 245, 245),
    "black": (25, 25, 25),
}
RADII = {"small": (7.2, 7.8), "large": (10.6, 11.4)}  # ranges; a shape's tips reach up to EXTENT times as far
RELATIONS = ("left of", "right of", "above", "below")
PLACES = tuple(f"{v} {h}" for v in ("top", "bottom") for h in ("left", "right"))
EXTENT = 1.25
GAP_PIXELS, BORDER_PIXELS = 3.0, 1.0
TILT = math.radians(5)  # largest rotation
APART_PIXELS = 9.0  # least distance by which a drawn relation holds
CENTER_PIXELS = 4.0  # least distance from the middle lines of a thing whose place is stated
GAIN = 0.01  # relative range of the brightness
TRIES = 20


@dataclass(frozen=True)
class Look:
    """What a thing looks like, apart from its place."""

    shape: str
    color: str
    size: str


@dataclass(frozen=True)
class Thing:
    """One drawn shape: its look, centre, radius and rotation."""

    look: Look
    x: float
    y: float
    radius: float
    angle: float


@dataclass(frozen=True)
class Scene:
    """The content of an image. `gain` multiplies all brightness."""

    background: str
    things: tuple[Thing, ...]
    gain: float = 1.0


def random_look(
    random: Random,
    *,
    background: str,
    shape: str | None = None,
    color: str | None = None,
    size: str | None = None,
) -> Look:
    """A random look with the given properties; the colour is never the background's."""
    return Look(
        shape or random.choice(SHAPES),
        color or random.choice([c for c in COLORS if c != background]),
        size or random.choice(list(RADII)),
    )


def sized_looks(looks: Sequence[Look], free: Sequence[bool]) -> list[Look]:
    """Looks that fit together: of three or more things at most two are large. `free` says whose size may
    change."""
    fitted, large = list(looks), sum(look.size == "large" for look in looks)
    for index in range(len(looks) - 1, -1, -1):
        if len(looks) > 2 and large > 2 and free[index] and fitted[index].size == "large":
            fitted[index], large = Look(looks[index].shape, looks[index].color, "small"), large - 1
    return fitted


def placed(
    random: Random,
    looks: Sequence[Look],
    *,
    relations: Sequence[tuple[int, str, int]] = (),
    places: Sequence[str | None] = (),
    beside: Sequence[Thing] = (),
) -> tuple[Thing, ...] | None:
    """Free positions for `looks`, apart from each other and from `beside`; None if luck or room runs out.

    `relations` are (index, one of RELATIONS, index) that must hold clearly; `places` holds a corner or None
    for each look.
    """
    for _ in range(TRIES):
        things = try_place(random, looks, list(places) or [None] * len(looks), list(beside))
        if things is None:
            continue
        if all(related(things[i], name, things[j], APART_PIXELS) for i, name, j in relations):
            return tuple(things)
    return None


def try_place(
    random: Random, looks: Sequence[Look], places: list[str | None], beside: list[Thing]
) -> list[Thing] | None:
    """One attempt: large things first, each at the first free one of some random points."""
    found: dict[int, Thing] = {}
    for index in sorted(range(len(looks)), key=lambda i: looks[i].size != "large"):
        radius = random.uniform(*RADII[looks[index].size])
        reach = EXTENT * radius + BORDER_PIXELS
        for _ in range(12):
            x, y = (random.uniform(reach, SIDE_PIXELS - reach) for _ in range(2))
            thing = Thing(looks[index], x, y, radius, random.uniform(-TILT, TILT))
            others = [*beside, *found.values()]
            if places[index] in (None, place_of(thing)) and all(clear(thing, other) for other in others):
                found[index] = thing
                break
        else:
            return None
    return [found[index] for index in range(len(looks))]


def clear(thing: Thing, other: Thing) -> bool:
    """Whether two things keep their distance."""
    distance = math.hypot(thing.x - other.x, thing.y - other.y)
    return distance >= EXTENT * (thing.radius + other.radius) + GAP_PIXELS


def related(thing: Thing, relation: str, other: Thing, apart: float) -> bool:
    """Whether `thing` is `relation` `other` by at least `apart` pixels. Works on anything with x and y."""
    difference = {
        "left of": other.x - thing.x,
        "right of": thing.x - other.x,
        "above": other.y - thing.y,
        "below": thing.y - other.y,
    }[relation]
    return difference >= apart


def place_of(thing: Thing, apart: float = CENTER_PIXELS) -> str | None:
    """The corner that a thing is in, one of PLACES; None if it is within `apart` pixels of a middle line.

    Works on anything with x and y.
    """
    across, down = thing.x - SIDE_PIXELS / 2, thing.y - SIDE_PIXELS / 2
    if min(abs(across), abs(down)) < apart:
        return None
    return f"{'top' if down < 0 else 'bottom'} {'left' if across < 0 else 'right'}"


def random_scene(random: Random, *, count: int | None = None) -> Scene:
    """A random scene of one to four things, or of `count`."""
    while True:
        background = random.choice(list(COLORS))
        number = count or random.choice((1, 1, 2, 2, 3, 3, 4))
        looks = [random_look(random, background=background) for _ in range(number)]
        if things := placed(random, sized_looks(looks, [True] * number)):
            return Scene(background, things, random_gain(random))


def random_gain(random: Random) -> float:
    return random.uniform(1 - GAIN, 1 + GAIN)
