"""Which images of a fixed set a painter draws id for id like another one from the same seeds.

A score says how good images are; this says how near two precisions or executors are. The ids of the fp32
reference for the small set are recorded beside its score. The full set tells rates of 60 and 70 % apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .score import SEED, items

PER_CATEGORY, FULL_PER_CATEGORY = 4, 50  # prompts


def prompts(*, full: bool = False) -> list[str]:
    """The fixed set."""
    return [item.text for item in items("generate", FULL_PER_CATEGORY if full else PER_CATEGORY)]


def drawn_ids(painter: Any, *, full: bool = False) -> np.ndarray:
    """The image ids int64 [n, T] that a painter draws for the fixed set, image i from seed SEED + i."""
    return np.asarray(painter.draw_ids(prompts(full=full), seed=SEED))


def first_differences(got: np.ndarray, wanted: np.ndarray) -> list[int | None]:
    """For each image, two of [n, T]: the first token whose ids differ, or None if all are equal."""
    differ = got != wanted
    return [int(row.argmax()) if row.any() else None for row in differ]


def line(first: Sequence[int | None]) -> str:
    """For example `22 of 24 images are fp32's id for id; the others differ from token 13, 40 on`."""
    others = sorted(token for token in first if token is not None)
    text = f"{len(first) - len(others)} of {len(first)} images are fp32's id for id"
    return f"{text}; the others differ from token {', '.join(map(str, others))} on" if others else text
