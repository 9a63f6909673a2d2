"""Windows accept exactly what one token per forward would draw, for every model, window and pace."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from engines.runtime.windows import Windows

IDS = 7


def next_id(image: int, prefix: tuple[int, ...]) -> int:
    """A made-up model with its noise: any function of what was drawn before."""
    recent = prefix[-2:] if image % 2 else prefix[-1:]  # images whose guesses come true at another pace
    return hash((image, len(prefix) % 5, recent)) % IDS


def one_by_one(image: int, tokens: int) -> list[int]:
    ids: list[int] = []
    for _ in range(tokens):
        ids.append(next_id(image, tuple(ids)))
    return ids


def forward(windows: Windows) -> np.ndarray:
    """What a forward draws: at each place the token after what is in `ids`, known or guessed, up to there."""
    return np.array(
        [
            [next_id(image, tuple(ids[: start + 1 + j])) for j in range(windows.window)]
            for image, (ids, start) in enumerate(zip(windows.ids.tolist(), windows.starts.tolist()))
        ]
    )


@pytest.mark.parametrize(
    "images, tokens, window", list(itertools.product((1, 2, 5), (1, 2, 3, 17, 64), (1, 2, 3, 8, 16, 100)))
)
def test_the_ids_are_those_of_one_token_per_forward(images, tokens, window):
    wanted = np.array([one_by_one(image, tokens) for image in range(images)])
    windows = Windows(wanted[:, 0], tokens=tokens, window=window)
    known = windows.known.copy()
    while not windows.done:
        assert (windows.starts >= 0).all() and (windows.starts + windows.window < tokens).all()
        assert (windows.starts < windows.known).all()  # the first token fed is known
        for ids, count, right in zip(windows.ids, windows.known, wanted):
            np.testing.assert_array_equal(ids[:count], right[:count])
        np.testing.assert_array_equal(
            windows.fed(),
            [ids[start : start + windows.window] for ids, start in zip(windows.ids, windows.starts)],
        )
        windows.advance(forward(windows))
        assert (windows.known > known).all() or (known >= tokens).any()
        assert (windows.known >= known).all()
        known = windows.known.copy()
    np.testing.assert_array_equal(windows.ids, wanted)
    assert windows.forwards <= max(tokens - 1, 0)


def test_right_guesses_are_taken_all_at_once():
    """An image of one id is guessed right from the start."""
    windows = Windows(np.array([3]), tokens=17, window=8)
    windows.advance(np.full((1, 8), 3))
    assert windows.known.tolist() == [9] and windows.starts.tolist() == [8]
    windows.advance(np.full((1, 8), 3))
    assert windows.done and windows.forwards == 2


def test_a_known_token_stays_even_if_it_is_drawn_otherwise_again():
    """The last window is fed known tokens again; a kernel that rounds otherwise must not change them."""
    windows = Windows(np.array([0]), tokens=5, window=3)
    windows.advance(np.array([[1, 9, 9]]))  # 1 is right, and was guessed as 0
    windows.advance(np.array([[2, 3, 9]]))
    assert windows.known.tolist() == [3] and windows.starts.tolist() == [1]
    windows.advance(np.array([[8, 5, 6]]))  # token 2 is known to be 2, and its draw of 8 does not count
    assert windows.ids[0, :4].tolist() == [0, 1, 2, 5]


def test_images_go_at_their_own_pace():
    windows = Windows(np.array([1, 2]), tokens=9, window=4)
    windows.advance(np.array([[1, 1, 1, 1], [5, 6, 7, 8]]))
    assert windows.known.tolist() == [5, 2] and windows.starts.tolist() == [4, 1]


def test_without_draws_every_forward_knows_one_more():
    windows = Windows(np.zeros(2, np.int64), tokens=4, window=1)
    for known in (2, 3, 4):
        assert not windows.done
        windows.advance(None)
        assert windows.known.tolist() == [known, known]
    assert windows.done
