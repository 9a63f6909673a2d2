"""What the runtime must know of a checkpoint, for the manifest: configuration, tokenizer, chat template."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer

from engines.bundle.manifest import (
    CacheSpec,
    ModelSpec,
    SamplingSpecs,
    TokenSpec,
    VisionSpec,
    strict,
    value_from_json,
)
from engines.errors import InputError
from reference.config import DecoderConfig, StarConfig
from reference.weights import CheckpointFiles

from ..components import TOP_K_LIMIT
from ..scores import KINDS, SCORE, ids_from_score, score_of_kind

SAMPLING = "sampling.json"  # a file beside the configuration; STAR-Nano has one
TOKENS = ("im_start", "im_end", "vision_start", "vision_end", "vision_pad", "image_pad", "fim_pad")


def model_spec_from_checkpoint(files: CheckpointFiles, config: StarConfig, *, rope_bf16: bool) -> ModelSpec:
    """Build the manifest's `model`. Raises InputError if the tokenizer lacks a special token."""
    v = config.vision
    image = _json(files.qwen_folder / "preprocessor_config.json")
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
        tokens=_token_spec(files.qwen_folder / "tokenizer.json", config),
        vision=VisionSpec(
            patch_size=v.patch_size,
            temporal_patch_size=v.temporal_patch_size,
            spatial_merge_size=v.spatial_merge_size,
            window_size=v.window_size,
            head_dim=v.hidden_size // v.num_heads,
            # The manifest's parser checks the lengths.
            image_mean=tuple(map(float, image["image_mean"])),  # type: ignore[arg-type]
            image_std=tuple(map(float, image["image_std"])),  # type: ignore[arg-type]
        ),
        cache={"base_ar": _cache_spec(config.base_ar), "stacked_ar": _cache_spec(config.stacked_ar)},
        sampling=sampling_specs(files.config_json.parent / SAMPLING),
    )


def sampling_specs(path: Path) -> SamplingSpecs:
    """Read the sampling settings of each task, or take the release's defaults where there is no such file.

    Raises InputError.
    """
    if not path.exists():
        return SamplingSpecs()
    return strict(
        SamplingSpecs, value_from_json(path.read_text(encoding="utf-8"), where=str(path)), str(path)
    )


def tokenizer_files(files: CheckpointFiles) -> dict[str, bytes]:
    """Bundle file name -> contents: the tokenizer, and the chat template from its configuration.

    Raises InputError without a template.
    """
    folder = files.qwen_folder
    template = _json(folder / "tokenizer_config.json").get("chat_template")
    if template is None and (folder / "chat_template.json").exists():
        template = _json(folder / "chat_template.json").get("chat_template")
    if not isinstance(template, str):
        raise InputError(
            "The base model has no chat template",
            where=f"{folder / 'tokenizer_config.json'}: expected chat_template, got nothing",
            fix="download the base model again, including tokenizer_config.json",
        )
    return {
        "tokenizer.json": (folder / "tokenizer.json").read_bytes(),
        "chat_template.jinja": template.encode(),
    }


def score_files(files: CheckpointFiles) -> dict[str, bytes]:
    """Bundle file name -> contents: the reference's score, if one lies beside the configuration.

    Raises InputError for a file of another form.
    """
    path = files.config_json.parent / SCORE
    if not path.exists():
        return {}
    data = path.read_bytes()
    for kind in KINDS:
        score_of_kind(data, kind, where=str(path))
    ids_from_score(data, where=str(path))
    return {SCORE: data}


def _token_spec(path: Path, config: StarConfig) -> TokenSpec:
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise InputError(
            "The tokenizer cannot be read", where=f"{path}: {error}", fix="download the base model again"
        ) from None
    vocabulary = tokenizer.get_vocab()
    texts = {name: f"<|{name}|>" for name in TOKENS}
    if absent := [text for text in texts.values() if text not in vocabulary]:
        raise InputError(
            "The tokenizer lacks special tokens",
            where=f"{path}: expected {', '.join(texts.values())}; absent: {', '.join(absent)}",
            fix="use the tokenizer of Qwen2.5-VL",
        )
    ids = {name: vocabulary[text] for name, text in texts.items()}
    return TokenSpec(**ids, eos=tuple(config.eos_token_ids))


def _cache_spec(decoder: DecoderConfig) -> CacheSpec:
    return CacheSpec(layers=decoder.num_layers, kv_heads=decoder.num_kv_heads, head_dim=decoder.head_dim)


def _json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            "This file of the base model cannot be read",
            where=f"{path}: {error}",
            fix="download the base model again",
        ) from None
    if not isinstance(value, dict):
        raise InputError(
            "This file of the base model is not a JSON object",
            where=str(path),
            fix="download the base model again",
        )
    return value
