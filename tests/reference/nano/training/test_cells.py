"""Cells: which tokens of a scene stay the same, which are empty, and which scenes are bare."""

from __future__ import annotations

import torch

from reference.nano.training.cells import (
    empty_cells,
    same_cells,
    scenes_of,
    with_fewer_things,
)
from reference.nano.world.draw import arrays_from_scenes
from reference.nano.world.world import Look, Scene, Thing


def test_one_scene_of_a_batch_is_bare() -> None:
    """The decoder stage reads it with one background; without it,
    it would never learn to paint what an edit empties."""
    present = [scenes_of(step, batch=16)["things"][..., 0].any(1) for step in range(4)]
    assert all((~row).nonzero().tolist() == [[14]] for row in present)


def test_cells_tell_what_is_the_same_and_what_is_empty() -> None:
    """Of three things in corners some go; each covers tokens 0 to 1 of its corner."""
    look = Look("square", "red", "small")
    scene = Scene(
        "white", tuple(Thing(look, x, y, 7.0, 0.0) for x, y in ((9.0, 9.0), (55.0, 9.0), (9.0, 55.0)))
    )
    things, backgrounds = (torch.from_numpy(array) for array in arrays_from_scenes([scene] * 8))
    batch = {"things": things, "backgrounds": backgrounds}
    fewer = with_fewer_things(batch, 3)
    kept = fewer["things"][:, :3, 0] == 1
    same, empty = same_cells(batch, fewer), empty_cells(batch)
    assert same.shape == empty.shape == (8, 8, 8) and 0 < kept.float().mean() < 1
    corners = [
        [(r < 2 or r > 5) and (c < 2 or c > 5) and not (r > 5 and c > 5) for c in range(8)] for r in range(8)
    ]
    assert torch.equal(empty, 1 - torch.tensor(corners).float().expand(8, -1, -1))
    for corner, (row, column) in enumerate(((0, 0), (0, 7), (7, 0))):
        assert torch.equal(same[:, row, column] == 1, kept[:, corner])
    assert (same[:, 5:, 5:] == 1).all() and (same[:, 2:6, 2:6] == 1).all()
