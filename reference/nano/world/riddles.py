"""Prompts that must be worked out first: the base model answers in plain words, and the answer is drawn."""

from __future__ import annotations

from random import Random

from . import words
from .prompts import Group, Request, caption
from .world import COLORS, SHAPES

KINDS = ("count", "color", "shape", "several")
COUNTS = {
    2: ("eyes on a face", "wheels on a bicycle", "hands on a person", "wings on a bird", "ears on a cat"),
    3: ("corners in a triangle", "sides in a triangle", "wheels on a tricycle", "lights on a traffic light"),
    4: ("corners in a square", "legs on a dog", "wheels on a car", "seasons in a year", "legs on a chair"),
}
CORNERS = {
    3: (
        "a triangle has corners",
        "a triangle has sides",
        "a tricycle has wheels",
        "a traffic light has lights",
    ),
    4: (
        "a square has corners",
        "a dog has legs",
        "a car has wheels",
        "a year has seasons",
        "a square has sides",
    ),
    2: ("a face has eyes", "a bicycle has wheels", "a person has hands", "a bird has wings"),
}
SUMS = {
    2: ("one plus one", "three minus one", "four minus two"),
    3: ("one plus two", "two plus one", "four minus one"),
    4: ("two plus two", "one plus three", "three plus one", "two times two"),
}
OF_COLOR = {
    "red": ("blood", "a tomato", "a strawberry", "a fire truck"),
    "green": ("grass", "a frog", "a cucumber", "leaves"),
    "blue": ("the sky", "the sea", "a blueberry"),
    "yellow": ("a lemon", "the sun", "a banana"),
    "purple": ("a plum", "a grape", "an eggplant"),
    "orange": ("a carrot", "a pumpkin", "an orange"),
    "white": ("snow", "milk", "chalk"),
    "black": ("coal", "the night", "a raven"),
}
MIXES = {
    "orange": ("red and yellow", "yellow and red"),
    "green": ("blue and yellow", "yellow and blue"),
    "purple": ("red and blue", "blue and red"),
}
SHAPE_RIDDLES = {
    "circle": (
        "the shape of a wheel",
        "the shape of a coin",
        "the shape without corners",
        "the shape of a ball",
    ),
    "square": ("the shape with four equal sides", "the shape of a chess board", "the shape of a dice"),
    "triangle": (
        "the shape with three sides",
        "the shape with three corners",
        "the shape of a slice of pizza",
    ),
    "star": ("the shape with five points", "the shape of a starfish", "the shape on top of a christmas tree"),
    "cross": ("the sign for addition", "the sign of the red cross", "the sign on an ambulance"),
}


def random_riddle(random: Random, kind: str, *, test: bool) -> tuple[str, Request]:
    """A prompt and its meaning, with held-out wording (`test`) or not."""
    while True:
        text, request = MAKERS[kind](random)
        if words.held_out(text) == test:
            return text, request


def answer(request: Request) -> str:
    """What the base model should say: the plain caption."""
    return caption(request)


def color_riddle(random: Random) -> tuple[str, str]:
    """Words for a colour, and the colour."""
    color = random.choice(list(COLORS))
    if color in MIXES and random.random() < 0.4:
        return f"the color you get from {random.choice(MIXES[color])}", color
    return f"the color of {random.choice(OF_COLOR[color])}", color


def as_many(random: Random, things: str) -> tuple[str, int]:
    """A phrase like "as many ... as ...", and the number it means."""
    count = random.choice((2, 3, 4))
    pattern, options = random.choice(
        (("as many {} as {}", CORNERS), ("as many {} as there are {}", COUNTS), ("{1} {0}", SUMS))
    )
    return pattern.format(things, random.choice(options[count])), count


def by_count(random: Random) -> tuple[str, Request]:
    shape, color = random.choice(SHAPES), random.choice((None, *COLORS))
    text, count = as_many(random, words.described(random, shape=shape, color=color, plural=True))
    return finished(random, text, Group(count, shape, color))


def by_color(random: Random) -> tuple[str, Request]:
    shape, (riddle, color) = random.choice(SHAPES), color_riddle(random)
    name = words.noun(random, shape)
    text = random.choice((f"a {name} in {riddle}", f"a {name} with {riddle}", f"a {name} that has {riddle}"))
    return finished(random, text, Group(1, shape, color))


def by_shape(random: Random) -> tuple[str, Request]:
    shape, color = random.choice(SHAPES), random.choice(list(COLORS))
    pattern = random.choice(("{0} in {1}", "{0}, colored {1}", "{0}, in {1}"))
    text = pattern.format(random.choice(SHAPE_RIDDLES[shape]), color)
    return finished(random, text, Group(1, shape, color))


def by_several(random: Random) -> tuple[str, Request]:
    shape, (riddle, color) = random.choice(SHAPES), color_riddle(random)
    if random.random() < 0.4:
        count, times = random.choice(((2, "twice"), (3, "three times"), (4, "four times")))
        name = words.counted(None, 1, words.noun(random, shape))
        return finished(random, f"{name} in {riddle}, {times}", Group(count, shape, color))
    text, count = as_many(random, words.noun(random, shape, plural=True))
    return finished(random, f"{text}, in {riddle}", Group(count, shape, color))


def finished(random: Random, text: str, group: Group) -> tuple[str, Request]:
    """The riddle as a prompt, sometimes with a background."""
    background = random.choice([c for c in COLORS if c != group.color]) if random.random() < 0.25 else None
    text += f" {words.on_background(random, background)}" if background else ""
    return words.framed(random, text), Request((group,), background)


MAKERS = {"count": by_count, "color": by_color, "shape": by_shape, "several": by_several}
