"""The operations of a painting are those of the release's sizes, and a device's rate makes them seconds."""

from __future__ import annotations

import pytest

from engines.fit.arithmetic import paintings, row_operations
from engines.fit.sizes import Transformer
from engines.targets import TARGETS
from reference.diffusion.config import DiTConfig
from star_export.planner.source import transformer_of

RELEASE = DiTConfig(
    hidden_size=2304,
    num_layers=26,
    num_refiners=2,
    num_heads=24,
    num_kv_heads=8,
    intermediate_size=9216,
    caption_size=2304,
    latent_channels=16,
    vq_channels=512,
    patch_size=2,
    axes=(32, 32, 32),
    norm_eps=1e-5,
)


@pytest.mark.parametrize(("resolution", "teraflop"), [(512, 10.6), (1024, 54.1)])
def test_a_row_takes_what_the_specification_says(resolution: int, teraflop: float) -> None:
    """docs/star.md 1.6 counts a little more: what acts once per caption and step."""
    found = row_operations(transformer_of(RELEASE), resolution) / 1e12
    assert found == pytest.approx(teraflop, rel=0.03)


def test_a_painting_takes_the_rows_of_all_steps() -> None:
    found = {(p.task, p.resolution): p.operations / 1e15 for p in paintings(transformer_of(RELEASE), None)}
    for key, petaflop in {
        ("paint", 512): 1.28,
        ("paint", 1024): 6.5,
        ("repaint", 512): 2.1,
        ("repaint", 1024): 10.8,
    }.items():
        assert found[key] == pytest.approx(petaflop, rel=0.05)


def test_seconds_follow_from_the_devices_rate() -> None:
    for target in TARGETS.values():
        for painting in paintings(Transformer(64, 5, 315_392), target.operations_per_s):
            assert painting.seconds == pytest.approx(painting.operations / target.operations_per_s)
    assert all(painting.seconds is None for painting in paintings(Transformer(64, 5, 315_392), None))
    assert all(1e13 < target.operations_per_s < 2e15 for target in TARGETS.values())
