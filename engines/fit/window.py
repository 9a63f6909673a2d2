"""How many tokens to draw per forward, where nobody says so: the window that should draw an image soonest.

A forward of W tokens takes fewer than W times as long as one of one token where reading weights and launching
work take most of it, and more forwards are saved the larger W is, up to a point. What STAR-Nano saves is
measured (`python -m tests.bench_windows`); a model with more ids to choose from saves less.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..bundle.manifest import component_of
from .memory import CPU_HELD
from .sizes import Sizes
from .speed import image_step_bytes

# Window -> tokens per forward, on STAR-Nano with its own sampling (docs/figures.md).
TOKENS_PER_FORWARD = {1: 1.0, 2: 1.67, 4: 2.56, 8: 3.99, 16: 5.11}
ON_GPU = 16  # on an H200, a forward of 16 tokens takes 1.03 to 1.07 times as long as one of one token
# A CPU's forward: the time to start its operators, to read the weights, and to multiply.
NUMBERS_PER_BYTE = {
    "fp32": 1 / 4,
    "bf16": 1 / 2,
    "fp16": 1 / 2,
    "int8": 1,
    "int4": 16 / 9,
    "fp8": 1,
    "nvfp4": 16 / 9,
}
CPU_START_S, CPU_READ_BYTES_PER_S, CPU_MULTIPLY_PER_S = 2e-3, 20e9, 100e9


def window_for(sizes: Sizes, *, rows: int, on_cpu: bool) -> int:
    """The window with the most tokens per second, of those in TOKENS_PER_FORWARD.

    It must pay even if a window gains half of what it gains with STAR-Nano.
    """
    if not on_cpu:
        return ON_GPU

    def tokens_per_s(window: int) -> float:
        return (1 + TOKENS_PER_FORWARD[window]) / 2 / cpu_forward_s(sizes, window, rows=rows)

    return max(TOKENS_PER_FORWARD, key=tokens_per_s)


def cpu_forward_s(sizes: Sizes, window: int, *, rows: int) -> float:
    """An estimate of a forward of `window` tokens in each row, in seconds."""
    read = image_step_bytes(sizes, rows=rows, filled_tokens=sizes.model.image_tokens // 2)
    numbers, held = (read * _mean(per_byte, sizes) for per_byte in (NUMBERS_PER_BYTE, CPU_HELD))
    return CPU_START_S + held / CPU_READ_BYTES_PER_S + 2 * numbers * rows * window / CPU_MULTIPLY_PER_S


def _mean(per_byte: Mapping[str, float], sizes: Sizes) -> float:
    """The mean of a number per byte of each format, over the weights of the decoders."""
    formats = [found for name, found in sizes.formats.items() if component_of(name) in sizes.model.cache]
    stored = sum(sum(found.values()) for found in formats)
    return sum(per_byte[name] * size for found in formats for name, size in found.items()) / stored
