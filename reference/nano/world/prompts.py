"""Prompts: what may be asked for, how it is said, which scene fulfils it, and whether an image does.

The six categories are those of GenEval (Ghosh et al. 2023): single, two, counting, colors, position,
attributes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import permutations
from random import Random

from . import words
from .scorer import Found, Reading
from .world import (
    COLORS,
    MAX_THINGS,
    RELATIONS,
    SHAPES,
    Look,
    Scene,
    placed,
    random_gain,
    random_look,
    related,
    sized_looks,
)

CATEGORIES = ("single", "two", "counting", "colors", "position", "attributes")
SEEN_APART_PIXELS = 4.0  # least distance by which a relation must hold in an image
ASSIGNMENT_LIMIT = 6  # no prompt asks for more things, so images with more are not matched


@dataclass(frozen=True)
class Group:
    """`count` things of one look; a property that is None is free."""

    count: int
    shape: str
    color: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class Request:
    """All that a prompt demands; the image may show nothing more. `relation` is that of the first group to
    the second."""

    groups: tuple[Group, ...]
    background: str | None = None
    relation: str | None = None

    @property
    def count(self) -> int:
        return sum(group.count for group in self.groups)


def random_request(random: Random, category: str) -> Request:
    """A random request of a category, or of `mixed`: up to four things of any look."""
    shapes, colors = random.sample(SHAPES, 2), random.sample(list(COLORS), 3)
    size = random.choice((None, None, "small", "large"))
    if category == "single":
        groups = (Group(1, shapes[0], size=size),)
    elif category == "two":
        groups = (Group(1, shapes[0]), Group(1, shapes[1]))
    elif category == "counting":
        groups = (Group(random.choice((2, 3, 4)), shapes[0], color=random.choice((None, colors[0]))),)
    elif category == "colors":
        groups = (Group(1, shapes[0], color=colors[0], size=size),)
    elif category == "mixed":
        groups = mixed_groups(random)
    else:
        first, second = colors[:2] if category == "attributes" or random.random() < 0.5 else (None, None)
        shape = shapes[0] if category == "attributes" and random.random() < 0.3 else shapes[1]
        groups = (Group(1, shapes[0], color=first), Group(1, shape, color=second))
    used = {group.color for group in groups}
    background = random.choice([c for c in COLORS if c not in used]) if random.random() < 0.35 else None
    return Request(groups, background, random.choice(RELATIONS) if category == "position" else None)


def mixed_groups(random: Random) -> tuple[Group, ...]:
    """One to three different groups with at most four things and six colours, so that a background is
    left."""
    number, groups = random.choice((1, 2, 2, 3)), []
    while len(groups) < number:
        left = MAX_THINGS - sum(g.count for g in groups) - (number - len(groups) - 1)
        count = random.choice([c for c in (1, 1, 1, 2, 3) if c <= left])
        shape, color = random.choice(SHAPES), random.choice((None, *COLORS))
        size = random.choice((None, None, "small", "large"))
        group = Group(count, shape, color, None if count > 2 else size)
        if all((group.shape, group.color) != (g.shape, g.color) for g in groups):
            groups.append(group)
    # Of three things or more only one may be asked to be large, because more might not fit.
    crowded = sum(group.count for group in groups) > 2
    large = next((group for group in groups if group.size == "large" and group.count == 1), None)
    return tuple(
        replace(g, size=None) if crowded and g.size == "large" and g is not large else g for g in groups
    )


def caption(request: Request) -> str:
    """The one plain way to say a request, which is also how the base model answers."""
    return worded(None, request)


def worded(random: Random | None, request: Request) -> str:
    """One of many ways to say a request."""
    looks = [
        words.described(random, shape=g.shape, color=g.color, size=g.size, plural=g.count > 1)
        for g in request.groups
    ]
    parts = [words.counted(random, group.count, look) for group, look in zip(request.groups, looks)]
    if request.relation:
        phrase = f"{parts[0]} {words.choose(random, words.RELATION_WORDS[request.relation])} {parts[1]}"
    else:
        phrase = words.joined(parts)
    if request.background:
        phrase += " " + words.on_background(random, request.background)
    return phrase if random is None else words.framed(random, phrase)


def is_held_out(text: str, request: Request) -> bool:
    """Whether training must not see this prompt: for its wording or, if it has several groups, for its
    content."""
    content = caption(replace(request, background=None))
    return words.held_out(text) or len(request.groups) > 1 and words.held_out(content)


def random_prompt(random: Random, category: str, *, test: bool) -> tuple[str, Request]:
    """A prompt and its request; with `test` one that training never sees, neither its wording nor (with
    several groups) its content."""
    while True:
        request = random_request(random, category)
        text = worded(random, request)
        content = caption(replace(request, background=None))
        held = words.held_out(text) and (len(request.groups) <= 1 or words.held_out(content))
        if held if test else not is_held_out(text, request):
            return text, request


def scene_of(random: Random, request: Request) -> Scene:
    """A random scene that fulfils a request."""
    while True:
        taken = {group.color for group in request.groups}
        background = request.background or random.choice([c for c in COLORS if c not in taken])
        looks, free = [], []
        for group in request.groups:
            same = group.color or random.choice((None, random_look(random, background=background).color))
            for _ in range(group.count):
                looks.append(
                    random_look(random, background=background, shape=group.shape, color=same, size=group.size)
                )
                free.append(group.size is None)
        relations = [(0, request.relation, 1)] if request.relation else []
        if things := placed(random, sized_looks(looks, free), relations=relations):
            return Scene(background, things, random_gain(random))


def check(request: Request, reading: Reading) -> dict[str, bool]:
    """Demand -> whether an image meets it. All must hold; `things` and `relation` must hold for the same
    assignment."""
    demands = {
        "all known": reading.background is not None
        and all(t.shape and t.color and t.size for t in reading.things),
        "count": len(reading.things) == request.count,
    }
    if request.background:
        demands["background"] = reading.background == request.background
    wanted = [group for group in request.groups for _ in range(group.count)]
    assignments = orders(reading.things, len(wanted))
    fitting = [order for order in assignments if all(fits(t, g) for t, g in zip(order, wanted))]
    demands["things"] = bool(fitting)
    if request.relation:
        demands["relation"] = any(
            related(order[0], request.relation, order[1], SEEN_APART_PIXELS) for order in fitting
        )
    return demands


def orders(things: tuple[Found, ...], count: int) -> list[tuple[Found, ...]]:
    """The ways to pick `count` of the things in order; none if there are too many things to be right."""
    return list(permutations(things, count)) if count <= len(things) <= ASSIGNMENT_LIMIT else []


def fits(thing: Found, group: Group) -> bool:
    """Whether a thing that was read is one that a group asks for."""
    same_color, same_size = group.color in (None, thing.color), group.size in (None, thing.size)
    return thing.shape == group.shape and same_color and same_size


def request_of_looks(looks: list[Look], *, background: str) -> Request:
    """The request that describes looks fully except for size, with equal ones grouped, in order of first
    appearance."""
    counts: dict[tuple[str, str], int] = {}
    for look in looks:
        counts[look.shape, look.color] = counts.get((look.shape, look.color), 0) + 1
    return Request(tuple(Group(count, shape, color) for (shape, color), count in counts.items()), background)
