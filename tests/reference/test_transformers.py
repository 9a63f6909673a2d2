"""A second oracle: transformers' own Qwen2.5-VL computes the same logits
and image embeddings from the base weights."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from reference import tasks, vision
from reference.model import Star
from reference.weights import CheckpointFiles, load_star
from tests.helpers.official import error

LIMIT = 1e-4  # of the standard deviation; measured: 1.3e-5
GRIDS = [(2, 2), (4, 6), (10, 6), (14, 18), (2, 26)]  # patches; the window is 4, so some windows are cut


@pytest.fixture(scope="module")
def qwen(mini_checkpoint: Path):
    from transformers import Qwen2_5_VLForConditionalGeneration

    folder = mini_checkpoint / "Qwen2.5-VL-mini"
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def pixels(grid_h: int, grid_w: int) -> torch.Tensor:
    return torch.randn(grid_h * grid_w, 1176, generator=torch.Generator().manual_seed(grid_h * grid_w))


def image_embeds(star: Star, grid_h: int, grid_w: int) -> torch.Tensor:
    config = star.config.vision
    rotary = vision.rotary_cos_sin(config, grid_h=grid_h, grid_w=grid_w, rope_bf16=False)
    return star.vision_encoder(
        pixels(grid_h, grid_w), *rotary, vision.window_ids(config, grid_h=grid_h, grid_w=grid_w)
    )


@torch.no_grad()
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_image_embeddings(star: Star, qwen, grid: tuple[int, int]) -> None:
    expected = qwen.model.visual(pixels(*grid), grid_thw=torch.tensor([[1, *grid]])).pooler_output
    assert error(image_embeds(star, *grid), expected) <= LIMIT


@torch.no_grad()
@pytest.mark.parametrize("grid", [None, (4, 6), (10, 6)], ids=str)
def test_text_logits(star: Star, qwen, grid: tuple[int, int] | None) -> None:
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, 151_000, (9,), generator=generator)
    extra, merged, embeds = {}, [], {}
    if grid:
        merged = [(grid[0] // 2, grid[1] // 2)]
        patches = torch.full((merged[0][0] * merged[0][1],), star.config.special.image_pad)
        start, end = (
            torch.tensor([i]) for i in (star.config.special.vision_start, star.config.special.vision_end)
        )
        ids = torch.cat([ids, start, patches, end, ids])
        extra = {
            "pixel_values": pixels(*grid),
            "image_grid_thw": torch.tensor([[1, *grid]]),
            "mm_token_type_ids": (ids == star.config.special.image_pad).long()[None],
        }
        embeds = {star.config.special.image_pad: image_embeds(star, *grid)}
    expected = qwen(
        input_ids=ids[None], attention_mask=torch.ones(1, len(ids), dtype=torch.int64), **extra
    ).logits
    cache = star.base_ar.new_cache(1, capacity_tokens=len(ids))
    mixed, positions = (
        tasks.prompt_embeds(star, ids[None], embeds),
        tasks.mrope_position_ids(ids, merged, star.config.special),
    )
    hidden = tasks.decode(star.base_ar, mixed, positions, 0, cache)
    assert error(star.text_head(hidden), expected) <= LIMIT


def test_a_base_model_saved_by_transformers_5_is_read(
    mini_files: CheckpointFiles, stars: dict[bool, Star], qwen, tmp_path: Path
) -> None:
    """The nested configuration, one weights file, and the names that the library writes."""
    qwen.save_pretrained(tmp_path)
    shutil.copy(mini_files.qwen_folder / "tokenizer.json", tmp_path)  # published beside it
    saved = load_star(dataclasses.replace(mini_files, qwen_folder=tmp_path))
    assert saved.config == stars[True].config
    assert all(
        torch.equal(tensor, stars[True].state_dict()[name]) for name, tensor in saved.state_dict().items()
    )
