"""Editing: an instruction, the scene before and after it, and whether an image obeys it and keeps the
rest."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from random import Random

from . import words
from .questions import reference_to
from .scorer import Found, Reading
from .words import described
from .world import (
    COLORS,
    MAX_THINGS,
    PLACES,
    SHAPES,
    Look,
    Scene,
    Thing,
    place_of,
    placed,
    random_look,
    random_scene,
)

# Shares in training: kinds that are learned late get more.
SHARES = {"recolor": 5, "replace": 6, "add": 7, "remove": 3, "background": 3}
KINDS = tuple(SHARES)
MOVED_PIXELS = 4.0  # how far a thing that stays may move
SEEN_CENTER_PIXELS = 2.0  # least distance of a thing in a corner from the middle lines


@dataclass(frozen=True)
class Edit:
    """An instruction `text` that turns `before` into `after`.

    `place` and `size` are what it states about a thing to be added, which is the last one of `after`. A thing
    may be anywhere, or of any size, unless they are stated.
    """

    kind: str
    text: str
    before: Scene
    after: Scene
    place: str | None = None
    size: str | None = None

    @property
    def added(self) -> int | None:
        """The index in `after` of the thing to be added."""
        return len(self.before.things) if self.kind == "add" else None

    @property
    def meant(self) -> Thing | None:
        """The thing that the edit removes or changes."""
        return next((thing for thing in self.before.things if thing not in self.after.things), None)

    @property
    def made(self) -> Thing | None:
        """The thing that the edit adds, or the result of its change."""
        return next((thing for thing in self.after.things if thing not in self.before.things), None)


def random_edit(random: Random, kind: str, *, test: bool) -> Edit:
    """An edit of a kind on its own random scene, with wording that is held out (`test`) or not."""
    while True:
        edit = MAKERS[kind](random, random_scene(random))
        if edit is not None and words.held_out(edit.text) == test:
            return edit


def random_kind(random: Random) -> str:
    """A random kind, weighted by SHARES."""
    return random.choices(KINDS, SHARES.values())[0]


def random_edits(random: Random, count: int, *, test: bool) -> list[Edit]:
    """Edits of one scene, of any kinds that the scene allows."""
    found = [random_edit(random, random_kind(random), test=test)]
    while len(found) < count:
        edit = MAKERS[random_kind(random)](random, found[0].before)
        if edit is not None and words.held_out(edit.text) == test:
            found.append(edit)
    return found


def recolor(random: Random, scene: Scene) -> Edit | None:
    index, name = referred(random, scene)
    if name is None:
        return None
    look = scene.things[index].look
    color = random.choice([c for c in COLORS if c not in (look.color, scene.background)])
    word = words.choose(random, words.COLOR_WORDS.get(color, (color,)))
    text = random.choice(
        (
            f"change the color of the {name} to {word}",
            f"make the {name} {word}",
            f"paint the {name} {word}",
            f"turn the {name} {word}",
            f"the {name} should be {word}",
        )
    )
    return Edit("recolor", text, scene, with_look(scene, index, replace(look, color=color)))


def replace_shape(random: Random, scene: Scene) -> Edit | None:
    index, name = referred(random, scene)
    if name is None:
        return None
    look = scene.things[index].look
    shape, color = random.choice([s for s in SHAPES if s != look.shape]), look.color
    said = None
    if random.random() < 0.5:
        color = said = random.choice([c for c in COLORS if c != scene.background])
    new = words.counted(None, 1, described(random, shape=shape, color=said))
    text = random.choice(
        (
            f"replace the {name} with {new}",
            f"turn the {name} into {new}",
            f"swap the {name} for {new}",
            f"change the {name} to {new}",
        )
    )
    return Edit("replace", text, scene, with_look(scene, index, replace(look, shape=shape, color=color)))


def add(random: Random, scene: Scene) -> Edit | None:
    if len(scene.things) == MAX_THINGS:
        return None
    large = sum(thing.look.size == "large" for thing in scene.things)
    size = "small" if len(scene.things) > 1 and large > 1 else None
    look = random_look(random, background=scene.background, size=size)
    place, said_size = random.choice((None, *PLACES)), random.choice((None, look.size))
    if not (things := placed(random, [look], places=[place], beside=scene.things)):
        return None
    new = words.counted(None, 1, described(random, shape=look.shape, color=look.color, size=said_size))
    where = ""
    if place is not None:
        where = random.choice((f" in the {place}", f" at the {place}", f" to the {place}"))
    text = random.choice(
        (
            f"add {new}{where}",
            f"put {new}{where or ' in the picture'}",
            f"draw {new}{where} too",
            f"place {new}{where or ' somewhere'}",
        )
    )
    after = replace(scene, things=(*scene.things, *things))
    return Edit("add", text, scene, after, place=place, size=said_size)


def remove(random: Random, scene: Scene) -> Edit | None:
    index, name = referred(random, scene)
    if name is None or len(scene.things) < 2:
        return None
    text = random.choice(
        ("remove the {}", "delete the {}", "take away the {}", "erase the {}", "get rid of the {}")
    ).format(name)
    things = scene.things[:index] + scene.things[index + 1 :]
    return Edit("remove", text, scene, replace(scene, things=things))


def background(random: Random, scene: Scene) -> Edit | None:
    used = {scene.background, *(thing.look.color for thing in scene.things)}
    if len(used) == len(COLORS):
        return None
    color = random.choice([c for c in COLORS if c not in used])
    word = words.choose(random, words.COLOR_WORDS.get(color, (color,)))
    text = random.choice(
        (
            f"change the background to {word}",
            f"make the background {word}",
            f"paint the background {word}",
            f"use {words.article(word)} {word} background",
            f"the background should be {word}",
        )
    )
    return Edit("background", text, scene, replace(scene, background=color))


MAKERS = {
    "recolor": recolor,
    "replace": replace_shape,
    "add": add,
    "remove": remove,
    "background": background,
}


def referred(random: Random, scene: Scene) -> tuple[int, str | None]:
    """A random thing of the scene and words for it, or None for the words if nothing distinguishes it from
    the others."""
    index = random.randrange(len(scene.things))
    return index, reference_to(random, scene, scene.things[index])


def with_look(scene: Scene, index: int, look: Look) -> Scene:
    things = list(scene.things)
    things[index] = replace(things[index], look=look)
    return replace(scene, things=tuple(things))


def check(edit: Edit, reading: Reading) -> dict[str, bool]:
    """Demand -> whether an image meets it: `done` for the instruction, `rest unchanged` for everything
    else."""
    free = list(reading.things)
    kept = [index for index in range(len(edit.after.things)) if index != edit.added]
    changed = set()
    if edit.kind in ("recolor", "replace"):
        changed = {i for i in kept if edit.after.things[i].look != edit.before.things[i].look}
    met = {index: taken(free, edit.after.things[index]) for index in kept}
    done = all(met[index] for index in changed)
    if edit.added is not None:
        new = [thing for thing in free if is_added(edit, thing)][:1]
        done, free = bool(new), [thing for thing in free if thing not in new]
    done = done and (edit.kind != "background" or reading.background == edit.after.background)
    unchanged = all(met[i] for i in kept if i not in changed)
    rest = unchanged and reading.background == edit.after.background and not free
    return {"done": done and (edit.kind != "remove" or not free), "rest unchanged": rest}


def is_added(edit: Edit, thing: Found) -> bool:
    """Whether a found thing is the one to be added. The instruction states at most a corner, so anywhere in
    it is right."""
    look = edit.after.things[edit.added].look
    return (
        (thing.shape, thing.color) == (look.shape, look.color)
        and edit.size in (None, thing.size)
        and edit.place in (None, place_of(thing, SEEN_CENTER_PIXELS))
    )


def taken(free: list[Found], thing: Thing) -> bool:
    """Whether `free` holds `thing` at its place; if so, it is taken out of `free`."""
    look = (thing.look.shape, thing.look.color, thing.look.size)
    for found in free:
        near = math.hypot(found.x - thing.x, found.y - thing.y) <= MOVED_PIXELS
        if near and (found.shape, found.color, found.size) == look:
            free.remove(found)
            return True
    return False
