"""Stage `reward` draws as the model draws,
its losses are those of whole sequences, and what is better gains probability."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from unittest.mock import Mock

import pytest
import torch

from reference import tasks
from reference.nano.recipe import ATTEMPTS, IMAGE_TOKENS, REWARD_TOP_K, REWARD_TOP_P, STAGES
from reference.nano.training import stage_reward
from reference.nano.training.sequences import through
from reference.nano.training.stage_reward import (
    attempt_loss,
    attempts,
    evened,
    reward_batch,
    reward_job,
    rewards,
    sampled,
)
from reference.nano.world import edits, prompts
from reference.nano.world.draw import images_from_scenes
from reference.nano.world.prompts import Group, Request
from reference.nano.world.scorer import Found, Reading, read
from reference.nano.world.world import Look, Scene, Thing
from tests.helpers.small_star import overfit, small_star

CIRCLE, STAR = (
    Thing(Look("circle", "red", "large"), 16.0, 16.0, 10.0, 0.0),
    Thing(Look("star", "blue", "small"), 48.0, 48.0, 7.0, 0.0),
)


@pytest.mark.parametrize("step", [1, 0], ids=["drawings", "edits"])
def test_losses_are_those_of_whole_sequences(small_root: Path, step: int) -> None:
    """Attempts share their prompt's keys and values,
    are drawn by token, and their prompts end at different columns."""
    star, rows = small_star(small_root)
    batch, generator = reward_batch(step, rows=rows, count=3), torch.Generator().manual_seed(1)
    first, positions, embeds = batch["first"], batch["position_ids"], star.token_embedding(batch["input_ids"])
    assert ("before_things" in batch) == (step == 0) and len(set(first.tolist())) > 1
    given = torch.randint(0, 64, (3, IMAGE_TOKENS), generator=generator)
    with torch.no_grad():
        made = attempts(star, embeds[:, : int(first.max()) + 1], first, positions, given, generator)
        ids, kept, columns = made["ids"], made["kept"], first[:, None] + torch.arange(IMAGE_TOKENS)
        better = torch.randn(3, ATTEMPTS, generator=generator)
        drawn_loss, given_loss = attempt_loss(
            star.stacked_ar, star.image_head, made, first, positions, better
        )
        logits = []
        for group in range(3):
            row = embeds[group].expand(ATTEMPTS + 1, -1, -1).clone()
            row[:, columns[group, 1:]] = star.image_embedding(ids[group, :, :-1])
            places = positions[:, group : group + 1].expand(-1, ATTEMPTS + 1, -1)
            hidden = through(star.base_ar, row, places)[0][-1]
            torch.testing.assert_close(
                made["hidden"][group], hidden[:, columns[group, 1:]], rtol=1e-4, atol=1e-5
            )
            logits.append(star.image_head(through(star.stacked_ar, hidden, places)[0][-1][:, columns[group]]))
        logits = torch.stack(logits)  # [3, A + 1, T, K]
    filtered = tasks.filtered_probabilities(logits[:, :-1].flatten(0, 2), REWARD_TOP_K, REWARD_TOP_P).view(
        *kept.shape[:3], -1
    )
    allowed = torch.nn.functional.one_hot(kept + 1, 65).sum(-2)[..., 1:] > 0  # -1 is none
    assert (
        allowed == (filtered > 0)
    ).float().mean() > 0.9999  # of nearly equal ids at the edge either may be in
    log_shares = (
        logits[:, :-1]
        .masked_fill(~allowed, -math.inf)
        .log_softmax(-1)
        .gather(-1, ids[:, :-1, :, None])[..., 0]
    )
    torch.testing.assert_close(drawn_loss, -(log_shares * better[..., None]).mean(), rtol=1e-4, atol=1e-6)
    expected = torch.nn.functional.cross_entropy(logits[:, -1].flatten(0, 1), given.flatten())
    torch.testing.assert_close(given_loss, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(ids[:, -1], given) and len({tuple(row) for row in ids[0, :-1].tolist()}) == ATTEMPTS


def test_ids_are_drawn_by_the_filters_of_the_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(1, 300, generator=generator)
    drawn, kept = sampled(logits.expand(20_000, -1), generator)
    shares = tasks.filtered_probabilities(logits, REWARD_TOP_K, REWARD_TOP_P)[0]
    assert set(kept[0][kept[0] >= 0].tolist()) == set(shares.nonzero()[:, 0].tolist()) and (kept[0] < 0).any()
    counts = torch.bincount(drawn, minlength=300) / len(drawn)
    assert (counts - shares).abs().max() < 0.015 and not counts[shares == 0].any()


def test_rewards_tell_what_of_a_image_is_good() -> None:
    """Four kinds of images for a prompt: right,
    one thing of the wrong colour, one thing missing, and nothing at all."""
    request = Request((Group(1, "circle", "red"), Group(1, "star")))
    green = Thing(Look("circle", "green", "large"), 16.0, 16.0, 10.0, 0.0)
    scenes = [Scene("white", things) for things in ((CIRCLE, STAR), (green, STAR), (STAR,), ())]
    images = list(images_from_scenes(scenes, seed=1)) * 2
    assert len(images) == ATTEMPTS
    reward, right = rewards(images, [partial(prompts.check, request)])
    with multiprocessing.Pool(2) as pool:
        elsewhere = Mock(wraps=pool.map)
        shared = rewards(images, [partial(prompts.check, request)], elsewhere)
    elsewhere.assert_called_once()
    assert torch.equal(reward, shared[0]) and torch.equal(right, shared[1])
    assert (
        right.tolist() == [[1, 0, 0, 0] * 2]
        and reward[0, 0] == 1
        and 0.5 > reward[0, 1] > reward[0, 2] >= reward[0, 3] > 0
    )


def test_rewards_are_evened_within_their_group() -> None:
    found = evened(torch.tensor([[0.0, 1.0], [5.0, 5.0]]))
    torch.testing.assert_close(found, torch.tensor([[-1.0, 1.0], [0.0, 0.0]]) * math.sqrt(2))
    assert not evened(torch.ones(2, 3)).any()


def test_what_is_better_becomes_more_probable(small_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A judge likes ids below 32, of 64: soon nearly all are,
    and nothing but the stack and the head has moved."""
    star, rows = small_star(small_root)
    before = {name: tensor.clone() for name, tensor in star.state_dict().items()}
    seen = []

    def liked(images: list, judges: list, each: Callable) -> tuple[torch.Tensor, ...]:
        low = (seen.pop() < 32).float()
        return low.mean(-1), low.mean(-1)

    def attempts_seen(*args) -> dict:
        made = attempts(*args)
        seen.append(made["ids"][:, :ATTEMPTS])
        return made

    monkeypatch.setattr(stage_reward, "rewards", liked)
    monkeypatch.setattr(stage_reward, "attempts", attempts_seen)
    monkeypatch.setattr(stage_reward, "GIVEN_WEIGHT", 0.0)
    job = reward_job(star, rows, STAGES["reward"])
    found = overfit(job, [reward_batch(step, rows=rows, count=1) for step in range(2)], steps=16, rate=3e-3)
    assert 0.3 < found[0]["reward"] < 0.7 and min(losses["reward"] for losses in found[-3:]) > 0.9
    assert "edited" in found[0] and "drawn" in found[1]
    moved = {
        name.split(".")[0]
        for name, tensor in star.state_dict().items()
        if not torch.equal(tensor, before[name])
    }
    assert moved == {"stacked_ar", "image_head"}


def test_a_batch_that_breaks_groups_is_refused(small_root: Path) -> None:
    star, rows = small_star(small_root)
    with pytest.raises(
        ValueError, match=r"stage reward: the 12 samples .* multiple of 8 attempts .* fewer processes"
    ):
        reward_job(star, rows, replace(STAGES["reward"], batch=12))


def test_an_added_thing_may_be_anywhere_in_its_corner() -> None:
    """It may have any size that was not asked for, but lies in that corner, and nothing else is new."""

    def adding(**said) -> edits.Edit:
        return edits.Edit("add", "", Scene("white", (CIRCLE,)), Scene("white", (CIRCLE, STAR)), **said)

    def found(look: Look, x: float, y: float) -> Found:
        return Found(look.shape, look.color, look.size, x, y, 200.0, 0.95)

    old, small, large = (
        found(CIRCLE.look, 16.0, 16.0),
        Look("star", "blue", "small"),
        Look("star", "blue", "large"),
    )
    for look, x, y, said, good in (
        (small, 35.0, 54.0, {"place": "bottom right"}, True),
        (large, 40.0, 54.0, {"place": "bottom right"}, True),
        (small, 40.0, 54.0, {"place": "bottom left"}, False),
        (small, 33.0, 54.0, {"place": "bottom right"}, False),
        (large, 40.0, 54.0, {"size": "small"}, False),
        (small, 40.0, 54.0, {"size": "small"}, True),
        (small, 33.0, 54.0, {}, True),
        (Look("star", "green", "small"), 48.0, 48.0, {}, False),
    ):
        demands = edits.check(adding(**said), Reading("white", (old, found(look, x, y))))
        assert demands == {"done": good, "rest unchanged": good}, (look, x, y, said)
    more = Reading("white", (old, found(small, 40.0, 54.0), found(small, 54.0, 10.0)))
    assert edits.check(adding(), more) == {"done": True, "rest unchanged": False}
    random = Random(4)
    for kind in edits.KINDS:
        for _ in range(8):
            edit = edits.random_edit(random, kind, test=True)
            assert all(edits.check(edit, read(images_from_scenes([edit.after], seed=3)[0])).values())
