"""A head that knows what a prompt wants is scored right, and only on rows that say it.

What is left to draw shrinks as things begin.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from reference.nano.recipe import IMAGE_TOKENS, TOKENS_SIDE
from reference.nano.training import wanted
from reference.nano.world.prompts import Group, Request
from reference.nano.world.world import COLORS, Look, Scene, Thing

TWO = Request((Group(1, "star", "red"), Group(1, "circle", size="small")), background="blue")
SCENE = Scene(
    "blue",
    (
        Thing(Look("star", "red", "large"), 40.0, 30.0, 11.0, 0.0),
        Thing(Look("circle", "white", "small"), 10.0, 12.0, 7.0, 0.0),
    ),
)


def perfect(asked: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """What heads that know everything say of rows."""
    things = F.one_hot(asked["kinds"], wanted.KINDS + 1)[..., :-1].float()  # [B, 4, KINDS]
    says = [
        things.sum(1),
        50 * F.one_hot(asked["background"], wanted.BACKGROUNDS).float(),
        50 * F.one_hot(asked["relation"], wanted.RELATED).float(),
    ]
    left = torch.stack(
        [(things * (asked["begins"] >= t).unsqueeze(-1)).sum(1) for t in range(IMAGE_TOKENS)], dim=1
    )
    return torch.cat(says, dim=-1).unsqueeze(1).expand(-1, IMAGE_TOKENS, -1), left


def test_things_begin_where_their_top_is_and_are_of_the_kind_that_was_named() -> None:
    asked = wanted.wanted_tensors([TWO], [SCENE], [True])
    star, circle = asked["begins"][0, :2].tolist()
    assert (star // TOKENS_SIDE, circle // TOKENS_SIDE) == (
        2,
        0,
    ) and star % TOKENS_SIDE == 4  # its tip is at (40, 16)
    assert len(set(asked["kinds"][0].tolist())) == 3 and asked["kinds"][0, 2:].tolist() == [wanted.KINDS] * 2
    assert (
        asked["background"].item() == list(COLORS).index("blue")
        and asked["relation"].item() == wanted.RELATED - 1
    )


def test_heads_that_know_lose_nothing_and_others_do() -> None:
    asked = wanted.wanted_tensors([TWO, wanted.request_of_scene(SCENE)], [SCENE, SCENE], [True, True])
    says, left = perfect(asked)
    assert left[0].sum(-1)[[0, -1]].tolist() == [2.0, 0.0]
    loss, right = wanted.wanted_loss(says, left, asked)
    assert float(loss) < 1e-6 and float(right) == 1.0
    loss, right = wanted.wanted_loss(says, left.flip(1), asked)
    assert float(loss) > 0.5 and float(right) < 0.9


def test_rows_without_their_prompt_are_not_asked() -> None:
    asked = wanted.wanted_tensors([TWO, TWO], [SCENE, SCENE], [True, False])
    says, left = perfect(asked)
    spoiled = torch.cat([left[:1], left[1:] + 9])
    assert float(wanted.wanted_loss(says, spoiled, asked)[0]) < 1e-6
    assert float(wanted.wanted_loss(says, left, asked | {"told": torch.tensor([False, False])})[0]) == 0.0
