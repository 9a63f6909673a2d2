"""STAR-Nano in the release's layout: the configuration files, a new model, and saving trained weights.

    STAR-Nano.json  STAR-Nano.pt  VQ-Model.pt
    Qwen2.5-VL-nano/{config,generation_config,tokenizer,...}.json  Qwen2.5-VL-nano/model.safetensors

The release's loader (`weights.load_star`) reads it without a special case. Weights are stored in float16,
which rounds by a quarter of a permille; no weight here comes near its range.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

from ...config import StarConfig, config_from_files
from ...mini import CHAT_TEMPLATE, write_json
from ...model import Star
from ...names import expected_tensors
from .. import recipe
from .tokens import write_tokenizer

STORED = torch.float16
IMAGE_MEAN, IMAGE_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def write_config(root: Path) -> StarConfig:
    """Write all files of a checkpoint except the weights into the folder `root`; returns the configuration as
    it is loaded."""
    base = root / recipe.BASE_FOLDER
    base.mkdir(parents=True, exist_ok=True)
    if not (base / "tokenizer.json").exists():
        write_tokenizer(base / "tokenizer.json")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    for name, content in base_json(tokenizer.token_to_id).items():
        write_json(base / name, content)
    write_json(root / f"{recipe.NAME}.json", star_json())
    return read_config(root)


def read_config(root: Path) -> StarConfig:
    return config_from_files(root / f"{recipe.NAME}.json", root / recipe.BASE_FOLDER)


def base_config(token_id: Callable[[str], int]) -> dict:
    """The base model's `config.json`; `token_id` maps a special token to its id."""
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "hidden_size": recipe.HIDDEN,
        "num_hidden_layers": recipe.BASE_LAYERS,
        "num_attention_heads": recipe.HEADS,
        "num_key_value_heads": recipe.KV_HEADS,
        "intermediate_size": recipe.INTERMEDIATE,
        "hidden_act": "silu",
        "max_position_embeddings": recipe.MAX_POSITIONS,
        "rms_norm_eps": 1e-6,
        "rope_theta": recipe.ROPE_THETA,
        "vocab_size": recipe.VOCAB_ROWS,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "sliding_window": recipe.MAX_POSITIONS,
        "max_window_layers": recipe.BASE_LAYERS,
        "rope_scaling": {"type": "mrope", "mrope_section": list(recipe.MROPE_SECTION)},
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "torch_dtype": "float16",
        "use_cache": True,
        "bos_token_id": token_id("<|endoftext|>"),
        "eos_token_id": token_id("<|im_end|>"),
        "vision_start_token_id": token_id("<|vision_start|>"),
        "vision_end_token_id": token_id("<|vision_end|>"),
        "vision_token_id": token_id("<|vision_pad|>"),
        "image_token_id": token_id("<|image_pad|>"),
        "video_token_id": token_id("<|video_pad|>"),
        "vision_config": recipe.VISION,
    }


def base_json(token_id: Callable[[str], int]) -> dict[str, dict]:
    """The base model's JSON files by name; `token_id` maps a special token to its id."""
    end, start = token_id("<|im_end|>"), token_id("<|endoftext|>")
    # No repetition penalty: answers here naturally repeat words ("two red stars and a red cross").
    generation = {
        "bos_token_id": start,
        "pad_token_id": start,
        "eos_token_id": [end, start],
        "do_sample": False,
        "repetition_penalty": 1.0,
    }
    preprocessor = {
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": IMAGE_MEAN,
        "image_std": IMAGE_STD,
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    }
    tokenizer = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHAT_TEMPLATE,
        "model_max_length": recipe.MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
    }
    return {
        "config.json": base_config(token_id),
        "generation_config.json": generation,
        "preprocessor_config.json": preprocessor,
        "tokenizer_config.json": tokenizer,
    }


def star_json() -> dict:
    """The configuration of the trained parts, as the release writes it."""
    size, dim = recipe.CODEBOOK_SIZE, recipe.CODEBOOK_DIM
    return {
        "model_name": recipe.NAME,
        "model_type": "STARMultiModalityConfig",
        "language_model": {"model_name": "Qwen2.5-VL", "model_path": recipe.BASE_FOLDER},
        "pixel_encoder": {
            "model_name": "VQ_Model",
            "model_path": "VQ-Model.pt",
            "image_token_size": size,
            "n_embed": dim,
            "num_tokens": recipe.IMAGE_TOKENS,
            **recipe.VQ,
        },
        "pixel_adapter": {
            "model_name": "MLP_GELU",
            "depth": recipe.ADAPTER_DEPTH,
            "input_dim": dim,
            "n_embed": recipe.HIDDEN,
        },
        "stacked_ar": {"num_layers": recipe.STACKED_LAYERS},
        "pixel_output_head": {"image_token_size": size, "n_embed": recipe.HIDDEN},
        "torch_dtype": "float16",
    }


def new_star(config: StarConfig, *, seed: int = recipe.SEED, **options) -> Star:
    """An untrained float32 model that is a function of the seed. The global random generator is left
    unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        star = Star(config, **options)
        nn.init.normal_(star.token_embedding.weight, std=0.05)
        depth = config.base_ar.num_layers + config.stacked_ar.num_layers
        for layer in (*star.base_ar.layers, *star.stacked_ar.layers):
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight.data.div_(math.sqrt(2 * depth))
    return star


def weight_files(root: Path) -> dict[str, Path]:
    """The weights file of each part of a checkpoint."""
    return {
        "base": root / recipe.BASE_FOLDER / "model.safetensors",
        "trained": root / f"{recipe.NAME}.pt",
        "vq": root / "VQ-Model.pt",
    }


def save_star(star: Star, root: Path, *, parts: Iterable[str] = ("base", "trained", "vq")) -> None:
    """Write weights into `root` with the release's layout, names and shapes; each file is written completely
    or not at all."""
    from safetensors.torch import save_file

    state, places = star.state_dict(), weight_files(root)
    for part in parts:
        tensors = {
            release: state[ours].detach().to("cpu", STORED).reshape(stored).contiguous()
            for release, (ours, stored, _) in expected_tensors(star.config)[part].items()
        }
        partial = places[part].with_suffix(".partial")
        if part == "base":
            save_file(tensors, partial, metadata={"format": "pt"})
            partial.chmod(0o644)  # safetensors makes the file private
        else:
            torch.save({"state_dict": tensors} if part == "trained" else tensors, partial)
        os.replace(partial, places[part])
