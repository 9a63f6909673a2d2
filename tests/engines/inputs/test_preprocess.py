"""What the encoders are given is what the official preparation gives them."""

import numpy as np
import pytest
import torch

from engines.bundle.bfloat16 import bf16_rounded
from engines.errors import InputError, ParityError, UsageError
from engines.inputs import preprocess
from engines.inputs.preprocess import (
    ask_inputs,
    check_pixel_limits,
    edit_inputs,
    images_from_decoded,
    patch_coordinates,
    rotary_angles,
    rotary_cos_sin,
    smart_size,
    vision_inputs,
)
from reference import vision as reference
from reference.config import VisionConfig
from tests.helpers.tiny_bundle import MODEL, VISION

LIMITS = {"min_pixels": 28 * 28 * 4, "max_pixels": 28 * 28 * 16}


def reference_config(vision):
    return VisionConfig(
        depth=1,
        hidden_size=vision.head_dim,
        intermediate_size=4,
        num_heads=1,
        patch_size=14,
        temporal_patch_size=2,
        spatial_merge_size=2,
        window_size=vision.window_size,
        full_attention_blocks=(0,),
        out_hidden_size=4,
    )


@pytest.mark.parametrize("name", ["und0", "und1"])
def test_ask_gives_the_official_pixels(official, name):
    got = ask_inputs(official[f"{name}.image"], MODEL, **LIMITS)
    np.testing.assert_array_equal(got.pixel_values, official[f"{name}.pixel_values"])
    assert [1, got.grid_h * 2, got.grid_w * 2] == official[f"{name}.grid_thw"][0].tolist()


@pytest.mark.parametrize("name", ["edit0", "edit1"])
def test_edit_gives_the_official_pixels(official, name):
    got, square = edit_inputs(official[f"{name}.image"], MODEL, **LIMITS)
    np.testing.assert_array_equal(got.pixel_values, official[f"{name}.pixel_values"][0])
    assert [1, got.grid_h * 2, got.grid_w * 2] == official[f"{name}.grid_thw"][0].tolist()
    assert (
        square.shape == (1, 3, 64, 64)
        and square.dtype == np.float32
        and square.min() >= -1
        and square.max() <= 1
    )


def test_the_square_keeps_the_image(official):
    _, square = edit_inputs(official["vq0.image"], MODEL, **LIMITS)
    np.testing.assert_allclose(square[0].transpose(1, 2, 0), official["vq0.image"] / 127.5 - 1, atol=2e-7)


@pytest.mark.parametrize("head_dim", [16, 80])
@pytest.mark.parametrize("rope_bf16", [True, False])
@pytest.mark.parametrize("grid", [(2, 2), (4, 10), (12, 4), (48, 48), (2, 300)])
def test_angles_and_windows_are_the_references(head_dim, rope_bf16, grid):
    from dataclasses import replace

    vision = replace(VISION, head_dim=head_dim)
    config = reference_config(vision)
    rows, columns = patch_coordinates(vision, grid_h=grid[0], grid_w=grid[1])
    expected = reference.rotary_angles(config, grid_h=grid[0], grid_w=grid[1], rope_bf16=rope_bf16).numpy()
    np.testing.assert_allclose(
        rotary_angles(vision, rows, columns, rope_bf16=rope_bf16), expected, rtol=0 if rope_bf16 else 3e-7
    )
    both = reference.rotary_cos_sin(config, grid_h=grid[0], grid_w=grid[1], rope_bf16=rope_bf16)
    for got, expected in zip(rotary_cos_sin(vision, rows, columns, rope_bf16=rope_bf16), both):
        np.testing.assert_allclose(got, expected.numpy(), rtol=0, atol=0 if rope_bf16 else 3e-5)
    image = np.zeros((grid[0] * 14, grid[1] * 14, 3), np.uint8)
    if max(grid) < 200:
        got = vision_inputs(image, replace(MODEL, vision=vision), min_pixels=784, max_pixels=28 * 28 * 4096)
        np.testing.assert_array_equal(
            got.window_ids, reference.window_ids(config, grid_h=grid[0], grid_w=grid[1]).numpy()
        )
        assert (
            got.feeds().keys() == {"pixel_values", "rotary_cos", "rotary_sin", "window_ids"}
            and got.window_ids.dtype == np.int64
        )


def test_bf16_rounding_is_torchs():
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    x = bits.view(np.float32)
    x = np.concatenate(
        [x[np.isfinite(x) & (abs(x) < 3e38)], np.float32([0, -0.0, 1.00390625, 1.01171875])]
    )  # two ties
    np.testing.assert_array_equal(bf16_rounded(x), torch.tensor(x).bfloat16().float().numpy())
    assert bf16_rounded(x[0].reshape(())).shape == ()


@pytest.mark.parametrize(
    "size, expected",
    [((84, 112), (84, 112)), ((1, 28), (28, 308)), ((1000, 1000), (112, 112)), ((14, 14), (56, 56))],
)
def test_sizes_are_multiples_within_the_limits(size, expected):
    assert smart_size(*size, factor=28, **LIMITS) == expected


def test_sizes_are_those_of_transformers():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    for height, width in np.random.default_rng(0).integers(28, 3000, (300, 2)).tolist():
        limits = {"factor": 28, "min_pixels": 28 * 28 * 16, "max_pixels": 28 * 28 * 576}
        if max(height, width) <= 60 * min(height, width):
            assert smart_size(height, width, **limits) == smart_resize(height, width, **limits)


def test_a_thin_image_is_refused():
    with pytest.raises(InputError, match="200 to 1, got 804x4"):
        smart_size(4, 804, factor=28, **LIMITS)


def test_a_small_image_is_enlarged_for_edit():
    got, square = edit_inputs(
        np.full((7, 20, 3), 9, np.uint8), MODEL, **LIMITS
    )  # 28 x 80 before both encoders
    assert (got.grid_h, got.grid_w) == (2, 4) and square.shape == (1, 3, 64, 64)


@pytest.mark.parametrize("low, high", [(0, 784), (-1, 784), (1000, 999), (784, 783), (1, 0)])
def test_limits_that_cannot_be_met_are_refused(low, high):
    with pytest.raises(UsageError, match=f"got {low} and {high}"):
        check_pixel_limits(min_pixels=low, max_pixels=high, factor=28)


def test_decoded_images_are_clipped_and_truncated(official):
    image = np.array([-2, -1, 0, 0.999, 1, 2], np.float32).reshape(1, 1, 1, 6).repeat(3, 1)
    assert images_from_decoded(image)[0, 0, :, 0].tolist() == [0, 0, 127, 254, 255, 255]
    images = official["gen1.images"]
    expected = np.clip((images + 1) / 2 * 255, 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(images_from_decoded(images.transpose(0, 3, 1, 2)), expected)


def test_a_decoded_image_that_is_not_finite_is_refused():
    with pytest.raises(ParityError, match="got 1 that are not"):
        images_from_decoded(np.array([0, np.nan, 1], np.float32).reshape(1, 3, 1, 1))


@pytest.mark.parametrize("size", [(40, 30, 17, 11), (30, 40, 9, 20), (31, 29, 31, 10), (30, 30, 30, 30)])
def test_a_large_image_is_resized_in_strips_to_the_same(size, monkeypatch):
    height, width, *wanted = size
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    for name in ("BICUBIC", "BILINEAR"):
        whole = preprocess._resized(image, *wanted, name)
        with monkeypatch.context() as patch:
            patch.setattr(preprocess, "LARGE_PIXELS", 1)
            patch.setattr(preprocess, "STRIP_PIXELS", 100)
            strips = preprocess._resized(np.rot90(np.rot90(image, -1)), *wanted, name)
        assert np.abs(whole.astype(int) - strips).max() <= 1 and strips.shape == whole.shape
