"""The official arrays of the diffusion decoder, and how closely something agrees with them."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import torch
from torch import Tensor

from .official import GOLDEN

FOLDER = GOLDEN / "diffusion"
CASES = {case["name"]: case for case in json.loads((FOLDER / "cases.json").read_text())}
LIMIT = 1e-5  # of the largest value, or of 1
SHARE = 1e-3  # of an image's values, which may differ by one level
SYSTEM_PROMPT = (
    "You are an assistant designed to generate superior images with the superior degree of image-text "
    "alignment based on textual prompts or user prompts. <Prompt Start> "
)


@cache
def arrays() -> dict[str, np.ndarray]:
    with np.load(FOLDER / "official.npz") as file:
        return dict(file)


def golden(name: str) -> Tensor:
    array = arrays()[name]
    return torch.from_numpy(array.astype(np.int64) if array.dtype == np.int32 else array)


def error(got: Tensor | np.ndarray, name: str) -> float:
    """The largest difference from the array `name`, in units of its largest value, or of 1."""
    found, expected = np.asarray(got), arrays()[name]
    assert found.shape == expected.shape, (name, found.shape, expected.shape)
    assert np.isfinite(found).all() and expected.std() > 0, name
    return float(np.abs(found.astype(np.float64) - expected).max() / max(1, np.abs(expected).max()))


def check_image(got: Tensor | np.ndarray, name: str) -> None:
    """Check that an image differs from the official one by at most one level, and in few values."""
    found, expected = np.asarray(got), arrays()[name]
    assert found.dtype == np.uint8 and found.shape == expected.shape, (name, found.dtype, found.shape)
    difference = np.abs(found.astype(int) - expected)
    share = float((difference > 0).mean())
    assert difference.max() <= 1 and share <= SHARE, (name, int(difference.max()), share)
