"""THE TABLE: boundary, dynamic axes, wrapper and tolerances of each component; all that differs between them.

A stack of layers may be stored in parts of consecutive layers; `Part` names one graph of a bundle.

Axes: `N` images, `B` rows (2N under guidance), `S` new positions, `C` cache capacity, `P` vision patches; of
the diffusion decoder `L` ids of a caption, `T` patches of an image, `Q` places along a side of a latent.
Sizes that the model fixes come from its configuration. Float tensors cross a boundary in float32 in every
precision; only the caches have the compute type.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from engines.bundle.manifest import PART, TensorSpec
from reference.config import DecoderConfig, StarConfig
from reference.diffusion.config import TIME_FEATURES, DiffusionConfig

TOP_K_LIMIT = 2048  # the candidates that `image_head` ranks; TensorRT's TopK accepts at most 3840
PART_BYTES = 1 << 30  # a stack of layers whose weights take more is stored in parts
# Largest share of an image's ids, or a teacher-forced run's ids, that may differ; measured: 0.0625 in bf16.
FLIPPED_IDS = 0.25
FLIPPED_IDS_NVFP4 = 0.5  # where 16 bits give activations other numbers of nvfp4; measured: 0.375


@dataclass(frozen=True)
class Part:
    """One graph of a bundle: a component, or the `layers` of a stack that the part `name` holds.

    `layers` is None for a component that is stored whole because it cannot be divided.
    """

    name: str
    component: str
    layers: range | None = None


@dataclass(frozen=True)
class Stack:
    """A component's equal layers, and what is around them.

    `config` leads from the model's configuration to the one that has the number of layers. What comes before
    the layers belongs to the first part, and `after`, a module of the component, to the last one; `before`
    says how many layers weigh as much as what comes before them, or is None where nothing does.
    """

    config: tuple[str, ...]
    after: str = ""
    before: Callable[[StarConfig], int] | None = None

    def layers(self, config: StarConfig) -> int:
        """How many layers there are."""
        found: Any = config
        for name in self.config:
            found = getattr(found, name)
        return found.num_layers

    def with_layers(self, config: StarConfig, layers: int) -> StarConfig:
        """The same model with another number of layers."""

        def changed(found: Any, path: tuple[str, ...]) -> Any:
            if not path:
                return replace(found, num_layers=layers)
            return replace(found, **{path[0]: changed(getattr(found, path[0]), path[1:])})

        return changed(config, self.config)


@dataclass(frozen=True)
class Component:
    """One row of the table.

    `boundary(config, compute_type, layers)` returns (inputs, outputs); `layers` are those of a part. `stack`
    describes a component that can be stored in parts. `table` is the weight whose rows a component without a
    graph looks up. `tolerances` bound each output's difference in units of the reference's standard
    deviation, or for ids the share that differs; `tolerances_16bit` replace them for an executor that
    computes in 16 bits.
    """

    wrapper: str
    boundary: Callable[[StarConfig, str, range | None], tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]]
    tolerances: dict[str, float]
    stack: Stack | None = None
    table: str | None = None
    tolerances_16bit: dict[str, float] = field(default_factory=dict)


def f32(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name, "float32", shape)


def i64(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name, "int64", shape)


def _token_embedding(config: StarConfig, compute: str, layers: range | None):
    return (i64("input_ids", "B", "S"),), (f32("inputs_embeds", "B", "S", config.base_ar.hidden_size),)


def _image_embedding(config: StarConfig, compute: str, layers: range | None):
    return (i64("image_ids", "N", "T"),), (f32("inputs_embeds", "N", "T", config.base_ar.hidden_size),)


def _vision_encoder(config: StarConfig, compute: str, layers: range | None):
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


def _vq_encoder(config: StarConfig, compute: str, layers: range | None):
    size, tokens = config.vq.image_size, config.vq.image_tokens
    return (f32("image", "N", 3, size, size),), (i64("image_ids", "N", tokens),)


def _vq_decoder(config: StarConfig, compute: str, layers: range | None):
    size, tokens = config.vq.image_size, config.vq.image_tokens
    return (i64("image_ids", "N", tokens),), (f32("image", "N", 3, size, size),)


def _decoder(decoder: DecoderConfig, compute: str, layers: range | None):
    def caches(side: str):
        return tuple(
            TensorSpec(f"{side}.{i}.{part}", compute, ("B", decoder.num_kv_heads, "C", decoder.head_dim))
            for i in layers or range(decoder.num_layers)
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


def _text_head(config: StarConfig, compute: str, layers: range | None):
    return (f32("hidden_states", "B", 1, config.base_ar.hidden_size),), (
        f32("logits", "B", config.vocab_size),
    )


def _image_head(config: StarConfig, compute: str, layers: range | None):
    hidden = config.base_ar.hidden_size
    return (
        (
            f32("hidden_states", "2N", "S", hidden),
            f32("guidance", 1),
            i64("top_k", 1),
            f32("top_p", 1),
            f32("noise", "N", "S", config.vq.codebook_size),
        ),
        (
            i64("image_ids", "N", "S"),
            f32("inputs_embeds", "2N", "S", hidden),
            f32("logits", "N", "S", config.vq.codebook_size),
        ),
    )


def _codebook(config: StarConfig, compute: str, layers: range | None):
    return (i64("image_ids", "N", "T"),), (f32("vq_embeds", "N", "T", config.vq.codebook_dim),)


def _text_embedding(config: StarConfig, compute: str, layers: range | None):
    size = diffusion_of(config).text_encoder.hidden_size
    return (i64("input_ids", "B", "S"),), (f32("inputs_embeds", "B", "S", size),)


def _text_encoder(config: StarConfig, compute: str, layers: range | None):
    size = diffusion_of(config).text_encoder.hidden_size
    return (
        (f32("inputs_embeds", 1, "L", size), i64("position_ids", 1, "L")),
        (f32("hidden_states", 1, "L", size),),
    )


def _dit(config: StarConfig, compute: str, layers: range | None):
    dit = diffusion_of(config).dit
    places, angles, size = dit.patch_size**2, dit.head_dim // 2, dit.hidden_size
    tables = (
        f32("caption_cos", "L", angles),
        f32("caption_sin", "L", angles),
        f32("image_cos", "2T", angles),
        f32("image_sin", "2T", angles),
    )
    inputs: tuple[TensorSpec, ...] = (
        f32("latents", "N", "T", places, dit.latent_channels),
        f32("source", "N", "T", places, dit.latent_channels),
        f32("vq_map", "N", "T", places, dit.vq_channels),
        f32("caption", 1, "L", dit.caption_size),
        f32("time", 1, TIME_FEATURES),
    )
    outputs: tuple[TensorSpec, ...] = (f32("velocity", "N", "T", places, dit.latent_channels),)

    def streams(of: str) -> tuple[TensorSpec, ...]:
        return f32(f"caption_{of}", "N", "L", size), f32(f"image_{of}", "N", "2T", size)

    if layers and layers.start:
        inputs = (*streams("embeds"), f32("time_embeds", 1, dit.time_size))
    if layers and layers.stop < dit.num_layers:
        outputs = streams("states") + (() if layers.start else (f32("time_states", 1, dit.time_size),))
    return inputs + tables, outputs


def _vae_encoder(config: StarConfig, compute: str, layers: range | None):
    channels = diffusion_of(config).vae.latent_channels
    return (f32("image", "N", 3, "8Q", "8Q"),), (f32("moments", "N", 2 * channels, "Q", "Q"),)


def _vae_decoder(config: StarConfig, compute: str, layers: range | None):
    channels = diffusion_of(config).vae.latent_channels
    return (f32("latents", "N", channels, "Q", "Q"),), (f32("image", "N", 3, "8Q", "8Q"),)


def diffusion_of(config: StarConfig) -> DiffusionConfig:
    """The configuration of the diffusion decoder, of a model that has one."""
    assert config.diffusion, config.name
    return config.diffusion


COMPONENTS: dict[str, Component] = {
    "token_embedding": Component(
        "TokenEmbedding", _token_embedding, {"inputs_embeds": 0.0}, table="token_embedding.weight"
    ),
    "image_embedding": Component(
        "ImageEmbedding", _image_embedding, {"inputs_embeds": 0.0}, table="image_table.weight"
    ),
    "vision_encoder": Component("VisionEncoder", _vision_encoder, {"image_embeds": 2e-4}),
    "vq_encoder": Component(
        "VQEncoder",
        _vq_encoder,
        {"image_ids": 0.0},
        tolerances_16bit={"image_ids": FLIPPED_IDS},
    ),
    "vq_decoder": Component("VQDecoder", _vq_decoder, {"image": 2e-4}),
    "base_ar": Component(
        "BaseAR",
        lambda c, t, layers: _decoder(c.base_ar, t, layers),
        {"hidden_states": 2e-4, "present": 2e-4},
        stack=Stack(("base_ar",), after="norm"),
    ),
    "stacked_ar": Component(
        "StackedAR",
        lambda c, t, layers: _decoder(c.stacked_ar, t, layers),
        {"hidden_states": 2e-4, "present": 2e-4},
        stack=Stack(("stacked_ar",), after="norm"),
    ),
    "text_head": Component("TextHead", _text_head, {"logits": 2e-4}),
    "image_head": Component(
        "ImageHead", _image_head, {"image_ids": 0.0, "inputs_embeds": 0.0, "logits": 2e-4}
    ),
    "codebook": Component("Codebook", _codebook, {"vq_embeds": 0.0}, table="codebook.weight"),
    "text_embedding": Component(
        "TextEmbedding", _text_embedding, {"inputs_embeds": 0.0}, table="text_embedding.weight"
    ),
    "text_encoder": Component(
        "TextEncoder",
        _text_encoder,
        {"hidden_states": 2e-4},
        stack=Stack(("diffusion", "text_encoder"), before=lambda c: 0),
    ),
    "dit": Component(
        "DiT",
        _dit,
        {"velocity": 2e-4, "caption_states": 2e-4, "image_states": 2e-4, "time_states": 2e-4},
        stack=Stack(
            ("diffusion", "dit"), after="norm_out", before=lambda c: 2 * diffusion_of(c).dit.num_refiners
        ),
    ),
    "vae_encoder": Component("VAEEncoder", _vae_encoder, {"moments": 2e-4}),
    "vae_decoder": Component("VAEDecoder", _vae_decoder, {"image": 2e-4}),
}
DIFFUSION = ("codebook", "text_embedding", "text_encoder", "dit", "vae_encoder", "vae_decoder")


def components_of(config: StarConfig) -> list[str]:
    """The components of a model: those of the diffusion decoder only if it has one."""
    return [name for name in COMPONENTS if config.diffusion or name not in DIFFUSION]


def boundary(
    part: Part, config: StarConfig, compute: str
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The inputs and outputs of one graph or table; caches have the type `compute`."""
    return COMPONENTS[part.component].boundary(config, compute, part.layers)


def whole(name: str, config: StarConfig) -> Part:
    """The component `name` as one graph or table."""
    stack = COMPONENTS[name].stack
    return Part(name, name, range(stack.layers(config)) if stack else None)


def parts_of(name: str, config: StarConfig, *, weight_bytes: int, part_bytes: int) -> list[Part]:
    """The graphs that component `name`, whose weights are stored in `weight_bytes`, is divided into.

    A stack above `part_bytes` becomes as few parts as keep below it, with equally many layers, but for the
    last, and for the first, which has what comes before the layers. A layer is never divided, and every other
    component stays whole.
    """
    part, stack = whole(name, config), COMPONENTS[name].stack
    if stack is None or part.layers is None or weight_bytes <= part_bytes:
        return [part]
    before = stack.before(config) if stack.before else 0
    layers = len(part.layers) + before
    most = max(1, part_bytes * layers // weight_bytes)  # layers that fit
    each = -(-layers // -(-layers // most))
    starts = [0, *range(max(1, each - before), len(part.layers), each)]
    if len(starts) == 1:
        return [part]
    return [
        Part(f"{name}{PART}{i}", name, range(start, stop))
        for i, (start, stop) in enumerate(zip(starts, [*starts[1:], len(part.layers)]))
    ]
