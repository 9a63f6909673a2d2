"""The official arrays, and how closely something agrees with them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from reference.special import SpecialIds

SPECIAL = SpecialIds(
    im_start=151_644,
    im_end=151_645,
    vision_start=151_652,
    vision_end=151_653,
    vision_pad=151_654,
    image_pad=151_655,
    fim_pad=151_662,
)  # the release's
GOLDEN = Path(__file__).parents[1] / "golden"
CASES = {case["name"]: case for case in json.loads((GOLDEN / "cases.json").read_text())}
TEMPLATE = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
    "<|im_start|>assistant\n<|vision_start|>"
)


@cache
def arrays(rope_bf16: bool) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / ("official_bf16_rope.npz" if rope_bf16 else "official.npz")) as file:
        return dict(file)


def golden(rope_bf16: bool, name: str) -> Tensor:
    array = arrays(rope_bf16)[name]
    return torch.from_numpy(array.astype(np.int64) if array.dtype == np.int32 else array)


def names(task: str) -> list[str]:
    return [name for name, case in CASES.items() if case["task"] == task]


def error(got: Tensor, expected: Tensor) -> float:
    """Largest difference in units of the expected values' standard deviation; NaN where either has one."""
    assert got.shape == expected.shape and got.dtype == expected.dtype, (
        got.shape,
        expected.shape,
        got.dtype,
        expected.dtype,
    )
    assert expected.std() > 0
    return float((got - expected).abs().max() / expected.std())
