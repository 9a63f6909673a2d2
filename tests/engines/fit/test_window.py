"""The window that is taken by default: as wide as pays."""

from __future__ import annotations

from dataclasses import replace

from engines.fit.window import ON_GPU, TOKENS_PER_FORWARD, cpu_forward_s, window_for
from tests.engines.fit.test_memory import SIZES


def test_a_gpu_takes_the_widest() -> None:
    assert window_for(SIZES, rows=2, on_cpu=False) == ON_GPU == max(TOKENS_PER_FORWARD)


def test_a_cpu_takes_a_wide_one_only_of_a_small_model() -> None:
    """Where multiplying takes most of the time, W tokens take W times as long as one."""
    size = 2 * 10**9
    large = replace(
        SIZES,
        precision="int4",
        graphs=SIZES.graphs | {"base_ar/0": size},
        formats=SIZES.formats | {"base_ar/0": {"int4": size}},
    )
    assert window_for(SIZES, rows=2, on_cpu=True) > 4
    assert window_for(large, rows=2, on_cpu=True) == 1
    assert cpu_forward_s(large, 16, rows=2) > 4 * cpu_forward_s(large, 1, rows=2)


def test_more_tokens_per_forward_come_from_wider_windows_at_a_falling_rate() -> None:
    pairs = list(TOKENS_PER_FORWARD.items())
    for (narrow, few), (wide, many) in zip(pairs, pairs[1:]):
        assert few < many < wide and many / wide <= few / narrow


def test_the_time_of_a_forward_follows_the_formats_of_the_decoders() -> None:
    """The same bytes are more numbers in fewer bits; what the encoders store does not matter."""

    def seconds(decoder: str, encoder: str = "bf16") -> float:
        formats = {n: {decoder if "_ar" in n else encoder: s} for n, s in SIZES.graphs.items()}
        return cpu_forward_s(replace(SIZES, formats=formats), 16, rows=2)

    assert seconds("int4") > seconds("int8") > seconds("fp32")
    assert seconds("int8", "fp32") == seconds("int8")
