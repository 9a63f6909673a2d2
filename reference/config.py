"""The model's configuration, read strictly from a checkpoint's JSON files into frozen dataclasses.

`STAR-*.json` describes the trained parts; `base_config.py` reads the files of the base model. Unknown,
missing, mistyped, duplicated and non-finite values are rejected with the path of their key. Sizes have
bounds, so that a wrong file cannot demand all memory.

Sources: docs/star.md 1; MM-MVR/STAR, star/configs/.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

from .base_config import (
    MAX_LAYERS,
    MAX_ROWS,
    MAX_SIZE,
    DecoderConfig,
    VisionConfig,
    base_from_json,
    expect_divides,
    generation_from_json,
    section_from_file,
)
from .diffusion.config import DiffusionConfig, diffusion_from_folder
from .special import SpecialIds, special_ids_from_tokenizer
from .strict_json import Section

__all__ = ["DecoderConfig", "StarConfig", "VQConfig", "VisionConfig", "config_from_files"]

# Known keys that do not change what is computed here.
STAR_UNUSED = frozenset({"model_type", "torch_dtype", "dtype", "pixel_decoder"})
OUTPUT_HEAD_UNUSED = frozenset({"image_token_embed"})


@dataclass(frozen=True)
class VQConfig:
    """Geometry of the VQ model; its encoder has `res_blocks` blocks per level and its decoder one more."""

    ch: int
    ch_mult: tuple[int, ...]
    res_blocks: int
    z_channels: int
    num_heads: int
    codebook_size: int
    codebook_dim: int
    image_tokens: int

    @property
    def image_size(self) -> int:
        """Height and width of an image in pixels."""
        return math.isqrt(self.image_tokens) * 2 ** (len(self.ch_mult) - 1)


@dataclass(frozen=True)
class StarConfig:
    """The whole model. `eos_token_ids`, `repetition_penalty` and the `special` ids of prompts come from the
    base model. `diffusion` is None for a checkpoint that has no diffusion decoder, or is used without it."""

    name: str
    base_ar: DecoderConfig
    stacked_ar: DecoderConfig
    vision: VisionConfig
    vq: VQConfig
    adapter_depth: int
    vocab_size: int
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    repetition_penalty: float
    special: SpecialIds
    diffusion: DiffusionConfig | None = None


def config_from_files(star_json: Path, qwen_folder: Path, lumina_folder: Path | None = None) -> StarConfig:
    """The model described by a release's JSON file and the folder of its base model; with a diffusion decoder
    if there is a folder of Lumina-Image-2.0.

    Raises CheckpointError, naming the key, if the loader does not understand either file exactly or if the
    two disagree.
    """
    base_ar, vision, vocab_size, tied = base_from_json(qwen_folder / "config.json")
    eos_token_ids, repetition_penalty = generation_from_json(
        qwen_folder / "generation_config.json", vocab_size=vocab_size
    )

    star = section_from_file(star_json)
    name = star.text("model_name")
    language_model = star.section("language_model")
    language_model.text("model_name", choices=("Qwen2.5-VL",))
    language_model.finish(unused=frozenset({"model_path"}))
    vq = vq_from_section(star.section("pixel_encoder"))

    adapter = star.section("pixel_adapter")
    adapter.text("model_name", choices=("MLP_GELU",))
    adapter_depth = adapter.integer("depth", high=64)
    expect_equal(adapter, "input_dim", vq.codebook_dim, "pixel_encoder.n_embed")
    expect_equal(adapter, "n_embed", base_ar.hidden_size, "the base model's hidden_size")
    adapter.finish()

    stack = star.section("stacked_ar")
    stacked_ar = dataclasses.replace(base_ar, num_layers=stack.integer("num_layers", high=MAX_LAYERS))
    stack.finish()

    head = star.section("pixel_output_head")
    expect_equal(head, "image_token_size", vq.codebook_size, "pixel_encoder.image_token_size")
    expect_equal(head, "n_embed", base_ar.hidden_size, "the base model's hidden_size")
    head.finish(unused=OUTPUT_HEAD_UNUSED)
    star.finish(unused=STAR_UNUSED)
    return StarConfig(
        name=name,
        base_ar=base_ar,
        stacked_ar=stacked_ar,
        vision=vision,
        vq=vq,
        adapter_depth=adapter_depth,
        vocab_size=vocab_size,
        tie_word_embeddings=tied,
        eos_token_ids=eos_token_ids,
        repetition_penalty=repetition_penalty,
        special=special_ids_from_tokenizer(qwen_folder / "tokenizer.json", vocab_size=vocab_size),
        diffusion=diffusion_from_folder(lumina_folder, vq_channels=vq.codebook_dim)
        if lumina_folder
        else None,
    )


def expect_equal(section: Section, key: str, expected: int, meaning: str) -> None:
    """Check a size that is stated in two places."""
    if (value := section.integer(key, high=MAX_ROWS)) != expected:
        raise section.refuse(key, f"{expected} ({meaning})", str(value))


def vq_from_section(section: Section) -> VQConfig:
    """`pixel_encoder`. The release states only codebook and heads; the other sizes are constants in its
    code."""
    section.text("model_name", choices=("VQ_Model",))
    vq = VQConfig(
        ch=section.integer("ch", high=4096, default=256),
        ch_mult=section.integers("ch_mult", low=1, high=64) if "ch_mult" in section else (1, 2, 2, 4, 8),
        res_blocks=section.integer("res_blocks", high=64, default=2),
        z_channels=section.integer("z_channels", high=MAX_SIZE, default=512),
        num_heads=section.integer("num_heads", high=1024),
        codebook_size=section.integer("image_token_size", high=MAX_ROWS),
        codebook_dim=section.integer("n_embed", high=MAX_SIZE),
        image_tokens=section.integer("num_tokens", high=1 << 16),
    )
    section.finish(unused=frozenset({"model_path"}))
    expect_divides(
        section, "num_heads", vq.num_heads, vq.ch * vq.ch_mult[-1], "the channels of the lowest resolution"
    )
    if vq.ch % 32:
        raise section.refuse("ch", "a multiple of the 32 norm groups", str(vq.ch))
    if len(vq.ch_mult) > 8:
        raise section.refuse("ch_mult", "at most 8 levels", str(len(vq.ch_mult)))
    if math.isqrt(vq.image_tokens) ** 2 != vq.image_tokens:
        raise section.refuse("num_tokens", "a square number", str(vq.image_tokens))
    return vq
