"""Weights in integers: codes are rounded to nearest, and stand for the weight within half a step."""

from __future__ import annotations

import pytest
import torch

from star_export.graph import formats
from star_export.graph.formats import INT4, INT8, Format, packed

INTEGERS = (INT8, INT4)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


@pytest.mark.parametrize("found", INTEGERS, ids=lambda f: f.name)
@pytest.mark.parametrize("shape", [(24, 128), (24, 32), (6, 8, 4, 4)], ids=str)
def test_codes_round_to_nearest_and_keep_within_half_a_step(found: Format, shape: tuple[int, ...]) -> None:
    weight = random(*shape)
    encoded = found.encode(weight, torch.float32)
    rows, features = weight.flatten(1).shape
    block = found.block(features)
    assert encoded.codes.dtype == torch.int8 and encoded.codes.shape == (rows, features)
    assert encoded.scales.shape == (rows, features // block)
    assert int(encoded.codes.abs().max()) == found.top == 2 ** (found.bits - 1) - 1
    step = encoded.scales.repeat_interleave(block, 1)
    assert bool(((encoded.decode() - weight.flatten(1)).abs() <= step / 2 * (1 + 1e-6)).all())


@pytest.mark.parametrize("found", INTEGERS, ids=lambda f: f.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_stored_is_what_the_reference_is_given(found: Format, dtype: torch.dtype) -> None:
    weight = random(10, 8, 4, 4)
    encoded = found.encode(weight, dtype)
    assert encoded.scales.dtype == dtype
    assert torch.equal(found.rounded(weight, dtype), encoded.decode().reshape(weight.shape))


def test_the_pieces_in_which_a_weight_is_quantised_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random(7, 64)
    whole = INT4.encode(weight, torch.bfloat16)
    monkeypatch.setattr(formats, "PIECE", 100)  # one row at a time
    pieces = INT4.encode(weight, torch.bfloat16)
    assert torch.equal(pieces.codes, whole.codes) and torch.equal(pieces.scales, whole.scales)
    assert torch.equal(INT4.rounded(weight, torch.bfloat16), whole.decode())


def test_a_weight_is_not_changed_by_being_quantised() -> None:
    weight = random(4, 64)
    before = weight.clone()
    INT8.encode(weight, torch.float32)
    INT8.rounded(weight, torch.float32)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("found", INTEGERS, ids=lambda f: f.name)
def test_zeros_stay_zero(found: Format) -> None:
    encoded = found.encode(torch.zeros(3, 64), torch.bfloat16)
    assert not encoded.codes.any() and not encoded.decode().any()


@pytest.mark.parametrize(
    ("found", "features", "block"),
    [(INT4, 256, 128), (INT4, 192, 64), (INT4, 160, 32), (INT4, 40, None), (INT8, 40, 40), (INT8, 256, 256)],
)
def test_a_block_is_the_largest_that_divides_a_row(found: Format, features: int, block: int | None) -> None:
    assert found.block(features) == block


@pytest.mark.parametrize("found", INTEGERS, ids=lambda f: f.name)
def test_the_stored_bytes_are_those_of_codes_and_scales(found: Format) -> None:
    encoded = found.encode(random(6, 256), torch.bfloat16)
    codes = packed(encoded.codes) if found.bits == 4 else encoded.codes.numpy()
    assert found.stored_bytes(6, 256, scale_bytes=2) == (codes.nbytes, encoded.scales.nbytes)


def test_two_codes_share_a_byte_the_first_in_the_lower_half() -> None:
    assert packed(torch.tensor([[1, -1], [-7, 7]], dtype=torch.int8)).tolist() == [0xF1, 0x79]
