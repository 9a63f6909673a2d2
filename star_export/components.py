"""THE TABLE: boundary, dynamic axes, wrapper and tolerances of each component; all that differs between them.

Axes: `N` images, `B` rows (2N under guidance), `S` new positions, `C` cache capacity, `P` vision patches.
Sizes that the model fixes come from its configuration. Float tensors cross a boundary in float32 in every
precision; only the caches have the compute type.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from engines.bundle.manifest import TensorSpec
from reference.config import DecoderConfig, StarConfig

TOP_K_LIMIT = 2048  # the candidates that `image_head` ranks; TensorRT's TopK accepts at most 3840
# Largest share of an image's ids, or a teacher-forced run's ids, that may differ; measured: 0.0625 in bf16.
FLIPPED_IDS = 0.25


@dataclass(frozen=True)
class Component:
    """One row of the table.

    `boundary(config, compute_type)` returns (inputs, outputs). `tolerances` bound each output's difference in
    units of the reference's standard deviation, or for ids the share that differs; `tolerances_16bit` replace
    them for an executor that computes in 16 bits. `quantized` says whether the linear weights take the int8
    and int4 formats.
    """

    wrapper: str
    boundary: Callable[[StarConfig, str], tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]]
    tolerances: dict[str, float]
    quantized: bool = False
    tolerances_16bit: dict[str, float] = field(default_factory=dict)


def f32(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name, "float32", shape)


def i64(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name, "int64", shape)


def _token_embedding(config: StarConfig, compute: str):
    return (i64("input_ids", "B", "S"),), (f32("inputs_embeds", "B", "S", config.base_ar.hidden_size),)


def _vision_encoder(config: StarConfig, compute: str):
    v = config.vision
    angles = v.hidden_size // v.num_heads // 2
    pixels = 3 * v.temporal_patch_size * v.patch_size**2
    return (
        (
            f32("pixel_values", "P", pixels),
            f32("rotary_cos", "P", angles),
            f32("rotary_sin", "P", angles),
            i64("window_ids", "P"),
        ),
        (f32("image_embeds", "P/4", v.out_hidden_size),),
    )


def _vq_encoder(config: StarConfig, compute: str):
    size, tokens = config.vq.image_size, config.vq.image_tokens
    return (
        (f32("image", "N", 3, size, size),),
        (i64("image_ids", "N", tokens), f32("inputs_embeds", "N", tokens, config.base_ar.hidden_size)),
    )


def _vq_decoder(config: StarConfig, compute: str):
    size, tokens = config.vq.image_size, config.vq.image_tokens
    return (i64("image_ids", "N", tokens),), (f32("image", "N", 3, size, size),)


def _decoder(decoder: DecoderConfig, compute: str):
    def caches(side: str):
        return tuple(
            TensorSpec(f"{side}.{i}.{part}", compute, ("B", decoder.num_kv_heads, "C", decoder.head_dim))
            for i in range(decoder.num_layers)
            for part in ("key", "value")
        )

    inputs = (
        f32("inputs_embeds", "B", "S", decoder.hidden_size),
        i64("position_ids", 3, "B", "S"),
        i64("write_indices", "B"),
    )
    return inputs + caches("past_key_values"), (
        f32("hidden_states", "B", "S", decoder.hidden_size),
        *caches("present"),
    )


def _text_head(config: StarConfig, compute: str):
    return (f32("hidden_states", "B", 1, config.base_ar.hidden_size),), (
        f32("logits", "B", config.vocab_size),
    )


def _image_head(config: StarConfig, compute: str):
    hidden = config.base_ar.hidden_size
    return (
        (
            f32("hidden_states", "2N", 1, hidden),
            f32("guidance", 1),
            i64("top_k", 1),
            f32("top_p", 1),
            f32("uniform", "N"),
        ),
        (
            i64("image_ids", "N"),
            f32("inputs_embeds", "2N", 1, hidden),
            f32("logits", "N", config.vq.codebook_size),
        ),
    )


COMPONENTS: dict[str, Component] = {
    "token_embedding": Component("TokenEmbedding", _token_embedding, {"inputs_embeds": 0.0}),
    "vision_encoder": Component("VisionEncoder", _vision_encoder, {"image_embeds": 2e-4}),
    "vq_encoder": Component(
        "VQEncoder",
        _vq_encoder,
        {"image_ids": 0.0, "inputs_embeds": 0.0},
        tolerances_16bit={"image_ids": FLIPPED_IDS},
    ),
    "vq_decoder": Component("VQDecoder", _vq_decoder, {"image": 2e-4}),
    "base_ar": Component(
        "BaseAR",
        lambda c, t: _decoder(c.base_ar, t),
        {"hidden_states": 2e-4, "present": 2e-4},
        quantized=True,
    ),
    "stacked_ar": Component(
        "StackedAR",
        lambda c, t: _decoder(c.stacked_ar, t),
        {"hidden_states": 2e-4, "present": 2e-4},
        quantized=True,
    ),
    "text_head": Component("TextHead", _text_head, {"logits": 2e-4}),
    "image_head": Component(
        "ImageHead", _image_head, {"image_ids": 0.0, "inputs_embeds": 0.0, "logits": 2e-4}
    ),
}
