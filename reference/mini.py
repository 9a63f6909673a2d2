"""A miniature STAR checkpoint in the release's layout, generated rather than stored, for tests and trials.

It consists of STAR-mini.json, STAR-mini.pt (the trained parts), VQ-Model.pt and Qwen2.5-VL-mini/
(configuration, tokenizer, two safetensors shards with their index). Its numbers are noise of a realistic
scale, good for comparing implementations but not for images.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

from .diffusion import mini as diffusion_mini
from .mini_tensors import (
    CODEBOOK_DIM,
    CODEBOOK_SIZE,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    IMAGE_TOKENS,
    INTERMEDIATE,
    KV_HEADS,
    LAYERS,
    STACKED_LAYERS,
    VISION,
    VOCAB,
    VQ_CH,
    VQ_CH_MULT,
    VQ_HEADS,
    Z_CHANNELS,
    state_dicts,
)

FIRST_SPECIAL = 151_643
SPECIAL = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
    *("<tool_call>", "</tool_call>"),
    *("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>"),
]
WORDS = [
    *("a", "the", "and", "of", "are", "helpful", "assistant", "blue", "red", "green", "cat", "dog", "star"),
    *("image", "what", "is", "color", "change", "to", "photo"),
]
CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_checkpoint(root: Path, *, diffusion: bool = False) -> None:
    """Write the checkpoint into the folder `root`, which is created if necessary. Needs tokenizers.

    `diffusion` adds the miniature of the diffusion decoder.

    All files are written to a temporary folder inside it and then moved to their names, the configuration
    last. Files from an earlier call are replaced by the same bytes.
    """
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".partial-") as staged:
        write_files(Path(staged), diffusion=diffusion)
        written = [path for path in Path(staged).rglob("*") if path.is_file()]
        for path in sorted(written, key=lambda path: path.name == "STAR-mini.json"):
            final = root / path.relative_to(staged)
            final.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, final)


def write_files(root: Path, *, diffusion: bool) -> None:
    import torch

    qwen = root / "Qwen2.5-VL-mini"
    qwen.mkdir()
    for name, content in base_json().items():
        write_json(qwen / name, content)
    write_tokenizer(qwen / "tokenizer.json")
    star, vq = ({name: torch.from_numpy(array) for name, array in arrays.items()} for arrays in state_dicts())
    write_shards({name.removeprefix("llm."): t for name, t in star.items() if name.startswith("llm.")}, qwen)
    trained = {name: t for name, t in star.items() if not name.startswith("llm.")}
    settings = star_json()
    if diffusion:
        trained |= diffusion_mini.write_folder(root, vq_channels=CODEBOOK_DIM)
        settings["pixel_decoder"] = {"model_name": "LUMINA2", "model_path": diffusion_mini.FOLDER}
    torch.save({"state_dict": trained}, root / "STAR-mini.pt")
    torch.save(vq, root / "VQ-Model.pt")
    write_json(root / "STAR-mini.json", settings)


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_shards(tensors: dict, folder: Path) -> None:
    """Two safetensors shards, like those of the release's base model, and their index."""
    from safetensors.torch import save_file

    parts = [("visual.",), ("model.", "lm_head.")]
    weight_map = {}
    for number, prefixes in enumerate(parts, start=1):
        shard_name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        shard = {name: tensor for name, tensor in tensors.items() if name.startswith(prefixes)}
        save_file(shard, folder / shard_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, shard_name)
    total_size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total_size}, "weight_map": weight_map},
    )


def write_tokenizer(path: Path) -> None:
    """A byte-level BPE that knows a few words, with Qwen's special tokens under Qwen's ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    merges: list[tuple[str, str]] = []
    words = [["Ġ", *word] for word in WORDS] + [list(word) for word in ("system", "You", "user", "assistant")]
    for word in words:
        while len(word) > 1:
            if (pair := (word[0], word[1])) not in merges:
                merges.append(pair)
            word = ["".join(pair), *word[2:]]
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in merges]
    tokens += [f"unused{i}" for i in range(len(tokens), FIRST_SPECIAL)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    assert tokenizer.token_to_id("<|image_pad|>") == 151_655
    tokenizer.save(str(path))


def base_config() -> dict:
    """The base model's `config.json`."""
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "intermediate_size": INTERMEDIATE,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": LAYERS,
        "rope_scaling": {
            "type": "mrope",
            "mrope_section": [HEAD_DIM // 8, HEAD_DIM * 3 // 16, HEAD_DIM * 3 // 16],
        },
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "vision_token_id": 151654,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "torch_dtype": "float32",
        "use_cache": True,
        "vision_config": VISION,
    }


def base_json() -> dict[str, dict]:
    """The base model's JSON files by name."""
    generation = {
        "bos_token_id": 151643,
        "pad_token_id": 151643,
        "eos_token_id": [151645, 151643],
        "do_sample": True,
        "repetition_penalty": 1.05,
        "temperature": 1e-6,
    }
    preprocessor = {
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    }
    tokenizer = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHAT_TEMPLATE,
        "model_max_length": 131072,
        "clean_up_tokenization_spaces": False,
    }
    return {
        "config.json": base_config(),
        "generation_config.json": generation,
        "preprocessor_config.json": preprocessor,
        "tokenizer_config.json": tokenizer,
        "chat_template.json": {"chat_template": CHAT_TEMPLATE},
    }


def star_json() -> dict:
    """The configuration of the trained parts, as the release writes it."""
    return {
        "model_name": "STAR_Qwen2.5-mini_VQGAN",
        "model_type": "STARMultiModalityConfig",
        "language_model": {"model_name": "Qwen2.5-VL", "model_path": "Qwen2.5-VL-mini"},
        "pixel_encoder": {
            "model_name": "VQ_Model",
            "model_path": "VQ-Model.pt",
            "image_token_size": CODEBOOK_SIZE,
            "n_embed": CODEBOOK_DIM,
            "num_tokens": IMAGE_TOKENS,
            "num_heads": VQ_HEADS,
            "ch": VQ_CH,
            "ch_mult": VQ_CH_MULT,
            "z_channels": Z_CHANNELS,
        },
        "pixel_adapter": {"model_name": "MLP_GELU", "depth": 2, "input_dim": CODEBOOK_DIM, "n_embed": HIDDEN},
        "stacked_ar": {"num_layers": STACKED_LAYERS},
        "pixel_output_head": {
            "image_token_embed": 4096,
            "image_token_size": CODEBOOK_SIZE,
            "n_embed": HIDDEN,
        },
        "torch_dtype": "float32",
    }


if __name__ == "__main__":
    given = [argument for argument in sys.argv[1:] if argument != "--diffusion"]
    if len(given) != 1 or given[0].startswith("-"):
        sys.exit("usage: python -m reference.mini [--diffusion] FOLDER")
    write_checkpoint(Path(given[0]), diffusion=len(given) < len(sys.argv) - 1)
