"""Every prompt, question, edit and riddle is fulfilled by its own scene and by no other.

Training never sees a held-out text.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random

import pytest

from reference.nano.benchmark import score as benchmark
from reference.nano.training.batches import PROMPTS
from reference.nano.world import edits, prompts, questions, riddles, words
from reference.nano.world.draw import images_from_scenes
from reference.nano.world.prompts import Group, Request
from reference.nano.world.scorer import Found, Reading, read
from reference.nano.world.world import Look, Scene, Thing, random_scene

SCENE = Scene(
    "white",
    (
        Thing(Look("circle", "red", "large"), 16, 14, 10.5, 0),
        Thing(Look("square", "blue", "small"), 48, 50, 7, 0),
    ),
)


@pytest.mark.parametrize("category", PROMPTS)
def test_a_scene_of_a_prompt_meets_its_demands(category: str) -> None:
    random = Random(category)
    for turn in range(12):
        text, request = prompts.random_prompt(random, category, test=turn % 2 == 0)
        image = images_from_scenes([prompts.scene_of(random, request)], seed=turn)[0]
        assert all(prompts.check(request, read(image)).values()), text


def found(shape: str, color: str, x: float = 32, y: float = 32, size: str = "small") -> Found:
    return Found(shape, color, size, x, y, 150.0, 0.95)


READING = Reading("white", (found("circle", "red", 10, 32), found("square", "blue", 50, 32)))
BOTH = (Group(1, "circle", "red"), Group(1, "square", "blue"))


@pytest.mark.parametrize(
    "request_, failed",
    [
        (Request(BOTH), set()),
        (Request(BOTH, "white", "left of"), set()),
        (Request(BOTH, "black"), {"background"}),
        (Request(BOTH, relation="above"), {"relation"}),
        (Request(BOTH, relation="right of"), {"relation"}),
        (Request(BOTH[:1]), {"count"}),
        (Request((Group(1, "circle", "blue"), Group(1, "square", "red"))), {"things"}),
        (Request((Group(2, "circle"),)), {"things"}),
        (Request((Group(3, "circle"),)), {"things", "count"}),
        (Request((Group(1, "circle", size="large"), BOTH[1])), {"things"}),
    ],
)
def test_each_demand_fails_alone(request_: Request, failed: set[str]) -> None:
    assert {name for name, met in prompts.check(request_, READING).items() if not met} == failed


def test_something_unknown_beside_the_things_fails() -> None:
    strange = replace(READING, things=(*READING.things, replace(found("star", "red"), shape=None)))
    assert not all(prompts.check(Request(BOTH), strange).values())


def test_equal_groups_are_matched_by_any_assignment() -> None:
    reading = Reading("white", (found("star", "red", 50), found("star", "green", 10)))
    request = Request((Group(1, "star"), Group(1, "star", "red")), relation="left of")
    assert prompts.check(request, reading)["relation"]


def test_training_never_sees_what_is_tested() -> None:
    random, tested = Random(1), {item.text for task in benchmark.GOALS for item in benchmark.items(task, 25)}
    assert tested and all(map(words.held_out, tested))
    for _ in range(300):
        text, request = prompts.random_prompt(random, "mixed", test=False)
        assert not words.held_out(text)
        assert len(request.groups) == 1 or not words.held_out(
            prompts.caption(replace(request, background=None))
        )
        assert not words.held_out(riddles.random_riddle(random, "several", test=False)[0])
        assert not words.held_out(edits.random_edit(random, "add", test=False).text)


def test_held_out_contents_of_two_kinds_are_new_to_training() -> None:
    random = Random(2)
    for _ in range(60):
        _, request = prompts.random_prompt(random, "attributes", test=True)
        assert words.held_out(prompts.caption(replace(request, background=None)))


def test_captions_are_plain() -> None:
    request = Request((Group(2, "cross", "orange"), Group(1, "star", size="small")), "yellow")
    assert prompts.caption(request) == "two orange crosses and a small star on a yellow background"
    assert prompts.caption(Request(BOTH, relation="below")) == "a red circle below a blue square"
    assert prompts.caption(Request((Group(1, "star", "orange"),))) == "an orange star"


ANSWERS = {
    ("color", "circle"): "red",
    ("color", "disc"): "red",
    ("color", "square"): "blue",
    ("color", "box"): "blue",
    ("color", "background"): "white",
    ("shape", "red"): "circle",
    ("shape", "blue"): "square",
    ("position", "circle"): "top left",
    ("position", "red"): "top left",
    ("position", "square"): "bottom right",
    ("position", "blue"): "bottom right",
}


@pytest.mark.parametrize("kind", ["color", "shape", "position"])
def test_answers_are_those_of_the_scene(kind: str) -> None:
    random, seen = Random(kind), set()
    for _ in range(80):
        text, answer = questions.random_question(random, SCENE, kind, test=False)
        keys = [key for key in ANSWERS if key[0] == kind and key[1] in text.split("?")[0].split()]
        seen |= {ANSWERS[key] for key in keys}
        assert all(ANSWERS[key] == answer for key in keys), text
    assert len(seen) >= 2


@pytest.mark.parametrize(
    "text, answer",
    [
        ("how many shapes are there?", "two"),
        ("how many circles are there?", "one"),
        ("how many red shapes are there?", "one"),
        ("is there a red circle?", "yes"),
        ("is there a blue circle?", "no"),
        ("is the circle left of the square?", "yes"),
        ("is the circle below the square?", "no"),
        ("is the blue square below the red circle?", "yes"),
    ],
)
def test_counts_and_yes_no(text: str, answer: str) -> None:
    """Every way of asking these leads to the same answer, however often it is drawn."""
    random = Random(text)
    kind = "count" if text.startswith("how many") else "yes/no"
    asked = [q for q in (questions.ASKERS[kind](random, SCENE) for _ in range(6000)) if q and q[0] == text]
    assert asked and {q[1] for q in asked} == {answer}


def test_a_scene_is_described_from_left_to_right() -> None:
    assert (
        questions.ask_describe(Random(0), SCENE)[1] == "a red circle and a blue square on a white background"
    )


def test_ambiguous_things_are_not_spoken_of() -> None:
    twins = replace(SCENE, things=(SCENE.things[0], replace(SCENE.things[0], x=48)))
    assert questions.reference_to(Random(0), twins, twins.things[0]) is None
    asked = [questions.ask_color(Random(seed), twins) for seed in range(60)]
    assert None in asked and {question[1] for question in asked if question} == {
        "white"
    }  # of the background alone


@pytest.mark.parametrize("kind", edits.KINDS)
def test_an_edit_is_judged_by_both_images(kind: str) -> None:
    random = Random(kind)
    for turn in range(12):
        edit = edits.random_edit(random, kind, test=turn % 2 == 0)
        before, after = (read(p) for p in images_from_scenes([edit.before, edit.after], seed=turn))
        assert all(edits.check(edit, after).values()), edit.text
        assert not edits.check(edit, before)["done"], edit.text
        lost = replace(after, things=after.things[:-1]) if after.things else replace(after, background=None)
        assert not all(edits.check(edit, lost).values()), edit.text
        other = next(t for t in ("red", "blue") if t not in (after.background,))
        assert not all(edits.check(edit, replace(after, background=other)).values())


def test_kinds_of_edits_come_by_their_shares() -> None:
    random, total = Random(1), sum(edits.SHARES.values())
    found = Counter(edits.random_kind(random) for _ in range(100 * total))
    assert all(85 * share < found[kind] < 115 * share for kind, share in edits.SHARES.items())


def test_edits_of_one_scene_are_of_many_kinds() -> None:
    kinds = set()
    for seed in range(20):
        made = edits.random_edits(Random(seed), 4, test=False)
        assert len(made) == 4 and all(edit.before is made[0].before for edit in made)
        assert not any(words.held_out(edit.text) for edit in made)
        kinds |= {edit.kind for edit in made[1:]}
    assert kinds == set(edits.KINDS)


def test_an_edit_may_not_move_the_rest() -> None:
    edit = edits.Edit(
        "recolor", "make the circle green", SCENE, edits.with_look(SCENE, 0, Look("circle", "green", "large"))
    )
    things = (found("circle", "green", 16, 14, "large"), found("square", "blue", 48, 50))
    assert edits.check(edit, Reading("white", things)) == {"done": True, "rest unchanged": True}
    moved = (things[0], replace(things[1], x=40))
    assert edits.check(edit, Reading("white", moved)) == {"done": True, "rest unchanged": False}
    assert (
        edits.check(edit, Reading("white", (*things, found("star", "red", 50, 10))))["rest unchanged"]
        is False
    )


@pytest.mark.parametrize(
    "clause, count",
    [("a triangle has corners", 3), ("legs on a dog", 4), ("two plus one", 3), ("a bicycle has wheels", 2)],
)
def test_riddles_mean_what_they_say(clause: str, count: int) -> None:
    random = Random(clause)
    matching = [request for text, request in (riddles.by_count(random) for _ in range(900)) if clause in text]
    assert matching and {request.count for request in matching} == {count}


def test_a_riddle_does_not_say_its_answer() -> None:
    random = Random(3)
    for _ in range(200):
        text, request = riddles.by_color(random)
        color = request.groups[0].color
        assert color not in text.split(" on ")[0].replace("an orange", "").split() or color in ("orange",)


def test_random_scenes_are_a_function_of_the_seed() -> None:
    assert [random_scene(Random(4)) for _ in range(2)] == [random_scene(Random(4)) for _ in range(2)]
