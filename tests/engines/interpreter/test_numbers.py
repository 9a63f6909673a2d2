"""Number formats that numpy has not, against ml_dtypes: every code, and rounding of every kind of number."""

import ml_dtypes
import numpy as np
import pytest

from engines.interpreter.numbers import rounded, unpacked

TYPES = {
    "BF16": ml_dtypes.bfloat16,
    "FP8": ml_dtypes.float8_e4m3fn,
    "FP4": ml_dtypes.float4_e2m1fn,
    "E8M0": ml_dtypes.float8_e8m0fnu,
    "HALF": np.float16,
}


@pytest.mark.parametrize("kind", ["FP8", "E8M0"])
def test_every_code_of_a_byte_is_read(kind):
    codes = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(unpacked(codes, kind, 256), codes.view(TYPES[kind]).astype(np.float32))


def test_every_code_of_two_bytes_is_read():
    codes = np.arange(1 << 16).astype(np.uint16)
    for kind in ("BF16", "HALF"):
        np.testing.assert_array_equal(
            unpacked(codes.view(np.uint8), kind, codes.size), codes.view(TYPES[kind]).astype(np.float32)
        )


@pytest.mark.parametrize("count", [15, 16])
def test_two_numbers_of_four_bits_share_a_byte_first_the_lower(count):
    codes = np.arange(16, dtype=np.uint8)
    data = codes[0::2] | codes[1::2] << 4
    fp4 = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(unpacked(data, "FP4", count), fp4[:count])
    np.testing.assert_array_equal(
        unpacked(data, "INT4", count), [0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1][:count]
    )


@pytest.mark.parametrize("kind", ["HALF", "BF16", "FP8", "FP4"])
def test_rounding_is_to_the_nearest_and_to_even(kind):
    every = (
        np.arange(256 if kind != "FP4" else 16)
        .astype(np.uint8)
        .view(TYPES[kind] if kind in ("FP8", "FP4") else np.uint8)
    )
    if kind in ("HALF", "BF16"):
        every = np.arange(1 << 16).astype(np.uint16).view(TYPES[kind])
    numbers = np.unique(every.astype(np.float32)[np.isfinite(every.astype(np.float32))])
    middles = (numbers[1:].astype(np.float64) + numbers[:-1]) / 2  # each is a tie
    random = np.random.default_rng(0).standard_normal(20_000) * np.exp(
        np.random.default_rng(1).uniform(-20, 20, 20_000)
    )
    numbers = np.concatenate([numbers, middles, random, [0.0, -0.0]]).astype(np.float32)
    with np.errstate(over="ignore"):
        wanted = numbers.astype(TYPES[kind]).astype(np.float32)
    if kind in ("FP8", "FP4"):  # TensorRT saturates where ml_dtypes has NaN
        largest = {"FP8": 448, "FP4": 6}[kind]
        wanted = np.where(np.abs(numbers) > largest, np.sign(numbers) * np.float32(largest), wanted)
    got = rounded(numbers, kind)
    np.testing.assert_array_equal(got, wanted)
    assert (np.signbit(got) == np.signbit(wanted)).all() and got.dtype == np.float32


def test_nan_and_infinity_survive_rounding_to_16_bits():
    numbers = np.array([np.nan, np.inf, -np.inf, 3.4e38], np.float32)
    np.testing.assert_array_equal(
        rounded(numbers, "BF16"), numbers.astype(ml_dtypes.bfloat16).astype(np.float32)
    )
    np.testing.assert_array_equal(rounded(numbers, "HALF"), [np.nan, np.inf, -np.inf, np.inf])
