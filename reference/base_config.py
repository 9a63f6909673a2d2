"""The base model's `config.json` and `generation_config.json`, in every layout that transformers wrote.

4.49 leaves out what equals its defaults, 4.51 writes a flat `config.json`, 4.52 to 4.57 repeat the decoder's
keys under `text_config`, and 5.x has them only there. tests/reference/test_saved_layouts.py records what each
writes.

Sources: docs/star.md 1; transformers, models/qwen2_5_vl/configuration_qwen2_5_vl.py and
generation/configuration_utils.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .errors import CheckpointError
from .strict_json import Section, read_object

# Bounds of the sizes that multiply memory; the largest release has 36, 18944 and 152064.
MAX_LAYERS, MAX_SIZE, MAX_ROWS = 512, 1 << 17, 1 << 22

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
        *("model_type", "spatial_patch_size", "tokens_per_second"),
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


def base_from_json(path: Path) -> tuple[DecoderConfig, VisionConfig, int, bool]:
    """Qwen's config.json, flat (4.51) or nested (5.x) -> decoder, vision encoder, vocabulary rows, tied
    embeddings."""
    top = section_from_file(path)
    if "quantization_config" in top:
        raise quantised(top)
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


def quantised(top: Section) -> CheckpointError:
    """The error for a base model whose weights are quantised, with the name of the method."""
    stated = top.values["quantization_config"]
    method = stated.get("quant_method") if isinstance(stated, dict) else stated
    name = method.upper() if isinstance(method, str) else "an unnamed method"
    return CheckpointError(
        f"the base model is quantised with {name[:40]}",
        where=f"{top.source}: quantization_config: expected none (weights of 16 or 32 bits), got {name[:40]}",
        fix="use the base model that it was made from; `export --precision` quantises it",
    )


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
    """`vision_config`. Where a key is absent, it has the default with which 4.49 left it out."""
    vision = VisionConfig(
        depth=section.integer("depth", high=MAX_LAYERS, default=32),
        hidden_size=section.integer("hidden_size", high=MAX_SIZE, default=3584),
        intermediate_size=section.integer("intermediate_size", high=MAX_SIZE, default=3420),
        num_heads=section.integer("num_heads", high=1024, default=16),
        patch_size=section.integer("patch_size", high=256, default=14),
        temporal_patch_size=section.integer("temporal_patch_size", high=16, default=2),
        spatial_merge_size=section.integer("spatial_merge_size", high=16, default=2),
        window_size=section.integer("window_size", high=1 << 16, default=112),
        full_attention_blocks=section.integers(
            "fullatt_block_indexes", low=0, high=MAX_LAYERS, default=(7, 15, 23, 31)
        ),
        out_hidden_size=section.integer("out_hidden_size", high=MAX_SIZE, default=3584),
    )
    section.text("hidden_act", choices=("silu",), default="silu")
    for key in ("in_chans", "in_channels"):
        section.integer(key, low=3, high=3, default=3)
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
    """generation_config.json -> the ids that end an answer, the repetition penalty.

    transformers 4.x leaves out a penalty of 1, which is none.
    """
    section = section_from_file(path)
    listed = type(section.values.get("eos_token_id")) is list
    eos = (
        section.integers("eos_token_id", low=0, high=vocab_size - 1)
        if listed
        else (section.integer("eos_token_id", low=0, high=vocab_size - 1),)
    )
    written = 1.0 if "transformers_version" in section else None
    penalty = section.number("repetition_penalty", low=0.01, high=100.0, default=written)
    section.finish(unused=GENERATION_UNUSED)
    return eos, penalty


def section_from_file(path: Path) -> Section:
    return Section(read_object(path), source=path)


def expect_divides(section: Section, key: str, divisor: int, value: int, meaning: str) -> None:
    if value % divisor:
        raise section.refuse(key, f"a divisor of {meaning} ({value})", str(divisor))
