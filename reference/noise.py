"""Checkpoint files full of noise, in bounded memory: laid out first, with holes for numbers, then filled.

Every tensor is a function of its name and shape alone, so two runs write the same numbers.

Sources: the safetensors format (github.com/huggingface/safetensors, "Format"); torch.serialization
(`skip_data`, and the offsets that loading in FakeTensorMode gives).
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import statistics
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

PIECE = 1 << 16  # numbers written at once
ITEM_BYTES = 2  # bf16

Shapes = dict[str, tuple[int, ...]]


def bytes_of(shapes: Shapes) -> int:
    return ITEM_BYTES * sum(map(math.prod, shapes.values()))


def laid_out_safetensors(path: Path, shapes: Shapes) -> dict[str, int]:
    """Write a safetensors file whose tensors are holes; returns name -> offset of the first number."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        first, end = end, end + bytes_of({name: shape})
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [first, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return {name: 8 + len(text) + header[name]["data_offsets"][0] for name in shapes}


def laid_out_pt(path: Path, shapes: Shapes, *, key: str | None) -> dict[str, int]:
    """Write torch's file of a dictionary of tensors that are holes; returns name -> offset of the first
    number. `key` is the entry that holds the dictionary, if it is inside another one."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    # memory that nobody touches takes none
    tensors = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    with torch.serialization.skip_data():
        torch.save({key: tensors} if key else tensors, path)
    with FakeTensorMode():
        content = torch.load(path, weights_only=True)
    return {
        name: tensor.untyped_storage()._checkpoint_offset
        for name, tensor in (content[key] if key else content).items()
    }


def fill(
    path: Path, name: str, shapes: Shapes, offsets: dict[str, int], written: Callable[[str, int], None]
) -> None:
    """Write noise to the holes of a file; `written` is told `name` and the bytes of each piece."""
    with path.open("r+b") as file:
        for tensor, shape in shapes.items():
            file.seek(offsets[tensor])
            for piece in noise(tensor, shape):
                file.write(piece)
                written(name, piece.nbytes)


def noise(name: str, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """The numbers of a tensor, in pieces: normal noise of a realistic scale, as the bits of bf16 (uint16).

    Sixteen random bits choose a number from a table of the 65,536 quantiles of its distribution.
    """
    mean, deviation = 0.0, 1 / math.sqrt(math.prod(shape[1:]))
    if name.endswith("codebook_used"):
        deviation = 0.0
    elif name.endswith("bias"):
        deviation = 0.02
    elif len(shape) == 1:  # the gain of a norm
        mean, deviation = 1.0, 0.05
    elif name.endswith("quantize.embedding.weight"):
        deviation = 0.5
    elif name.endswith("embed_tokens.weight"):
        deviation = 0.03
    quantiles = (mean + deviation * standard_quantiles()).to(torch.bfloat16)
    table = quantiles.view(torch.int16).numpy().view(np.uint16)
    bits = np.random.SFC64(zlib.crc32(name.encode()))
    for left in range(math.prod(shape), 0, -PIECE):
        count = min(left, PIECE)
        yield table[bits.random_raw(-(-count // 4)).view(np.uint16)[:count]]


@functools.cache
def standard_quantiles() -> torch.Tensor:
    """The 65,536 quantiles of the normal distribution, in float64."""
    inverse = statistics.NormalDist().inv_cdf
    return torch.tensor([inverse((i + 0.5) / (1 << 16)) for i in range(1 << 16)], dtype=torch.float64)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a path to write; the file gets its name `path` if the block succeeds, and is removed if not."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
