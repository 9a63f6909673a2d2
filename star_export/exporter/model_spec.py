"""What the runtime must know of a checkpoint, for the manifest: configuration, tokenizer, chat template.

All small files of the checkpoint that the configuration does not read are read here, and tried.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from engines.bundle.manifest import (
    CacheSpec,
    DiffusionSpec,
    ModelSpec,
    SamplingSpecs,
    TokenSpec,
    VisionSpec,
)
from engines.bundle.records import strict, value_from_json
from engines.errors import InputError
from engines.inputs.caption import CAPTIONS_FILE, TOKENIZER_BYTES, Captions
from engines.inputs.prompt import Chat
from engines.inputs.template import template_from_source
from reference.config import DecoderConfig, StarConfig
from reference.processor import chat_template_from_folder, image_settings_from_folder
from reference.strict_json import read_small, read_text
from reference.weights import CheckpointFiles

from ..components import TOP_K_LIMIT
from ..scores import KINDS, SCORE, ids_from_score, score_of_kind

CAPTION_TOKENIZER = "tokenizer/tokenizer.json"  # of the diffusion decoder's folder
SAMPLING = "sampling.json"  # a file beside the configuration; STAR-Nano has one
# What the official code takes for granted of a prompt: it cuts 14 ids off its start and 6 off its end
# (docs/star.md 3.3).
PREFIX = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"
PREFIX_IDS, SUFFIX_IDS = 14, 6  # the suffix with <|vision_start|>


def model_spec_from_checkpoint(files: CheckpointFiles, config: StarConfig, *, rope_bf16: bool) -> ModelSpec:
    """Build the manifest's `model`. Raises CheckpointError and InputError for invalid settings."""
    v = config.vision
    image = image_settings_from_folder(files.qwen_folder, v)
    return ModelSpec(
        name=config.name,
        hidden_size=config.base_ar.hidden_size,
        vocab_size=config.vocab_size,
        codebook_size=config.vq.codebook_size,
        image_tokens=config.vq.image_tokens,
        image_size=config.vq.image_size,
        top_k_limit=min(TOP_K_LIMIT, config.vq.codebook_size),
        max_positions=config.base_ar.max_positions,
        repetition_penalty=float(config.repetition_penalty),
        rope_bf16=rope_bf16,
        tokens=TokenSpec(**asdict(config.special), eos=tuple(config.eos_token_ids)),
        vision=VisionSpec(
            patch_size=v.patch_size,
            temporal_patch_size=v.temporal_patch_size,
            spatial_merge_size=v.spatial_merge_size,
            window_size=v.window_size,
            head_dim=v.hidden_size // v.num_heads,
            image_mean=image.mean,
            image_std=image.std,
        ),
        cache={"base_ar": _cache_spec(config.base_ar), "stacked_ar": _cache_spec(config.stacked_ar)},
        sampling=sampling_specs(files.config_json.parent / SAMPLING),
        diffusion=diffusion_spec(files, config),
    )


def diffusion_spec(files: CheckpointFiles, config: StarConfig) -> DiffusionSpec | None:
    """Build the manifest's `diffusion`; None for a model without a diffusion decoder.

    Its tokenizer is tried. Raises CheckpointError and InputError.
    """
    if config.diffusion is None or files.lumina_folder is None:
        return None
    dit, vae = config.diffusion.dit, config.diffusion.vae
    path = files.lumina_folder / CAPTION_TOKENIZER
    spec = DiffusionSpec(
        axes=dit.axes,
        latent_channels=dit.latent_channels,
        vq_channels=dit.vq_channels,
        latent_scale=float(vae.scale),
        latent_shift=float(vae.shift),
        time_shift=float(config.diffusion.time_shift),
        bos=config.diffusion.bos,
        hidden_size=dit.hidden_size,
        blocks=dit.blocks,
        token_weights=dit.token_weights,
    )
    Captions(read_text(path, max_bytes=TOKENIZER_BYTES), spec, where=str(path))
    return spec


def sampling_specs(path: Path) -> SamplingSpecs:
    """Read the sampling settings of each task, or take the release's defaults where there is no such file.

    Raises CheckpointError and InputError.
    """
    if not path.exists():
        return SamplingSpecs()
    return strict(SamplingSpecs, value_from_json(read_text(path), where=str(path)), str(path))


def tokenizer_files(files: CheckpointFiles, model: ModelSpec) -> dict[str, bytes]:
    """Bundle file name -> contents: the tokenizer, and the chat template of the base model's processor.

    Both are tried. Raises CheckpointError and InputError if they are missing, invalid, or do not make the
    prompts that STAR was trained on.
    """
    folder = files.qwen_folder
    source, path = chat_template_from_folder(folder)
    template = template_from_source(source, where=str(path))
    tokenizer = read_text(folder / "tokenizer.json")
    chat = Chat(tokenizer, source, model, where=str(folder))
    for what, expected, rendered in (
        ("before the prompt", PREFIX, template.prefix),
        ("before a prompt with an image", PREFIX + IMAGE, template.image_prefix),
        ("after the prompt", SUFFIX, template.suffix),
    ):
        if rendered != expected:
            raise InputError(
                "The chat template is not the one that STAR was trained with",
                where=f"{path}: {what}: expected {expected!r}, got {rendered!r:.400}",
                fix="use the chat template of Qwen2.5-VL",
            )
    got = chat.prefix_length, len(chat.suffix)
    if got != (PREFIX_IDS, SUFFIX_IDS):
        raise InputError(
            "The tokenizer is not the one that STAR was trained with",
            where=f"{folder / 'tokenizer.json'}: the ids before and after a prompt: "
            f"expected {PREFIX_IDS} and {SUFFIX_IDS}, got {got[0]} and {got[1]}",
            fix="use the tokenizer.json of Qwen2.5-VL",
        )
    found = {"tokenizer.json": tokenizer.encode(), "chat_template.jinja": source.encode()}
    if model.diffusion and files.lumina_folder:
        path = files.lumina_folder / CAPTION_TOKENIZER
        found[CAPTIONS_FILE] = read_text(path, max_bytes=TOKENIZER_BYTES).encode()
    return found


def score_files(files: CheckpointFiles) -> dict[str, bytes]:
    """Bundle file name -> contents: the reference's score, if one lies beside the configuration.

    Raises InputError for a file of another form.
    """
    path = files.config_json.parent / SCORE
    if not path.exists():
        return {}
    data = read_small(path)
    for kind in KINDS:
        score_of_kind(data, kind, where=str(path))
    ids_from_score(data, where=str(path))
    return {SCORE: data}


def _cache_spec(decoder: DecoderConfig) -> CacheSpec:
    return CacheSpec(layers=decoder.num_layers, kv_heads=decoder.num_kv_heads, head_dim=decoder.head_dim)
