"""AWQ's scales are powers of two, which round nothing; they are 1 where others would not help."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from star_export.calibration.folding import channel_exponents
from star_export.calibration.gptq import error_of, feedback_of, quantised
from star_export.graph.formats import INT4, INT8, Format

FEATURES = 256


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moments_of(strength: Tensor) -> Tensor:
    inputs = random(1000, len(strength), seed=1) * strength
    return inputs.T @ inputs / len(inputs)


def strong_channels() -> Tensor:
    strength = torch.ones(FEATURES)
    strength[::40] = 30.0
    return strength


def lost(weight: Tensor, exponents: Tensor, moments: Tensor, found: Format) -> float:
    factors = exponents.float().exp2()
    change = weight - found.rounded(weight * factors, torch.bfloat16) / factors
    return float((change @ moments * change).sum())


@pytest.mark.parametrize("found", [INT8, INT4], ids=lambda f: f.name)
def test_channels_with_strong_inputs_are_scaled_up_and_less_is_lost(found: Format) -> None:
    weights, moments = [random(32, FEATURES), random(16, FEATURES, seed=2)], moments_of(strong_channels())
    exponents = channel_exponents(weights, feedback_of(moments).power, found, torch.bfloat16)
    assert exponents.dtype == torch.int64
    assert exponents[::40].min() > exponents[1::40].max()
    nothing = torch.zeros_like(exponents)
    for weight in weights:
        assert lost(weight, exponents, moments, found) < 0.7 * lost(weight, nothing, moments, found)


def test_equal_channels_are_not_scaled() -> None:
    assert not channel_exponents([random(32, FEATURES)], torch.ones(FEATURES), INT4, torch.bfloat16).any()


def test_where_no_scaling_helps_the_exponents_are_zero() -> None:
    """Weights that are codes already lose nothing; with scales of channels they would."""
    codes = torch.randint(-7, 8, (32, FEATURES), generator=torch.Generator().manual_seed(0)).float()
    codes[:, ::32] = 7  # the largest code is in every block
    power = feedback_of(moments_of(strong_channels())).power
    assert not channel_exponents([codes], power, INT4, torch.bfloat16).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_powers_of_two_leave_products_as_they_are_bit_for_bit(dtype: torch.dtype) -> None:
    weight, norm, x = (
        random(32, FEATURES),
        random(FEATURES, seed=3).to(dtype).float(),
        random(8, FEATURES, seed=4),
    )
    exponents = channel_exponents([weight], strong_channels().square(), INT4, torch.bfloat16)
    assert exponents.any()
    factors = exponents.float().exp2()
    folded = norm / factors
    assert torch.equal(folded.to(dtype).float(), folded), "the norm's weight is stored without rounding"
    assert torch.equal(x * folded * factors, x * norm)
    terms = (x * norm)[:, None] * weight, (x * folded)[:, None] * (weight * factors)
    assert torch.equal(*terms)


@pytest.mark.parametrize("found", [INT8, INT4], ids=lambda f: f.name)
def test_what_gptq_loses_is_less_with_the_exponents(found: Format) -> None:
    weight, moments = random(32, FEATURES), moments_of(strong_channels())
    feedback = feedback_of(moments)
    factors = channel_exponents([weight], feedback.power, found, torch.bfloat16).float().exp2()
    scaled = quantised(weight * factors, feedback.scaled(factors), found, torch.bfloat16)
    plain = quantised(weight, feedback, found, torch.bfloat16)
    lost = error_of(weight, scaled.decode() / factors, moments)
    assert lost < 0.9 * error_of(weight, plain.decode(), moments)
