"""Several tokens per step: which tokens each forward is fed, and which of its draws are right.

This is Jacobi decoding (Song et al. 2021, "Accelerating feedforward computation via parallel nonlinear
equation solving"; Teng et al. 2024 for images) with noise that is fixed. A forward is fed the last known
token and W - 1 guesses, and draws the W tokens after them, each with its own noise. The first draw is right,
and each further one is if the token before it was guessed right. So every known token is what one token per
forward would have drawn, and only the number of forwards changes. A draw that is not known to be right is
the next guess.
"""

from __future__ import annotations

import numpy as np


class Windows:
    """The tokens of N images on their way, each at its own pace.

    `ids` int64 [N, T] holds what is known of each image, then guesses; `known` [N] counts the known ones. The
    next forward is fed the tokens `starts` [N] to `starts` + W - 1 of each image, and draws the ones after
    them. The last window lies within the image, so it is fed some known tokens again, which changes nothing.
    """

    def __init__(self, first: np.ndarray, *, tokens: int, window: int):
        self.images, self.tokens, self.window = len(first), tokens, min(window, tokens - 1)
        self.ids = np.repeat(first[:, None], tokens, axis=1)
        self.known = np.ones(self.images, np.int64)
        self.forwards = 0
        self._place()

    @property
    def done(self) -> bool:
        return bool((self.known >= self.tokens).all())

    def advance(self, drawn: np.ndarray | None) -> None:
        """Take the draws int64 [N, W] of a forward over; None, unseen, if W is 1."""
        self.forwards += 1
        if drawn is None:
            self.known += 1
        else:
            rows, at = np.arange(self.images)[:, None], self.starts[:, None] + 1 + np.arange(self.window)
            fed = self.ids[rows, at - 1]
            # The token fed at place j is what was drawn for it, or was known before.
            right = at - 1 < self.known[:, None]
            right[:, 1:] |= fed[:, 1:] == drawn[:, :-1]
            right = np.logical_and.accumulate(right, axis=1)
            self.ids[rows, at] = np.where(at < self.known[:, None], self.ids[rows, at], drawn)
            self.known = np.maximum(self.known, self.starts + 1 + right.sum(1))
            self._guess(self.starts + 1 + self.window)
        self._place()

    def fed(self) -> np.ndarray:
        """The ids int64 [N, W] that the next forward is fed."""
        return self.ids[np.arange(self.images)[:, None], self.starts[:, None] + np.arange(self.window)]

    def _place(self) -> None:
        self.starts = np.minimum(self.known, self.tokens - self.window) - 1

    def _guess(self, drawn: np.ndarray) -> None:
        """Guess the tokens from `drawn` [N] on, which were never drawn: the last one, repeated."""
        for ids, first in zip(self.ids, drawn):
            ids[first:] = ids[first - 1]
