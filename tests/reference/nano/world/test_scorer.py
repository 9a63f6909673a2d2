"""The scorer reads drawn scenes almost without error, and reads nothing into noise and near misses."""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random

import numpy as np
import pytest

from reference.nano.world.draw import images_from_scenes, thing_coverage, unit_area
from reference.nano.world.scorer import Reading, read
from reference.nano.world.world import (
    COLORS,
    PLACES,
    SHAPES,
    Look,
    Scene,
    Thing,
    clear,
    place_of,
    placed,
    random_scene,
)

SCENES = 350


def errors(scene: Scene, reading: Reading) -> int:
    """Things of a scene that were not read, or not as they are, and things read that are not there."""
    found = [((t.shape, t.color, t.size), t.x, t.y) for t in reading.things]
    missed = sum(
        not any(
            look == (t.look.shape, t.look.color, t.look.size) and math.hypot(x - t.x, y - t.y) < 2
            for look, x, y in found
        )
        for t in scene.things
    )
    return missed + max(0, len(reading.things) - len(scene.things)) + (reading.background != scene.background)


def test_drawn_things_are_read() -> None:
    random = Random(5)
    scenes = [random_scene(random) for _ in range(SCENES)]
    wrong = sum(
        errors(scene, read(image)) for scene, image in zip(scenes, images_from_scenes(scenes, seed=1))
    )
    assert wrong / sum(len(scene.things) for scene in scenes) <= 0.005


def test_slightly_blurred_images_are_read_too() -> None:
    """Near 30 dB, where a reconstruction may be."""
    random = Random(6)
    scenes = [random_scene(random) for _ in range(60)]
    images = images_from_scenes(scenes, seed=2)
    wide = np.pad(images.astype(np.float32), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    weights = np.outer([1, 2, 1], [1, 2, 1]) / 16
    blurred = sum(weights[y, x] * wide[:, y : y + 64, x : x + 64] for y in range(3) for x in range(3))
    psnr = np.mean(
        [10 * math.log10(255**2 / np.mean((a - b) ** 2)) for a, b in zip(images.astype(np.float32), blurred)]
    )
    wrong = sum(errors(s, read(p)) for s, p in zip(scenes, blurred.clip(0, 255).astype(np.uint8)))
    assert 27 < psnr < 34 and wrong / sum(len(s.things) for s in scenes) <= 0.02


def test_noise_holds_no_thing_that_is_known() -> None:
    random = np.random.default_rng(0)
    for image in (
        random.integers(0, 256, (64, 64, 3)),
        (random.normal(128, 40, (64, 64, 3))).clip(0, 255),
        np.kron(random.integers(0, 256, (8, 8, 3)), np.ones((8, 8, 1))),
    ):
        reading = read(image.astype(np.uint8))
        assert not [t for t in reading.things if t.shape and t.color and t.size] or reading.background is None


@pytest.mark.parametrize("color", COLORS)
def test_an_empty_image_is_its_background(color: str) -> None:
    image = images_from_scenes([Scene(color, ())], seed=3)[0]
    assert read(image) == Reading(color, ())


def painted(mask: np.ndarray, color=(220, 40, 40)) -> np.ndarray:
    """An image with soft mask [64, 64] of a colour on white."""
    return (245 + mask[..., None] * (np.array(color) - 245)).round().astype(np.uint8)


def one(shape: str, radius: float = 10.5, x: float = 32.0, y: float = 32.0) -> np.ndarray:
    return thing_coverage(Thing(Look(shape, "red", "large"), x, y, radius, 0.0))


ROWS, COLUMNS = np.indices((64, 64)) + 0.5
NEAR_MISSES = {
    "half a circle": painted(one("circle") * (ROWS < 32)),
    "three quarters of a square": painted(one("square") * ((ROWS < 32) | (COLUMNS < 32))),
    "a ring": painted(one("circle") - one("circle", 6.0)),
    "a bar": painted(((abs(ROWS - 32) < 3) & (abs(COLUMNS - 32) < 14)).astype(float)),
    "an ellipse twice as wide as high": painted(
        (((COLUMNS - 32) / 14) ** 2 + ((ROWS - 32) / 7) ** 2 < 1).astype(float)
    ),
    "two circles that overlap": painted(np.maximum(one("circle", x=26.0), one("circle", x=38.0))),
    "a circle cut by the border": painted(one("circle", x=3.0)),
    "a tiny circle": painted(one("circle", 4.0)),
    "a huge circle": painted(one("circle", 20.0)),
    "a grey circle": painted(one("circle"), (128, 128, 128)),
    "a circle of two colours": (
        painted(one("circle")) * (ROWS < 32)[..., None]
        + painted(one("circle"), (40, 80, 220)) * (ROWS >= 32)[..., None]
    ).astype(np.uint8),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_are_not_read(name: str) -> None:
    reading = read(NEAR_MISSES[name])
    assert reading.things and not any(t.shape and t.color and t.size for t in reading.things)


def test_dirt_is_ignored_and_more_than_dirt_is_not() -> None:
    scene = random_scene(Random(2), count=1)
    image = images_from_scenes([replace(scene, background="white")], seed=4)[0]
    far = (0, 0) if place_of(scene.things[0]) != "top left" else (60, 60)
    image[far[0] : far[0] + 3, far[1] : far[1] + 3] = 0
    assert len(read(image).things) == 1
    image[far[0] : far[0] + 4, far[1] : far[1] + 4] = 0
    assert len(read(image).things) == 2


@pytest.mark.parametrize("shape", SHAPES)
def test_areas_are_those_drawn(shape: str) -> None:
    assert abs(one(shape).sum() - unit_area(shape) * 10.5**2) / one(shape).sum() < 0.02


def test_things_keep_apart_and_inside() -> None:
    random = Random(8)
    for scene in (random_scene(random, count=4) for _ in range(30)):
        assert all(clear(a, b) for i, a in enumerate(scene.things) for b in scene.things[:i])
        assert all(t.radius <= 14 and 7 < t.x < 57 and 7 < t.y < 57 for t in scene.things)
    look = Look("star", "red", "small")
    assert [place_of(t) for t in placed(random, [look] * 4, places=PLACES)] == list(PLACES)


@pytest.mark.parametrize(
    "image", [np.zeros((64, 64), np.uint8), np.zeros((32, 32, 3), np.uint8), np.zeros((64, 64, 3))]
)
def test_what_is_no_image_of_this_world_is_refused(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected uint8"):
        read(image)
