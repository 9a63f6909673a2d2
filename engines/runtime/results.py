"""What the tasks of a runtime give."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Images:
    """N drawn images: `image_ids` int64 [N, T] and `images` uint8 [N, R, R, 3].

    `answer` is the base model's answer that was drawn in place of the prompt, or None. `cut_tokens` counts
    the ids at the end of a painted image's prompt that the diffusion decoder cannot read.
    """

    image_ids: np.ndarray
    images: np.ndarray
    answer: str | None = None
    cut_tokens: int = 0


@dataclass(frozen=True)
class Answer:
    """The `text` of an answer and its token `ids` int64 [n], including the id that ended it."""

    text: str
    ids: np.ndarray
