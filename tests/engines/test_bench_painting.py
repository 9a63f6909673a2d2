"""The benchmark of paintings: what it counts, and what it measures of the miniature."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engines.bench_painting import BARE, bench_painting
from engines.errors import InputError
from engines.fit.arithmetic import row_operations
from engines.fit.sizes import Transformer
from engines.runtime.painting import Painting
from engines.runtime.star import Star
from star_export.cli.parser import main

NAMES = ["step", "text_encoder", "vae_decoder"]


def test_the_operations_of_a_row_grow_with_its_caption() -> None:
    transformer = Transformer(hidden_size=64, blocks=5, token_weights=1000)
    one, two = (row_operations(transformer, 64, caption_tokens=n) for n in (1, 2))
    assert one == 2 * 1000 * 33 + 4 * 33**2 * 64 * 5
    assert two == 2 * 1000 * 34 + 4 * 34**2 * 64 * 5
    assert row_operations(transformer, 64) == row_operations(transformer, 64, caption_tokens=64)


def test_a_painting_is_measured_by_step_and_as_a_whole(diffusion_bundle: Path) -> None:
    with Star(diffusion_bundle) as star:
        found = bench_painting(star, Painting(64, steps=3), repeats=2)
        length = star.captions.ids("a red circle")[0].shape[1]
        transformer = star.loaded.sizes.model.transformer
        more = bench_painting(star, Painting(128, steps=6), repeats=2)
    t, u = (row_operations(transformer, 64, caption_tokens=n) for n in (length, 1))
    assert found.step_operations == t + 2 * u and found.rows == 3
    assert [timing.name for timing in found.timings] == NAMES
    step = found.timings[0].ms / 1e3
    assert found.operations_per_s == pytest.approx(found.step_operations / step)
    assert found.seconds_per_image > 0 and more.step_operations > found.step_operations
    assert (found.limit_per_s, found.share) == (0, 0.0) and "CPU core" in found.device
    assert found.ratios[BARE] > 0


def test_without_guidance_a_step_has_one_row(diffusion_bundle: Path) -> None:
    with Star(diffusion_bundle) as star:
        found = bench_painting(star, Painting(64, steps=1, text_guidance=1.0), repeats=1)
    assert (found.rows, found.steps) == (1, 1)


def test_the_verb_measures_paintings(diffusion_bundle: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["bench", str(diffusion_bundle), "--decoder", "diffusion", "--resolution", "64", "--steps", "2"]
    assert main([*words, "--no-progress"]) == 0
    text = capsys.readouterr().out
    assert "a step of 3 rows" in text and "limit that is not known" in text and "in 2 steps" in text
    assert main([*words, "--no-progress", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["resolution"], data["steps"]) == (64, 2)
    assert [timing["name"] for timing in data["timings"]] == NAMES
    assert main([*words, "--window", "2"]) == 2
    assert "A painting has no window" in capsys.readouterr().err
    assert main(["bench", str(diffusion_bundle), "--steps", "2"]) == 2
    assert "diffusion decoder" in capsys.readouterr().err


def test_a_bundle_without_a_diffusion_decoder_is_told(mini_bundle: Path) -> None:
    with Star(mini_bundle) as star, pytest.raises(InputError, match="no diffusion decoder"):
        bench_painting(star, Painting(64))
