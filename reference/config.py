"""The model's configuration, read strictly from a checkpoint's JSON files into frozen dataclasses.

`STAR-*.json` describes the trained parts and Qwen's `config.json` the base model; transformers 4.51 wrote the
latter flat, 5.x nests it under `text_config`. `generation_config.json` states how answers are decoded.
Unknown, missing, mistyped, duplicated and non-finite values are rejected with the path of their key. Sizes
have bounds, so that a wrong file cannot demand all memory.

Sources: docs/star.md 1; MM-MVR/STAR, star/configs/; transformers,
models/qwen2_5_vl/configuration_qwen2_5_vl.py.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

from .special import SpecialIds, special_ids_from_tokenizer
from .strict_json import Section, read_object

# Bounds of the sizes that multiply memory; the largest release has 36, 18944 and 152064.
MAX_LAYERS, MAX_SIZE, MAX_ROWS = 512, 1 << 17, 1 << 22

# Known keys that do not change what is computed here.
STAR_UNUSED = frozenset({"model_type", "torch_dtype", "dtype", "pixel_decoder"})
OUTPUT_HEAD_UNUSED = frozenset({"image_token_embed"})
LIBRARY_UNUSED = frozenset(
    (
        *("architectures", "torch_dtype", "dtype", "transformers_version", "_name_or_path"),
        *("output_hidden_states", "output_attentions", "return_dict", "chunk_size_feed_forward"),
        *("is_encoder_decoder", "id2label", "label2id", "problem_type", "_attn_implementation_autoset"),
    )
)
TEXT_UNUSED = LIBRARY_UNUSED | frozenset(
    (
        *("model_type", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id"),
        *("initializer_range", "max_window_layers", "sliding_window", "layer_types", "use_cache"),
        *("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"),
        *("vision_token_id",),
    )
)
VISION_UNUSED = LIBRARY_UNUSED | frozenset(
    (
        *("model_type", "in_chans", "in_channels", "spatial_patch_size", "tokens_per_second"),
        *("initializer_range", "rope_parameters"),
    )
)
GENERATION_UNUSED = frozenset(
    (
        *("bos_token_id", "pad_token_id", "do_sample", "temperature", "top_k", "top_p"),
        *("transformers_version", "_from_model_config"),
    )
)


@dataclass(frozen=True)
class DecoderConfig:
    """Geometry of one text decoder; `mrope_section` counts the half-dimensions that turn with time, height
    and width."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    max_positions: int


@dataclass(frozen=True)
class VisionConfig:
    """Geometry of the vision encoder; `patch_size` and `window_size` are in pixels."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    window_size: int
    full_attention_blocks: tuple[int, ...]
    out_hidden_size: int


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
    base model."""

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


def config_from_files(star_json: Path, qwen_folder: Path) -> StarConfig:
    """The model described by a release's JSON file and the folder of its base model.

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
    )


def section_from_file(path: Path) -> Section:
    return Section(read_object(path), source=path)


def expect_equal(section: Section, key: str, expected: int, meaning: str) -> None:
    """Check a size that is stated in two places."""
    if (value := section.integer(key, high=MAX_ROWS)) != expected:
        raise section.refuse(key, f"{expected} ({meaning})", str(value))


def expect_divides(section: Section, key: str, divisor: int, value: int, meaning: str) -> None:
    if value % divisor:
        raise section.refuse(key, f"a divisor of {meaning} ({value})", str(divisor))


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


def base_from_json(path: Path) -> tuple[DecoderConfig, VisionConfig, int, bool]:
    """Qwen's config.json, flat (4.51) or nested (5.x) -> decoder, vision encoder, vocabulary rows, tied
    embeddings."""
    top = section_from_file(path)
    top.text("model_type", choices=("qwen2_5_vl",))
    text, tied = top, None
    if "text_config" in top:
        text, tied = nested_text(top)
    decoder = decoder_from_section(text)
    vocab_size = text.integer("vocab_size", high=MAX_ROWS)
    tied = text.flag("tie_word_embeddings") if tied is None else tied
    vision_section = top.section("vision_config")
    vision = vision_from_section(vision_section)
    text.finish(unused=TEXT_UNUSED)
    top.finish(unused=TEXT_UNUSED)
    if vision.out_hidden_size != decoder.hidden_size:
        raise vision_section.refuse(
            "out_hidden_size",
            f"{decoder.hidden_size} (the decoder's hidden_size)",
            str(vision.out_hidden_size),
        )
    return decoder, vision, vocab_size, tied


def nested_text(top: Section) -> tuple[Section, bool]:
    """`text_config`, and whether the embeddings are tied. Keys given at both levels, as one 2025 version
    wrote them, must agree."""
    text = top.section("text_config")
    for key in sorted((text.values.keys() & top.values.keys()) - TEXT_UNUSED - {"tie_word_embeddings"}):
        top.taken.add(key)
        if top.values[key] != text.values[key]:
            raise top.refuse(key, "the value of text_config." + key, "another")
    tied = (text if "tie_word_embeddings" not in top else top).flag("tie_word_embeddings", default=False)
    text.taken.add("tie_word_embeddings")
    return text, tied


def decoder_from_section(text: Section) -> DecoderConfig:
    hidden_size = text.integer("hidden_size", high=MAX_SIZE)
    num_heads = text.integer("num_attention_heads", high=1024)
    num_kv_heads = text.integer("num_key_value_heads", high=1024)
    expect_divides(text, "num_attention_heads", num_heads, hidden_size, "hidden_size")
    expect_divides(text, "num_key_value_heads", num_kv_heads, num_heads, "num_attention_heads")
    head_dim = hidden_size // num_heads
    text.text("hidden_act", choices=("silu",))
    if text.flag("use_sliding_window", default=False):
        raise text.refuse("use_sliding_window", "false (sliding windows are not part of STAR)", "true")
    rope_theta, mrope_section = rope_from_section(text, head_dim=head_dim)
    return DecoderConfig(
        hidden_size=hidden_size,
        num_layers=text.integer("num_hidden_layers", high=MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=text.integer("intermediate_size", high=MAX_SIZE),
        rms_norm_eps=text.number("rms_norm_eps", low=1e-12, high=1e-2),
        rope_theta=rope_theta,
        mrope_section=mrope_section,
        max_positions=text.integer("max_position_embeddings", high=1 << 24),
    )


def rope_from_section(text: Section, *, head_dim: int) -> tuple[float, tuple[int, int, int]]:
    """Theta and the half-dimensions of each axis, from `rope_theta` and `rope_scaling` (4.51) or
    `rope_parameters` (5.x)."""
    rope = text.section("rope_parameters" if "rope_parameters" in text else "rope_scaling")
    theta = (rope if "rope_theta" in rope else text).number("rope_theta", low=1.0, high=1e12)
    for key in ("type", "rope_type"):
        if key in rope:
            rope.text(key, choices=("mrope", "default"))
    sections = rope.integers("mrope_section", low=0, high=head_dim, length=3)
    rope.finish()
    if 2 * sum(sections) != head_dim:
        raise rope.refuse(
            "mrope_section",
            f"a sum of {head_dim / 2:g} (half of the head dimension {head_dim})",
            str(sum(sections)),
        )
    return theta, sections


def vision_from_section(section: Section) -> VisionConfig:
    vision = VisionConfig(
        depth=section.integer("depth", high=MAX_LAYERS),
        hidden_size=section.integer("hidden_size", high=MAX_SIZE),
        intermediate_size=section.integer("intermediate_size", high=MAX_SIZE),
        num_heads=section.integer("num_heads", high=1024),
        patch_size=section.integer("patch_size", high=256),
        temporal_patch_size=section.integer("temporal_patch_size", high=16),
        spatial_merge_size=section.integer("spatial_merge_size", high=16),
        window_size=section.integer("window_size", high=1 << 16),
        full_attention_blocks=section.integers("fullatt_block_indexes", low=0, high=MAX_LAYERS),
        out_hidden_size=section.integer("out_hidden_size", high=MAX_SIZE),
    )
    section.text("hidden_act", choices=("silu",))
    section.finish(unused=VISION_UNUSED)
    expect_divides(
        section,
        "num_heads",
        4 * vision.num_heads,
        vision.hidden_size,
        "hidden_size, with 4 quarters per head,",
    )
    merged_patch = vision.patch_size * vision.spatial_merge_size
    expect_divides(
        section, "patch_size", merged_patch, vision.window_size, "window_size, times spatial_merge_size,"
    )
    if max(vision.full_attention_blocks) >= vision.depth:
        raise section.refuse(
            "fullatt_block_indexes",
            f"indices below depth {vision.depth}",
            str(max(vision.full_attention_blocks)),
        )
    return vision


def generation_from_json(path: Path, *, vocab_size: int) -> tuple[tuple[int, ...], float]:
    """generation_config.json -> the ids that end an answer, the repetition penalty."""
    section = section_from_file(path)
    listed = type(section.values.get("eos_token_id")) is list
    eos = (
        section.integers("eos_token_id", low=0, high=vocab_size - 1)
        if listed
        else (section.integer("eos_token_id", low=0, high=vocab_size - 1),)
    )
    penalty = section.number("repetition_penalty", low=0.01, high=100.0)
    section.finish(unused=GENERATION_UNUSED)
    return eos, penalty
