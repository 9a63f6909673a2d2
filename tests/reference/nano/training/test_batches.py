"""Batches: each label says what its scene, edit or answer says, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from reference.nano.checkpoint.tokens import Rows
from reference.nano.training import loop, stage_image, stage_reward
from reference.nano.training.batches import (
    IGNORED,
    base_batch,
    cells_of,
    token_tensors,
    touched_tensor,
)
from reference.nano.training.wanted import meant_by, touched_loss
from reference.nano.world.edits import Edit
from reference.nano.world.world import COLORS, PLACES, RADII, SHAPES, Look, Scene, Thing


def test_cells_tell_what_has_its_centre_there() -> None:
    scene = Scene("blue", (Thing(Look("star", "red", "large"), x=36.0, y=8.0, radius=11.0, angle=0.0),))
    classes, offsets = cells_of(scene)
    assert classes[2] == [4, 0, 1, list(COLORS).index("blue")] and offsets[2] == [
        -0.5,
        0.0,
    ]  # row 0, column 2
    assert all(
        c == [0, IGNORED, IGNORED, list(COLORS).index("blue")] for i, c in enumerate(classes) if i != 2
    )


def test_tokens_tell_which_thing_reaches_them() -> None:
    """A large star covers columns 2 to 5,
    a small circle the corner below; where both reach, the nearer counts."""
    scene = Scene(
        "blue",
        (
            Thing(Look("star", "red", "large"), x=32.0, y=32.0, radius=11.0, angle=0.0),
            Thing(Look("circle", "white", "small"), x=52.0, y=52.0, radius=7.0, angle=0.0),
        ),
    )
    told = token_tensors([Scene("green", ()), scene])
    classes, offsets = told["classes"].view(2, 8, 8, 4), told["offsets"].view(2, 8, 8, 2)
    assert (
        classes[0] == torch.tensor([0, IGNORED, IGNORED, list(COLORS).index("green")])
    ).all() and not offsets[0].any()
    assert (classes[1, ..., 3] == list(COLORS).index("blue")).all()
    shape = classes[1, ..., 0]
    assert (
        (shape[3:5, 2:6] == 4).all() and (shape[2:6, 3:5] == 4).all() and shape[2, 2] == 0
    )  # the corner is 17 pixels away, 11 + 3 reach
    assert (shape[6, 5:8] == 1).all() and not shape[:2].any() and not shape[:, :2].any()
    assert classes[1, 6, 6].tolist() == [1, list(COLORS).index("white"), 0, list(COLORS).index("blue")]
    assert offsets[1, 3, 5].tolist() == [-1.5, 0.5] and offsets[1, 6, 6].tolist() == [0.0, 0.0]
    assert not offsets[1][shape == 0].any()
    star, circle = scene.things
    shape = token_tensors([Scene("blue", (star, replace(circle, x=48.0, y=32.0)))])["classes"].view(8, 8, 4)[
        ..., 0
    ]
    assert shape[3].tolist() == [
        0,
        0,
        4,
        4,
        4,
        1,
        1,
        0,
    ]  # the fifth's centre is 1.6 pixels from the star and in the circle


def test_what_an_edit_means_is_told_as_numbers(nano_rows: Rows) -> None:
    star, circle = (
        Thing(Look(shape, color, size), x, 32.0, 7.0, 0.0)
        for shape, color, size, x in (("star", "red", "small", 12.0), ("circle", "blue", "large", 48.0))
    )
    scene, colors = Scene("white", (star, circle)), list(COLORS)
    green, cross = (
        replace(star, look=look) for look in (Look("star", "green", "small"), Look("cross", "red", "small"))
    )
    new = Thing(Look("square", "black", "large"), 50.0, 50.0, 11.0, 0.0)
    found = {
        edit.kind: (edit, meant_by(edit))
        for edit in (
            Edit("recolor", "", scene, Scene("white", (green, circle))),
            Edit("replace", "", scene, Scene("white", (cross, circle))),
            Edit("add", "", scene, Scene("white", (star, circle, new)), place="bottom right"),
            Edit("remove", "", scene, Scene("white", (circle,))),
            Edit("background", "", scene, Scene("black", (star, circle))),
        )
    }
    none, red_star = [len(SHAPES), len(colors), len(RADII)], [SHAPES.index("star"), colors.index("red"), 0]
    assert {kind: numbers[1:4] for kind, (_, numbers) in found.items()} == {
        "recolor": red_star,
        "replace": red_star,
        "add": none,
        "remove": red_star,
        "background": none,
    }
    assert {kind: numbers[4:] for kind, (_, numbers) in found.items()} == {
        "recolor": [SHAPES.index("star"), colors.index("green"), 0, len(PLACES)],
        "replace": [SHAPES.index("cross"), colors.index("red"), 0, len(PLACES)],
        "add": [
            SHAPES.index("square"),
            colors.index("black"),
            len(RADII),
            PLACES.index("bottom right"),
        ],  # nobody said how large
        "remove": [*none, len(PLACES)],
        "background": [len(SHAPES), colors.index("black"), len(RADII), len(PLACES)],
    }
    assert [numbers[0] for _, numbers in found.values()] == list(range(5))
    touched = touched_tensor([edit for edit, _ in found.values()]).view(5, 8, 8)
    assert touched[:, 3:5, :3].amin((1, 2)).tolist() == [1, 1, 0, 1, 0] and not touched[..., 4:].any()


def test_an_edit_is_right_about_what_it_touches_or_not() -> None:
    """Two of three tokens at which anything is; a row without its text does not count."""
    logits = torch.tensor([[5.0, -5.0, 5.0, 5.0], [-5.0, -5.0, -5.0, -5.0]])
    asked = {
        "touched": torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]),
        "given_classes": torch.tensor([[1, 2, 3, 0]] * 2)[..., None],
        "told": torch.tensor([True, False]),
    }
    loss, hit = touched_loss(logits, asked)
    assert float(hit) == pytest.approx(2 / 3) and float(loss) == pytest.approx(5 / 3, abs=0.02)


def test_processes_take_batches_of_one_kind(nano_rows: Rows) -> None:
    for step in range(8):
        kinds = {
            "before_things"
            in stage_image.mixed_batch(process * loop.OTHERS + step, rows=nano_rows, batch=4, stage="edit")
            for process in range(3)
        }
        assert kinds == {step % stage_image.DRAWN_EVERY != stage_image.DRAWN_EVERY - 1}
    assert not any(loop.OTHERS % every for every in (stage_image.DRAWN_EVERY, stage_reward.EDITED_EVERY))


def test_labels_are_the_answers_alone(nano_rows: Rows) -> None:
    batch = base_batch(5, rows=nano_rows, batch=8)
    for ids, labels in zip(batch["input_ids"], batch["labels"]):
        said = labels != IGNORED
        assert torch.equal(ids[1:][said[:-1]], labels[said])  # each predicted from the one before
        *answers, rest = " ".join(map(str, labels[said].tolist())).split(str(nano_rows.special.im_end))
        assert answers and not rest  # each ends with the mark
        assert all(f" {answer.strip()} " in " ".join(map(str, ids.tolist())) for answer in answers)
    assert (
        len(batch["things"]) == 7 and (batch["input_ids"][:7] == nano_rows.special.image_pad).sum() == 7 * 16
    )
