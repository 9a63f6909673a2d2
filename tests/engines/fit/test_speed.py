"""The limit counts what a step must read; measured shares are those of docs/figures.md."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from engines.bench import bytes_read
from engines.fit.sizes import Sizes
from engines.fit.speed import MEASURED, image_step_bytes, measured_on, times_at
from engines.runtime.star import Star
from engines.targets import TARGETS
from tests.engines.fit.test_memory import SIZES

FIGURES = (Path(__file__).parents[3] / "docs" / "figures.md").read_text()


def test_a_step_reads_what_the_benchmark_counts(mini_bundle: Path) -> None:
    with Star(mini_bundle) as star:
        loop = star.image_loop(num_images=1, length=32, tokens=star.model.image_tokens)
        read = sum(bytes_read(star, loop, name, 32) for name in ("base_ar", "stacked_ar", "image_head"))
        filled = 32 + star.model.image_tokens // 2
        assert image_step_bytes(star.loaded.sizes, rows=2, filled_tokens=filled) == read


def test_rows_of_the_image_table_count_for_neither(bundle_of) -> None:
    with Star(bundle_of("int4")) as star:
        loop, sizes = star.image_loop(num_images=1, length=8, tokens=2), star.loaded.sizes
        decoders = sizes.weights["base_ar"] + sizes.weights["stacked_ar"]
        head = bytes_read(star, loop, "image_head", 8)
        assert image_step_bytes(sizes, rows=0, filled_tokens=0) == decoders + head


def test_the_times_are_bytes_over_the_bandwidth() -> None:
    slow, fast = (times_at(SIZES, bandwidth, rows=2, prompt_tokens=64) for bandwidth in (1e9, 2e9))
    step = image_step_bytes(SIZES, rows=2, filled_tokens=64 + 8)
    assert slow.image_token_ms == pytest.approx(step / 1e6) and slow.image_token_ms == 2 * fast.image_token_ms
    assert slow.image_s == pytest.approx((16 * step + SIZES.weights["vq_decoder"]) / 1e9)
    wider = times_at(SIZES, 1e9, rows=8, prompt_tokens=64)
    assert wider.image_token_ms > slow.image_token_ms and wider.answer_token_ms == slow.answer_token_ms


def test_every_measured_share_is_a_figure_of_this_project_with_its_command() -> None:
    for entry in MEASURED:
        assert entry.command in FIGURES and f": {entry.share:.2f}" in FIGURES
        assert f"{entry.bandwidth_bytes_per_s / 1e12:.2f}" in FIGURES
        assert entry.device in TARGETS and 0 < entry.share <= 1


def test_a_share_holds_for_the_width_and_precision_that_were_measured() -> None:
    def of(width: int, precision: str) -> Sizes:
        return replace(SIZES, precision=precision, model=replace(SIZES.model, hidden_size=width))

    assert measured_on("h200", of(2048, "bf16")) is MEASURED[0]
    assert measured_on("h200", of(2048, "fp16")) is None
    assert measured_on("h200", of(256, "bf16")) is None
    assert measured_on("rtx-4090", of(2048, "bf16")) is None
