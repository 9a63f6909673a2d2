"""Questions about an image with one right answer: colour, shape, count, position, yes or no, and
descriptions."""

from __future__ import annotations

from random import Random

from . import words
from .prompts import caption, request_of_looks
from .words import described, held_out
from .world import APART_PIXELS, COLORS, RELATIONS, SHAPES, Scene, Thing, place_of, related

KINDS = ("color", "shape", "count", "position", "yes/no")
Question = tuple[str, str]  # text, answer


def random_question(random: Random, scene: Scene, kind: str, *, test: bool) -> Question | None:
    """A question of a kind (or `describe`) that the scene answers, with held-out wording or not; None if
    there is none."""
    for _ in range(20):
        found = ASKERS[kind](random, scene)
        if found is not None and held_out(found[0]) == test:
            return found
    return None


def ask_color(random: Random, scene: Scene) -> Question | None:
    if random.random() < 0.25:
        return random.choice(
            (
                "what color is the background?",
                "what is the color of the background?",
                "which color does the background have?",
                "tell me the background color",
            )
        ), scene.background
    thing = random.choice(scene.things)
    if sum(t.look.shape == thing.look.shape for t in scene.things) > 1:
        return None
    name = described(random, shape=thing.look.shape, size=random.choice((None, thing.look.size)))
    return random.choice(
        (
            f"what color is the {name}?",
            f"what is the color of the {name}?",
            f"which color does the {name} have?",
            f"tell me the color of the {name}",
        )
    ), thing.look.color


def ask_shape(random: Random, scene: Scene) -> Question | None:
    thing = random.choice(scene.things)
    if sum(t.look.color == thing.look.color for t in scene.things) > 1:
        return None
    name = described(random, shape=None, color=thing.look.color, size=random.choice((None, thing.look.size)))
    return random.choice(
        (
            f"what shape is the {name}?",
            f"what is the shape of the {name}?",
            f"what is the {name}?",
            f"which shape does the {name} have?",
        )
    ), thing.look.shape


def ask_count(random: Random, scene: Scene) -> Question | None:
    kinds = [some_kind(random, scene) for _ in range(8)]
    counts = [
        sum(shape in (None, t.look.shape) and color in (None, t.look.color) for t in scene.things)
        for shape, color in kinds
    ]
    count = random.choice(sorted(set(counts)))  # otherwise nearly all answers would be "one"
    shape, color = kinds[counts.index(count)]
    name = described(random, shape=shape, color=color, plural=True)
    return random.choice(
        (
            f"how many {name} are there?",
            f"how many {name} do you see?",
            f"count the {name}",
            f"what is the number of {name}?",
        )
    ), words.NUMBERS[count]


def some_kind(random: Random, scene: Scene) -> tuple[str | None, str | None]:
    """A shape and a colour to ask for, of which either may be open; mostly those of a thing in the scene."""
    look = random.choice(scene.things).look
    shape = random.choice((look.shape, look.shape, None, random.choice(SHAPES)))
    color = random.choice(
        (look.color, None, None, random.choice([c for c in COLORS if c != scene.background]))
    )
    return shape, color


def ask_position(random: Random, scene: Scene) -> Question | None:
    thing = random.choice(scene.things)
    place, name = place_of(thing), reference_to(random, scene, thing)
    if place is None or name is None:
        return None
    return random.choice(
        (
            f"where is the {name}?",
            f"in which corner is the {name}?",
            f"what is the position of the {name}?",
            f"tell me where the {name} is",
        )
    ), place


def ask_yes_no(random: Random, scene: Scene) -> Question | None:
    if len(scene.things) > 1 and random.random() < 0.5:
        return ask_relation(random, scene)
    look, wanted = random.choice(scene.things).look, random.random() < 0.5
    shape, color = look.shape, look.color
    if not wanted:
        shape, color = random.choice(((random.choice(SHAPES), color), (shape, random.choice(list(COLORS)))))
    if color == scene.background:
        return None
    name = described(random, shape=shape, color=color)
    is_there = any((t.look.shape, t.look.color) == (shape, color) for t in scene.things)
    asked = words.counted(None, 1, name)
    return random.choice(
        (
            f"is there {asked}?",
            f"do you see {asked}?",
            f"is {asked} in the picture?",
            f"does the image show {asked}?",
        )
    ), "yes" if is_there else "no"


def ask_relation(random: Random, scene: Scene) -> Question | None:
    first, second = random.sample(scene.things, 2)
    names = [reference_to(random, scene, thing) for thing in (first, second)]
    relation = random.choice(RELATIONS)
    holds, opposite = (related(a, relation, b, APART_PIXELS) for a, b in ((first, second), (second, first)))
    if None in names or holds == opposite:
        return None
    return (
        f"is the {names[0]} {words.choose(random, words.RELATION_WORDS[relation])} the {names[1]}?",
        "yes" if holds else "no",
    )


def ask_describe(random: Random, scene: Scene) -> Question:
    """All things, from left to right."""
    looks = [thing.look for thing in sorted(scene.things, key=lambda thing: thing.x)]
    answer = caption(request_of_looks(looks, background=scene.background))
    return random.choice(
        (
            "describe the picture",
            "what do you see?",
            "what is in the image?",
            "describe the image",
            "what does the picture show?",
            "tell me what you see",
        )
    ), answer


def reference_to(random: Random, scene: Scene, thing: Thing) -> str | None:
    """Words that fit only this thing of the scene, or None if there are none.

    They name the shape, the colour and shape, or the colour alone.
    """
    shape, color = thing.look.shape, thing.look.color
    unique = [
        (s, c)
        for s, c in ((shape, None), (shape, color), (None, color))
        if sum(s in (None, t.look.shape) and c in (None, t.look.color) for t in scene.things) == 1
    ]
    if not unique:
        return None
    s, c = random.choice(unique)
    return described(random, shape=s, color=c)


ASKERS = {
    "color": ask_color,
    "shape": ask_shape,
    "count": ask_count,
    "position": ask_position,
    "yes/no": ask_yes_no,
    "describe": ask_describe,
}
