"""fp8 and nvfp4: the numbers of E4M3 and E2M1, and weights that are stored in them."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch

from star_export.graph.formats import FP8, INT8, NVFP4, codes_from_numbers, nearest_, numbers_from_codes
from tests.helpers.linear_graphs import random

NUMPY = {FP8: ml_dtypes.float8_e4m3fn, NVFP4: ml_dtypes.float4_e2m1fn}


@pytest.mark.parametrize("format", [FP8, NVFP4], ids=lambda format: format.name)
def test_numbers_are_rounded_to_the_nearest_ties_to_even_as_by_ml_dtypes(format):
    top, dtype = format.top, NUMPY[format]
    grid = np.unique(np.arange(1 << format.bits, dtype=np.uint8).view(dtype).astype(np.float32))
    grid = grid[np.isfinite(grid)]
    ties = (grid[1:] + grid[:-1]) / 2
    numbers = np.concatenate([np.linspace(-top, top, 50_001, dtype=np.float32), grid, ties])
    wanted = numbers.astype(dtype)
    got = nearest_(torch.from_numpy(numbers.copy()), format.code)
    np.testing.assert_array_equal(got.numpy(), wanted.astype(np.float32))
    codes = codes_from_numbers(got, format.code)
    np.testing.assert_array_equal(codes.numpy().view(np.uint8), wanted.view(np.uint8))
    assert torch.equal(numbers_from_codes(codes, format.code), got)


@pytest.mark.parametrize("format", [FP8, NVFP4], ids=lambda format: format.name)
def test_what_is_decoded_is_what_the_reference_is_given(format):
    weight = random(24, 160) * torch.logspace(-4, 2, 24)[:, None]
    weight[3], weight[4, 16:32] = 0, 0
    encoded, rounded = format.encode(weight, torch.bfloat16), format.rounded(weight, torch.bfloat16)
    assert torch.equal(encoded.decode(), rounded)
    assert not rounded[3].any() and not rounded[4, 16:32].any() and bool(rounded[4].any())
    assert not torch.equal(rounded, weight)


def test_a_weight_of_zeros_stays_zero():
    for format in (FP8, NVFP4):
        assert not format.rounded(torch.zeros(2, 32), torch.bfloat16).any()


def test_fp8_weights_are_within_half_a_step_of_their_own_size():
    weight = random(16, 256)
    encoded = FP8.encode(weight, torch.bfloat16)
    step = torch.maximum(weight.abs() * 2**-3, encoded.scales.float() * 2**-9)
    assert bool(((encoded.decode() - weight).abs() <= step / 2 * 1.01).all())


def test_int8_loses_less_than_fp8_of_which_no_other_scale_loses_less():
    weight = random(64, 512, seed=3)
    steps = weight.abs().amax(1, keepdim=True) / FP8.top

    def lost(rounded):
        return float((rounded - weight).norm() / weight.norm())

    def scaled(factor):
        step = (steps * factor).bfloat16().float()
        return nearest_((weight / step).clamp(-FP8.top, FP8.top), FP8.code) * step

    errors = [lost(scaled(2 ** (i / 8))) for i in range(8)]  # one octave: smaller scales clip
    assert errors[0] == lost(FP8.rounded(weight, torch.bfloat16))
    assert errors[0] < 1.002 * min(errors)
    assert errors[0] > 3 * lost(INT8.rounded(weight, torch.bfloat16))


def test_nvfp4_weights_are_exact_in_bfloat16():
    """The scale of the scales is a power of two: a code has 2 bits, a scale 4, and bfloat16 holds 8."""
    weight = random(32, 512, seed=1) * 0.02
    encoded = NVFP4.encode(weight, torch.bfloat16)
    decoded = encoded.decode()
    assert encoded.whole is not None and float(torch.frexp(encoded.whole.float())[0]) == 0.5
    assert torch.equal(decoded, decoded.bfloat16().float())
    assert bool(encoded.scales.float().isfinite().all())


def test_the_scales_of_nvfp4_are_searched():
    """Against the usual scale, a sixth of a block's largest number."""
    weight = random(64, 512, seed=2)
    plain = weight.unflatten(1, (-1, 16))
    whole = NVFP4.whole(weight)
    steps = (plain.abs().amax(-1, keepdim=True) / 6 / whole).to(torch.float8_e4m3fn).float() * whole
    usual = nearest_((plain / steps).clamp(-6, 6), NVFP4.code) * steps
    found = NVFP4.rounded(weight, torch.bfloat16)
    errors = [float((w - weight).norm() / weight.norm()) for w in (usual.flatten(1), found)]
    assert errors[0] == pytest.approx(0.0956, abs=0.001) and errors[1] == pytest.approx(0.0832, abs=0.001)


@pytest.mark.parametrize("features, block", [(512, 16), (48, 16), (40, None)])
def test_nvfp4_has_blocks_of_16(features, block):
    assert NVFP4.block(features) == block


def test_stored_bytes_are_those_of_codes_scales_and_their_scale():
    assert FP8.stored_bytes(24, 160, scale_bytes=2) == (24 * 160, 24 * 2)
    assert NVFP4.stored_bytes(24, 160, scale_bytes=2) == (24 * 80, 24 * 10, 2)
    assert ir.DataType.FLOAT4E2M1.bitwidth == NVFP4.bits == 4
