"""The diffusion decoder's configuration, read strictly from a folder in the diffusers layout.

The folder is the release's `lumina-image2/`: `model_index.json`, `transformer/`, `scheduler/`, `vae/`,
`text_encoder/` and `tokenizer/`. What is stated there and computed here only one way is checked, so that the
folder of another model is refused by name.

Sources: docs/diffusion.md; diffusers 0.33, pipelines/lumina2 and models/autoencoders/autoencoder_kl.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..base_config import (
    LIBRARY_UNUSED,
    MAX_LAYERS,
    MAX_ROWS,
    MAX_SIZE,
    expect_divides,
    section_from_file,
)
from ..errors import CheckpointError
from ..strict_json import Section

TIME_FEATURES = 256  # cosines and sines of a step's time
MAX_TIME_WIDTH = 1024
DIFFUSERS_UNUSED = frozenset({"_diffusers_version", "_name_or_path", "sample_size"})
TEXT_UNUSED = LIBRARY_UNUSED | frozenset(
    (
        *("attention_dropout", "final_logit_softcapping", "attn_logit_softcapping", "cache_implementation"),
        *("eos_token_id", "pad_token_id", "hidden_act", "initializer_range", "use_cache"),
        *("sliding_window", "layer_types", "tie_word_embeddings", "use_bidirectional_attention"),
    )
)
PIPELINE = {  # part -> the class that model_index.json names, in either spelling
    "scheduler": ("FlowMatchEulerDiscreteScheduler",),
    "text_encoder": ("Gemma2Model", "Gemma2ForCausalLM"),
    "tokenizer": ("GemmaTokenizer", "GemmaTokenizerFast"),
    "transformer": ("Lumina2Transformer2DModel",),
    "vae": ("AutoencoderKL",),
}


@dataclass(frozen=True)
class TextEncoderConfig:
    """Geometry of Gemma-2. `num_layers` are those that are used: all but the last."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    query_scalar: float
    vocab_size: int
    max_positions: int


@dataclass(frozen=True)
class DiTConfig:
    """Geometry of the diffusion transformer. `axes` counts the dimensions of a head that turn with caption
    position, row and column; `vq_channels` are those of the VQ model's codebook."""

    hidden_size: int
    num_layers: int
    num_refiners: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    caption_size: int
    latent_channels: int
    vq_channels: int
    patch_size: int
    axes: tuple[int, int, int]
    norm_eps: float

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def blocks(self) -> int:
        """Blocks that an image token goes through."""
        return self.num_layers + self.num_refiners

    @property
    def token_weights(self) -> int:
        """Weights that multiply every image token."""
        kv_size = self.num_kv_heads * self.head_dim
        attention = 2 * self.hidden_size * (self.hidden_size + kv_size)
        block = attention + 3 * self.hidden_size * self.intermediate_size
        features = self.patch_size**2 * (self.latent_channels + self.vq_channels)
        return self.blocks * block + features * self.hidden_size

    @property
    def time_size(self) -> int:
        """Width of the embedding of a step's time."""
        return min(self.hidden_size, MAX_TIME_WIDTH)


@dataclass(frozen=True)
class VAEConfig:
    """Geometry of the VAE; a latent is `(z - shift) * scale`."""

    channels: tuple[int, ...]
    blocks_per_level: int
    norm_groups: int
    latent_channels: int
    scale: float
    shift: float

    @property
    def factor(self) -> int:
        """Pixels along a side of an image for each place along a side of its latent."""
        return int(2 ** (len(self.channels) - 1))


@dataclass(frozen=True)
class DiffusionConfig:
    """The whole decoder. `time_shift` is the schedule's, and `bos` the id that a caption begins with."""

    text_encoder: TextEncoderConfig
    dit: DiTConfig
    vae: VAEConfig
    time_shift: float
    bos: int


def diffusion_from_folder(folder: Path, *, vq_channels: int) -> DiffusionConfig:
    """The decoder that a folder in the diffusers layout describes, for a codebook of `vq_channels`.

    Raises CheckpointError, naming file and key, for anything but Lumina-Image-2.0's kind of model, and where
    its parts do not fit together.
    """
    check_pipeline(folder)
    text = section_from_file(folder / "text_encoder" / "config.json")
    bos = text.integer("bos_token_id", low=0, high=MAX_ROWS)
    text_encoder = text_encoder_from_section(text)
    vae = vae_from_section(section_from_file(folder / "vae" / "config.json"))
    dit = dit_from_section(
        section_from_file(folder / "transformer" / "config.json"),
        vq_channels=vq_channels,
        caption_size=text_encoder.hidden_size,
        latent_channels=vae.latent_channels,
    )
    shift = shift_from_section(section_from_file(folder / "scheduler" / "scheduler_config.json"))
    return DiffusionConfig(text_encoder=text_encoder, dit=dit, vae=vae, time_shift=shift, bos=bos)


def check_pipeline(folder: Path) -> None:
    """Raise CheckpointError unless `model_index.json` names the five parts of Lumina2Pipeline."""
    path = folder / "model_index.json"
    if not path.exists():
        raise CheckpointError(
            "this is no folder of a diffusion decoder",
            where=f"{folder}: expected model_index.json with its parts beside it, got no such file",
            fix="give the folder of Lumina-Image-2.0 in the diffusers layout",
        )
    index = section_from_file(path)
    index.text("_class_name", choices=("Lumina2Pipeline", "Lumina2Text2ImgPipeline"))
    for part, classes in PIPELINE.items():
        named = index.items(part, "names: a library and a class", length=2)
        if named[1] not in classes:
            raise index.refuse(part, " or ".join(classes), str(named[1])[:80])
        if not (folder / part).is_dir():
            raise CheckpointError(
                "the diffusion decoder lacks a part",
                where=f"{folder / part}: expected a folder, got none",
                fix="download the folder again, whole",
            )
    index.finish(unused=DIFFUSERS_UNUSED)


def text_encoder_from_section(section: Section) -> TextEncoderConfig:
    """`text_encoder/config.json`, flat as transformers 4.51 writes it, or with 5.x's `rope_parameters`."""
    section.text("model_type", choices=("gemma2",))
    heads = section.integer("num_attention_heads", high=1024)
    kv_heads = section.integer("num_key_value_heads", high=1024)
    expect_divides(section, "num_key_value_heads", kv_heads, heads, "num_attention_heads")
    section.text("hidden_activation", choices=("gelu_pytorch_tanh",), default="gelu_pytorch_tanh")
    if section.flag("attention_bias", default=False):
        raise section.refuse("attention_bias", "false", "true")
    text_encoder = TextEncoderConfig(
        hidden_size=section.integer("hidden_size", high=MAX_SIZE),
        num_layers=section.integer("num_hidden_layers", low=2, high=MAX_LAYERS) - 1,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=section.integer("head_dim", high=4096, default=256),
        intermediate_size=section.integer("intermediate_size", high=MAX_SIZE),
        rms_norm_eps=section.number("rms_norm_eps", low=1e-12, high=1e-2),
        rope_theta=theta_from_section(section),
        query_scalar=section.number("query_pre_attn_scalar", low=1, high=1e6, default=256.0),
        vocab_size=section.integer("vocab_size", high=MAX_ROWS),
        max_positions=section.integer("max_position_embeddings", high=1 << 24),
    )
    section.finish(unused=TEXT_UNUSED)
    return text_encoder


def theta_from_section(section: Section) -> float:
    if "rope_parameters" not in section:
        return section.number("rope_theta", low=1.0, high=1e12)
    rope = section.section("rope_parameters")
    theta = rope.number("rope_theta", low=1.0, high=1e12)
    rope.text("rope_type", choices=("default",), default="default")
    rope.finish()
    return theta


def dit_from_section(
    section: Section, *, vq_channels: int, caption_size: int, latent_channels: int
) -> DiTConfig:
    """`transformer/config.json`: of Lumina's own, which STAR widens by the codebook's channels."""
    section.text("_class_name", choices=("Lumina2Transformer2DModel",))
    hidden = section.integer("hidden_size", high=MAX_SIZE)
    heads = section.integer("num_attention_heads", high=1024)
    kv_heads = section.integer("num_kv_heads", high=1024)
    expect_divides(section, "num_attention_heads", heads, hidden, "hidden_size")
    expect_divides(section, "num_kv_heads", kv_heads, heads, "num_attention_heads")
    multiple = section.integer("multiple_of", high=MAX_SIZE)
    axes = section.integers("axes_dim_rope", low=2, high=4096, length=3)
    if sum(axes) != hidden // heads or any(size % 2 for size in axes):
        raise section.refuse(
            "axes_dim_rope", f"even numbers with a sum of {hidden // heads}", str(list(axes))
        )
    for key, expected, meaning in (
        ("cap_feat_dim", caption_size, "the text encoder's hidden_size"),
        ("in_channels", latent_channels, "the VAE's latent_channels"),
    ):
        if (value := section.integer(key, high=MAX_SIZE)) != expected:
            raise section.refuse(key, f"{expected} ({meaning})", str(value))
    for key in ("ffn_dim_multiplier", "out_channels"):
        if section.values.get(key) is not None:
            raise section.refuse(key, "null", str(section.values[key])[:80])
        section.taken.add(key)
    dit = DiTConfig(
        hidden_size=hidden,
        num_layers=section.integer("num_layers", high=MAX_LAYERS),
        num_refiners=section.integer("num_refiner_layers", high=MAX_LAYERS),
        num_heads=heads,
        num_kv_heads=kv_heads,
        intermediate_size=multiple * -(-4 * hidden // multiple),
        caption_size=caption_size,
        latent_channels=latent_channels,
        vq_channels=vq_channels,
        patch_size=section.integer("patch_size", low=2, high=2),
        axes=(axes[0], axes[1], axes[2]),
        norm_eps=section.number("norm_eps", low=1e-12, high=1e-2),
    )
    section.finish(unused=DIFFUSERS_UNUSED | {"axes_lens", "scaling_factor"})
    return dit


def vae_from_section(section: Section) -> VAEConfig:
    """`vae/config.json`: FLUX's kind of autoencoder, without convolutions around the latent."""
    section.text("_class_name", choices=("AutoencoderKL",))
    section.text("act_fn", choices=("silu",))
    channels = section.integers("block_out_channels", low=1, high=8192)
    for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if (blocks := section.items(key, "names", length=len(channels))) != [kind] * len(channels):
            raise section.refuse(key, f"{kind} for each level", str(blocks)[:80])
    for key in ("in_channels", "out_channels"):
        section.integer(key, low=3, high=3)
    for key in ("use_quant_conv", "use_post_quant_conv"):
        if section.flag(key):
            raise section.refuse(key, "false", "true")
    if not section.flag("mid_block_add_attention", default=True):
        raise section.refuse("mid_block_add_attention", "true", "false")
    for key in ("latents_mean", "latents_std"):
        if section.values.get(key) is not None:
            raise section.refuse(key, "null", str(section.values[key])[:80])
        section.taken.add(key)
    vae = VAEConfig(
        channels=channels,
        blocks_per_level=section.integer("layers_per_block", high=64),
        norm_groups=section.integer("norm_num_groups", high=8192),
        latent_channels=section.integer("latent_channels", high=4096),
        scale=section.number("scaling_factor", low=1e-6, high=1e6),
        shift=section.number("shift_factor", low=-1e6, high=1e6),
    )
    if len(channels) != 4:
        raise section.refuse(
            "block_out_channels", "4 levels: a latent has 1/8 of the side", f"{len(channels)}"
        )
    for count in channels:
        expect_divides(section, "norm_num_groups", vae.norm_groups, count, "block_out_channels")
    section.finish(unused=DIFFUSERS_UNUSED | {"force_upcast"})
    return vae


def shift_from_section(section: Section) -> float:
    """`scheduler/scheduler_config.json`: the static shift of a flow-matching schedule."""
    section.text("_class_name", choices=("FlowMatchEulerDiscreteScheduler",))
    section.integer("num_train_timesteps", low=1000, high=1000)
    for key in (
        *("use_dynamic_shifting", "use_karras_sigmas", "use_exponential_sigmas"),
        *("use_beta_sigmas", "invert_sigmas", "stochastic_sampling"),
    ):
        if section.flag(key, default=False):
            raise section.refuse(key, "false", "true")
    if section.values.get("shift_terminal") is not None:
        raise section.refuse("shift_terminal", "null", str(section.values["shift_terminal"])[:80])
    section.taken.add("shift_terminal")
    shift = section.number("shift", low=1e-3, high=1e3)
    section.finish(
        unused=DIFFUSERS_UNUSED
        | {"base_image_seq_len", "base_shift", "max_image_seq_len", "max_shift", "time_shift_type"}
    )
    return shift
