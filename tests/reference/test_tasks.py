"""The sampler, the penalty, prompt rows and positions, on cases small enough to check by hand."""

from __future__ import annotations

import pytest
import torch

from reference import tasks
from reference.gumbel import gumbel_noise
from reference.model import Star
from tests.helpers.official import SPECIAL


def draw(logits: list[float], noise: list[float], *, top_k: int = 0, top_p: float = 1.0) -> int:
    return int(tasks.sample(torch.tensor([logits]), top_k=top_k, top_p=top_p, noise=torch.tensor([noise])))


def test_the_largest_sum_of_logit_and_noise_is_drawn() -> None:
    assert draw([1.0, 2.0, 3.0], [0.0, 1.5, 0.0]) == 1
    assert draw([1.0, 2.0, 3.0], [9.0, 1.5, 0.0], top_k=2) == 1  # 0 is not kept
    assert draw([0.0, 5.0, 4.0], [9.0, 0.0, 9.0], top_p=0.5) == 1  # 1 alone is kept


def test_ties_go_to_the_lower_id() -> None:
    assert draw([1.0, 2.0, 2.0], [0.0] * 3) == 1
    assert draw([1.0, 2.0, 2.0], [0.0] * 3, top_k=1) == 1


def test_top_k_keeps_what_ties_with_the_kth() -> None:
    kept = tasks.filtered_probabilities(torch.tensor([[3.0, 2.0, 2.0, 2.0, 1.0]]), 2, 1.0) > 0
    assert kept.tolist() == [[True, True, True, True, False]]


@pytest.mark.parametrize("top_p, kept", [(0.3, 1), (0.45, 1), (0.55, 2), (0.85, 3), (1.0, 4)])
def test_top_p_keeps_the_first_beyond_it(top_p: float, kept: int) -> None:
    probabilities = tasks.filtered_probabilities(torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log(), 0, top_p)
    assert int((probabilities > 0).sum()) == kept
    torch.testing.assert_close(probabilities.sum(), torch.tensor(1.0))


def test_top_p_follows_top_k() -> None:
    """Top-p's cumulative sum runs over what top-k kept: 0.5 of (0.5, 0.3) is 0.625, already beyond 0.6."""
    probabilities = tasks.filtered_probabilities(torch.tensor([[0.5, 0.3, 0.2]]).log(), 2, 0.6)
    assert (probabilities > 0).tolist() == [[True, False, False]]


def test_draws_have_the_filtered_distribution() -> None:
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(3)) * 2
    noise = gumbel_noise(range(20_000), 0, 40)
    ids = tasks.sample(logits.expand(20_000, -1), top_k=12, top_p=0.9, noise=noise)
    expected = tasks.filtered_probabilities(logits, 12, 0.9)[0]
    assert (ids.bincount(minlength=40) / 20_000 - expected).abs().max() < 0.01


def test_guidance_moves_from_unconditional() -> None:
    logits = torch.tensor([[1.0, 5.0], [2.0, 3.0], [0.0, 1.0], [0.0, -1.0]])
    assert tasks.guide(logits, 1.0).tolist() == [[1.0, 5.0], [0.0, 1.0]]
    assert tasks.guide(logits, 3.0).tolist() == [[-1.0, 9.0], [0.0, 5.0]]


def test_penalty_lowers_what_occurred_once_only() -> None:
    penalised = tasks.penalise_repetition(torch.tensor([2.0, -2.0, 4.0]), torch.tensor([0, 1, 0, 0]), 2.0)
    assert penalised.tolist() == [1.0, -4.0, 4.0]


def test_the_unconditional_row_keeps_first_and_last_four() -> None:
    rows = tasks.guidance_rows(
        torch.tensor([[10, 11, 12, 13, 14, 15, 16], [20, 21, 22, 23, 24, 25, 26]]), SPECIAL
    )
    pad = SPECIAL.fim_pad
    assert rows.tolist() == [
        [10, 11, 12, 13, 14, 15, 16],
        [10, pad, pad, 13, 14, 15, 16],
        [20, 21, 22, 23, 24, 25, 26],
        [20, pad, pad, 23, 24, 25, 26],
    ]


def test_edit_positions_of_the_release_example() -> None:
    """docs/star.md 3.6: a merged grid of 24x16 and 7 prompt ids give 992 ids,
    the last at 631; fed back: 632 to 1206."""
    rows = tasks.guidance_rows(torch.arange(14 + 7 + 6)[None], SPECIAL)
    ids = tasks.edit_ids(rows, SPECIAL, insert_at=14, newline=198, image_tokens=576, merged_patches=24 * 16)
    positions = tasks.mrope_position_ids(ids[0], [(24, 16)], SPECIAL, trailing=576)
    assert ids.shape == (2, 992) and torch.equal(ids[0, 14:-13], ids[1, 14:-13])
    assert positions[:, 0, 991].tolist() == [631] * 3 and positions[:, 0, 992].tolist() == [632] * 3
    assert positions[:, 0, 992 + 574].tolist() == [1206] * 3
    patches = positions[:, 0, 593 : 593 + 24 * 16]
    assert patches[0].unique().tolist() == [593]
    assert patches[1].tolist() == [593 + r for r in range(24) for _ in range(16)]
    assert patches[2].tolist() == [593 + c for _ in range(24) for c in range(16)]


@pytest.mark.parametrize("grid", [(1, 576), (576, 1), (1, 1)])
def test_edit_positions_of_extreme_images(grid: tuple[int, int]) -> None:
    ids = tasks.edit_ids(
        torch.arange(30)[None],
        SPECIAL,
        insert_at=14,
        newline=198,
        image_tokens=16,
        merged_patches=grid[0] * grid[1],
    )
    positions = tasks.mrope_position_ids(ids[0], [grid], SPECIAL)[:, 0]
    start = 14 + 1 + 16 + 1 + 1
    assert (
        positions[0, start] == start
        and positions[:, start + grid[0] * grid[1]].tolist() == [start + max(grid)] * 3
    )
    assert positions[:, -1].tolist() == [int(positions.max())] * 3


def test_an_answer_ends_with_the_end_token(star: Star) -> None:
    ids = torch.tensor([[5, 6, 7]])
    whole = tasks.answer(star, ids, tasks.mrope_position_ids(ids[0], [], SPECIAL), None, max_new_tokens=6)
    assert len(whole) == 6
    config = star.config
    try:
        star.config = type(config)(**{**vars(config), "eos_token_ids": (int(whole[2]),)})
        ended = tasks.answer(star, ids, tasks.mrope_position_ids(ids[0], [], SPECIAL), None, max_new_tokens=6)
    finally:
        star.config = config
    assert ended.tolist() == whole[:3].tolist()


def test_sampling_depends_on_the_noise_alone(star: Star) -> None:
    rows = tasks.guidance_rows(torch.arange(100, 112)[None].repeat(2, 1), SPECIAL)
    size = star.config.vq.codebook_size
    first, again, other = (
        tasks.generate(
            star,
            rows,
            guidance=2.0,
            top_k=50,
            top_p=0.9,
            noise=lambda step, seeds=seeds: gumbel_noise(seeds, step, size),
        ).image_ids
        for seeds in ((1, 2), (1, 2), (3, 4))
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])  # two images of one prompt draw apart
    short = tasks.generate(
        star,
        rows,
        guidance=2.0,
        top_k=50,
        top_p=0.9,
        noise=lambda step: gumbel_noise((1, 2), step, size),
        image_tokens=5,
    )
    assert torch.equal(short.image_ids, first[:, :5]) and short.image is None


def test_guidance_one_ignores_the_unconditional_row(star: Star) -> None:
    rows = tasks.guidance_rows(torch.arange(100, 112)[None], SPECIAL)
    other = rows.clone()
    other[1] = 7
    drawn = [
        tasks.generate(star, r, guidance=1.0, top_k=0, top_p=1.0, noise=None).image_ids for r in (rows, other)
    ]
    assert torch.equal(*drawn)
