"""What numpy prepares for the diffusion decoder is what the official code prepared, and the reference's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engines.bundle.manifest import DiffusionSpec
from engines.errors import ParityError
from engines.inputs import latents
from reference.diffusion import tasks
from reference.diffusion.config import TIME_FEATURES
from reference.diffusion.dit import map_from_patches, patches_from_map, time_features
from reference.mini_tensors import tensor
from tests.helpers.official_diffusion import CASES, LIMIT, arrays, check_image, error

SPEC = DiffusionSpec(
    (4, 6, 6), 16, 16, 0.3611, 0.1159, 6.0, bos=2, hidden_size=64, blocks=5, token_weights=315_392
)
EDITS = [name for name, case in CASES.items() if case["task"] == "edit"]
TRACED = [name for name in CASES if f"{name}.trace.rope" in arrays()]


@pytest.mark.parametrize("name", [*CASES, "schedule40", "schedule50"])
def test_schedules_are_the_official_ones(name: str) -> None:
    count = len(arrays()[f"{name}.times"])
    exact, rounded = (latents.schedule(count, shift=6.0, sigmas_bf16=bf16) for bf16 in (False, True))
    assert exact.sigmas.dtype == exact.times.dtype == np.float32
    assert np.array_equal(exact.sigmas, arrays()[f"{name}.sigmas"])
    assert np.array_equal(rounded.sigmas, arrays()[f"{name}.sigmas_bf16"])
    assert error(rounded.times, f"{name}.times") <= 1e-7


@pytest.mark.parametrize("name", TRACED)
def test_angles_are_the_official_ones(name: str) -> None:
    lengths, side = arrays()[f"{name}.trace.caption_lengths"], CASES[name]["resolution"] // 16
    for row, length in enumerate(lengths.tolist()):
        table = np.stack(latents.rotary_cos_sin(SPEC.axes, caption_tokens=length, side=side), axis=-1)
        expected = arrays()[f"{name}.trace.rope"][row, : len(table)]
        assert np.abs(table - expected).max() <= LIMIT
        assert not arrays()[f"{name}.trace.rope"][row, len(table) :].any()


@pytest.mark.parametrize("time", [0.0, 0.1, 0.97])
def test_times_are_the_references(time: float) -> None:
    found = latents.time_features(time)
    assert found.shape == (1, TIME_FEATURES) and found.dtype == np.float32
    assert np.abs(found - time_features(time).numpy()).max() <= 1e-6


@pytest.mark.parametrize("name", [name for name in CASES if f"{name}.vq_map" in arrays()])
def test_vq_maps_are_the_official_ones(name: str) -> None:
    codebook = tensor("pixel_encoder.quantize.embedding.weight", (1024, 16))
    found = latents.vq_map(codebook[arrays()[f"{name}.codes"]], side=CASES[name]["resolution"] // 8)
    assert found.dtype == np.float32 and error(found, f"{name}.vq_map") <= LIMIT


def test_the_releases_codes_are_interpolated_as_torch_does() -> None:
    rows = tensor("pixel_encoder.quantize.embedding.weight", (1024, 512))[arrays()["release_vq.codes"]]
    grid = torch.from_numpy(rows.transpose(0, 2, 1).reshape(1, 512, 24, 24).copy())
    for side in (32, 64, 128):
        expected = torch.nn.functional.interpolate(grid, size=(side, side), mode="bilinear")
        assert np.abs(latents.vq_map(rows, side=side) - expected.numpy()).max() <= 1e-5


@pytest.mark.parametrize("name", EDITS)
def test_sources_are_the_official_ones(name: str) -> None:
    found = latents.source_from_image(arrays()[f"{name}.image"], resolution=CASES[name]["resolution"])
    assert found.dtype == np.float32 and error(found, f"{name}.source") <= LIMIT
    moments, noise = (arrays()[f"{name}.source_{what}"] for what in ("moments", "noise"))
    found = latents.latent_from_moments(moments, noise, SPEC)
    assert found.dtype == np.float32 and error(found, f"{name}.source_latent") <= LIMIT


def test_patches_are_the_references_and_lead_back() -> None:
    pixels = np.arange(2 * 3 * 6 * 6, dtype=np.float32).reshape(2, 3, 6, 6)
    patches = latents.patches_from_map(pixels)
    assert np.array_equal(patches, patches_from_map(torch.from_numpy(pixels)).numpy())
    assert np.array_equal(latents.map_from_patches(patches), pixels)
    assert np.array_equal(map_from_patches(torch.from_numpy(patches)).numpy(), pixels)


@pytest.mark.parametrize("name", [name for name in CASES if f"{name}.decoded" in arrays()])
def test_images_are_rounded_as_the_official_ones(name: str) -> None:
    check_image(latents.images_from_painted(arrays()[f"{name}.decoded"]), f"{name}.result")


def test_halves_are_rounded_to_even_as_in_the_reference() -> None:
    levels = np.array([0.5, 1.5, 2.5, 254.5], np.float32) / 255 * 2 - 1
    decoded = np.tile(levels, 3).reshape(1, 3, 2, 2).astype(np.float32)
    expected = tasks.images_from_decoded(torch.from_numpy(decoded)).numpy()
    assert np.array_equal(latents.images_from_painted(decoded), expected)


def test_an_image_that_is_not_finite_is_no_image() -> None:
    with pytest.raises(ParityError, match="non-finite"):
        latents.images_from_painted(np.full((1, 3, 8, 8), np.nan, np.float32))
