"""GPTQ keeps products rather than numbers: by how much, when it may, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from star_export.calibration.gptq import (
    DAMPING,
    RATIOS,
    SingularError,
    best_scales,
    error_of,
    feedback_of,
    quantised,
    steps_of,
)
from star_export.graph.formats import FORMATS, FP8, INT4, INT8, NVFP4, Format, numbers_from_codes

ROWS, FEATURES = 24, 256


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated_moments(features: int = FEATURES) -> Tensor:
    """Second moments of inputs that share a few directions, with channels of very different strength."""
    strength = torch.linspace(-2, 2, features).exp()
    inputs = (
        random(2000, 16) @ random(16, features, seed=1) + 0.3 * random(2000, features, seed=2)
    ) * strength
    return inputs.T @ inputs / len(inputs)


@pytest.mark.parametrize("found", FORMATS.values(), ids=FORMATS)
def test_without_correlation_it_rounds_to_nearest_with_the_scales_that_were_searched(found: Format) -> None:
    weight, identity = random(ROWS, FEATURES), torch.eye(FEATURES)
    encoded = quantised(weight, feedback_of(identity), found, torch.float32)
    scales, whole = best_scales(weight, torch.ones(FEATURES), found, torch.float32)
    steps = steps_of(scales, whole, FEATURES)
    assert torch.equal(encoded.scales.float(), scales.float()) and encoded.code == found.code
    assert (encoded.whole is None) == (found.scale is None)
    assert torch.equal(encoded.decode(), found.nearest_(weight / steps) * steps)


@pytest.mark.parametrize(
    ("found", "share"),
    [(INT8, 0.6), (INT4, 0.6), (FP8, 0.6), (NVFP4, 0.6)],
    ids=lambda f: getattr(f, "name", ""),
)
def test_with_correlated_inputs_it_loses_clearly_less_than_rounding(found: Format, share: float) -> None:
    weight, moments = random(ROWS, FEATURES), correlated_moments()
    encoded = quantised(weight, feedback_of(moments), found, torch.bfloat16)
    numbers = numbers_from_codes(encoded.codes, found.code)
    assert found.bottom <= float(numbers.min()) and float(numbers.max()) == found.top
    assert encoded.scales.dtype == (torch.float8_e4m3fn if found.scale else torch.bfloat16)
    nearest = error_of(weight, found.rounded(weight, torch.bfloat16), moments)
    assert 0 < error_of(weight, encoded.decode(), moments) < share * nearest


def test_the_same_inputs_give_the_same_codes() -> None:
    weight, moments = random(ROWS, FEATURES), correlated_moments()
    first, second = (quantised(weight, feedback_of(moments), INT4, torch.bfloat16) for _ in range(2))
    assert torch.equal(first.codes, second.codes) and torch.equal(first.scales, second.scales)
    assert torch.equal(weight, random(ROWS, FEATURES)), "the weight that is given stays as it is"


def test_the_number_of_columns_at_once_changes_no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, moments = random(ROWS, 64), correlated_moments(64)
    codes = []
    for columns in (64, 24, 1):
        monkeypatch.setattr("star_export.calibration.gptq.COLUMNS", columns)
        codes.append(quantised(weight, feedback_of(moments), INT4, torch.float32).codes)
    differing = max(float((other != codes[0]).float().mean()) for other in codes[1:])
    assert differing < 0.01, "only the order of the sums differs"


def test_a_scale_clips_what_stands_out_if_that_helps_the_others() -> None:
    weight = random(1, 128)
    power = torch.ones(128)
    weight[0, 5], power[5] = 10.0, 1e-4  # a large number that hardly counts
    clipped, exact = (best_scales(weight, p, INT4, torch.float32)[0] for p in (power, torch.ones(128)))
    assert float(clipped) == pytest.approx(float(RATIOS[-1]) * 10 / INT4.top)
    assert float(exact) > float(clipped)


def test_dead_channels_and_zero_weights_cost_nothing_and_harm_nothing() -> None:
    weight, moments = random(ROWS, FEATURES), correlated_moments()
    dead = torch.arange(0, FEATURES, 3)
    moments[dead], moments[:, dead] = 0, 0
    encoded = quantised(weight, feedback_of(moments), INT4, torch.bfloat16)
    nearest = error_of(weight, INT4.rounded(weight, torch.bfloat16), moments)
    assert error_of(weight, encoded.decode(), moments) < nearest
    zeros = torch.zeros(ROWS, FEATURES)
    assert not quantised(zeros, feedback_of(moments), INT4, torch.bfloat16).codes.any()
    assert error_of(zeros, zeros, moments) == 0.0


def test_a_layer_whose_inputs_are_all_zero_is_rounded_to_nearest() -> None:
    weight, moments = random(ROWS, FEATURES), torch.zeros(FEATURES, FEATURES)
    encoded = quantised(weight, feedback_of(moments), INT8, torch.bfloat16)
    same = quantised(weight, feedback_of(torch.eye(FEATURES)), INT8, torch.bfloat16)
    assert torch.equal(encoded.codes, same.codes)
    assert error_of(weight, encoded.decode(), moments) == 0.0


@pytest.mark.parametrize("planted", [float("nan"), float("inf"), -1e6], ids=str)
def test_moments_without_an_inverse_are_refused(planted: float) -> None:
    moments = correlated_moments()
    moments[3, 3] = planted
    with pytest.raises(SingularError, match=r"positive definite moments, got \(256, 256\)"):
        feedback_of(moments)


def test_the_power_is_what_remains_of_a_columns_error() -> None:
    """The products' mean square is the sum over columns of power times the square of what was rounded off."""
    weight, moments = random(ROWS, FEATURES), correlated_moments()
    feedback, order = feedback_of(moments), moments.diagonal().argsort(descending=True, stable=True)
    encoded = quantised(weight, feedback, INT4, torch.float32)
    error = (weight - encoded.decode())[:, order]
    own = error + error @ feedback.shares  # an error of its own is what a column adds to those it takes over
    damped = moments + 0.01 * moments.diagonal().mean() * torch.eye(FEATURES)
    change = weight - encoded.decode()
    wanted = float((change @ damped * change).sum())
    assert float((own.square() * feedback.power[order]).sum()) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("found", [INT8, INT4], ids=lambda f: f.name)
def test_scales_follow_what_remains_of_errors_rather_than_the_strength_of_inputs(found: Format) -> None:
    """Strong inputs of a few directions: errors of the columns that are rounded first are taken back."""
    weight, moments = random(ROWS, FEATURES), correlated_moments()
    feedback = feedback_of(moments)
    ours = quantised(weight, feedback, found, torch.float32)
    theirs = quantised(weight, replace(feedback, power=moments.diagonal()), found, torch.float32)
    lost, wrong = (error_of(weight, stored.decode(), moments) for stored in (ours, theirs))
    assert lost < wrong


def test_the_smallest_code_is_used_where_it_makes_the_steps_smaller() -> None:
    weight = torch.zeros(1, 128)
    weight[0, :3] = torch.tensor([-8.0, 5.0, 3.0])
    encoded = quantised(weight, feedback_of(torch.eye(128)), INT4, torch.float32)
    assert encoded.codes[0, 0] == -8


def test_feedback_for_scaled_weights_gives_the_same_products() -> None:
    moments = correlated_moments()
    factors = torch.randint(-3, 4, (FEATURES,), generator=torch.Generator().manual_seed(0)).float().exp2()
    feedback = feedback_of(moments)
    scaled = feedback.scaled(factors)
    upper = torch.eye(FEATURES) + scaled.shares
    order = feedback.order
    found = (upper * scaled.power[order]) @ upper.T
    damped = moments + 0.01 * moments.diagonal().mean() * torch.eye(FEATURES)
    wanted = (damped / factors / factors[:, None])[order][:, order]
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * float(wanted.diagonal().mean()))


def test_what_is_solved_is_multiplied_by_the_inverse_of_the_damped_moments() -> None:
    moments, cross = correlated_moments(), random(ROWS, FEATURES)
    damped = moments + DAMPING * moments.diagonal().mean() * torch.eye(FEATURES)
    got = feedback_of(moments).solved(cross)
    torch.testing.assert_close(got @ damped, cross, rtol=0, atol=1e-3)
    assert float((got @ moments - cross).abs().max()) > 1e-2


@pytest.mark.parametrize("found", [INT8, FP8], ids=lambda f: f.name)
def test_a_row_with_one_scale_keeps_the_largest_one_where_it_loses_less(
    found: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, feedback = random(ROWS, FEATURES), feedback_of(correlated_moments())
    largest = (weight.abs().amax(1, keepdim=True) / found.top).bfloat16()
    bad = torch.arange(ROWS) % 2 == 0

    def searched(rows: Tensor, *_: object) -> tuple[Tensor, None]:
        good, _ = best_scales(rows, feedback.power, found, torch.bfloat16)
        return torch.where(bad[:, None], good / 64, good), None

    wanted = quantised(weight, feedback, found, torch.bfloat16)
    monkeypatch.setattr("star_export.calibration.gptq.best_scales", searched)
    got = quantised(weight, feedback, found, torch.bfloat16)
    assert torch.equal(got.scales[bad], largest[bad])  # not those that clip nearly everything
    assert torch.equal(got.scales[~bad], wanted.scales[~bad])
    assert torch.equal(got.codes[~bad], wanted.codes[~bad])
