"""The loader expects exactly the tensors of the released files, by name and shape, on the meta device."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from reference.model import Star
from reference.names import aliases, expected_tensors, release_name
from tests.helpers.released import (
    SIZES,
    listed,
    nested_qwen_json,
    qwen_json,
    star_json,
    stored_shapes,
    without_set_aside,
    write_configs,
)


@pytest.mark.parametrize("size", SIZES)
def test_trained_and_vq_tensors_equal_the_released_lists(size: str, tmp_path: Path) -> None:
    expected = expected_tensors(write_configs(tmp_path, star_json(size), qwen_json(size)))
    assert stored_shapes(expected["trained"]) == without_set_aside(listed(f"star_keys_STAR-{size}.tsv"))
    assert stored_shapes(expected["vq"]) == without_set_aside(listed("star_keys_VQ-Model.tsv"))


@pytest.mark.parametrize(
    "size, tensors, parameters", [("3B", 824, 3_754_622_976), ("7B", 729, 8_292_166_656)]
)
def test_base_tensors_have_the_known_number_and_size(
    size: str, tensors: int, parameters: int, tmp_path: Path
) -> None:
    """docs/star.md 2.2 counts 825 for 3B with the tied head, which no file holds."""
    base = stored_shapes(expected_tensors(write_configs(tmp_path, star_json(size), qwen_json(size)))["base"])
    assert len(base) == tensors and sum(map(math.prod, base.values())) == parameters
    assert ("lm_head.weight" in base) == (size == "7B")
    assert base["visual.patch_embed.proj.weight"] == (1280, 3, 2, 14, 14)


@pytest.mark.parametrize("size, parameters", [("3B", 6_184_782_595), ("7B", 12_887_705_859)])
def test_the_model_has_the_known_size(size: str, parameters: int, tmp_path: Path) -> None:
    with torch.device("meta"):
        star = Star(write_configs(tmp_path, star_json(size), qwen_json(size)))
    assert sum(p.numel() for p in star.parameters()) == parameters
    assert star.config.vq.image_size == 384
    assert star.base_ar.rotary.inv_freq.is_meta and not star.constants()["base_ar.rotary.inv_freq"].is_meta


@pytest.mark.parametrize("size", SIZES)
def test_every_parameter_is_expected_once(size: str, tmp_path: Path) -> None:
    config = write_configs(tmp_path, star_json(size), qwen_json(size))
    ours = [name for part in expected_tensors(config).values() for name, _, _ in part.values()]
    with torch.device("meta"):
        assert sorted(ours + list(aliases(config))) == sorted(Star(config).state_dict())


def test_newer_names_become_the_releases() -> None:
    assert {name: release_name(name) for name in NEWER} == NEWER


NEWER = {
    "model.language_model.layers.3.mlp.up_proj.weight": "model.layers.3.mlp.up_proj.weight",
    "model.language_model.embed_tokens.weight": "model.embed_tokens.weight",
    "model.language_model.norm.weight": "model.norm.weight",
    "model.visual.merger.mlp.0.bias": "visual.merger.mlp.0.bias",
    "stacked_ar.model.language_model.layers.0.mlp.up_proj.weight": (
        "stacked_ar.model.layers.0.mlp.up_proj.weight"
    ),
    "stacked_ar.model.norm.weight": "stacked_ar.model.norm.weight",
    "model.layers.3.mlp.up_proj.weight": "model.layers.3.mlp.up_proj.weight",
    "visual.blocks.0.norm1.weight": "visual.blocks.0.norm1.weight",
    "lm_head.weight": "lm_head.weight",
}


@pytest.mark.parametrize("size", SIZES)
def test_nested_and_flat_layouts_describe_one_model(size: str, tmp_path: Path) -> None:
    flat = write_configs(tmp_path, star_json(size), qwen_json(size))
    assert write_configs(tmp_path, star_json(size), nested_qwen_json(qwen_json(size))) == flat


def test_the_table_of_sizes_is_read(tmp_path: Path) -> None:
    config = write_configs(tmp_path, star_json("7B"), qwen_json("7B"))
    assert (config.base_ar.num_layers, config.stacked_ar.num_layers, config.adapter_depth) == (28, 14, 4)
    assert (config.base_ar.head_dim, config.base_ar.mrope_section, config.base_ar.rope_theta) == (
        128,
        (16, 24, 24),
        1e6,
    )
    assert (config.eos_token_ids, config.repetition_penalty) == ((151645, 151643), 1.05)
    assert (config.vocab_size, config.tie_word_embeddings) == (152064, False)
    assert config.vision.full_attention_blocks == (7, 15, 23, 31)
