"""A miniature of the diffusion decoder in the release's layout, generated rather than stored.

Its tensors are functions of their names and shapes alone, and `tests/golden/diffusion/` holds what the
official code computes on them, so the bytes must not change. Sizes are chosen so that mix-ups show: the axes
of the rotary embedding, the widths of caption and image, and the scale of the text encoder's attention all
differ from what they could be confused with.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import torch

from .config import DiffusionConfig, diffusion_from_folder
from .names import DIT, stored_shapes

FOLDER = "lumina-image2"
VQ_CHANNELS = 16
PIECES = (
    "You are an assistant designed to generate superior images with the superior degree of image-text "
    "alignment based on textual prompts or user prompts. <Prompt Start> a photo of the blue red green cat "
    "dog star image what is to change color and are helpful"
)  # the tokenizer knows these words
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]

MODEL_INDEX = {
    "_class_name": "Lumina2Pipeline",
    "_diffusers_version": "0.33.0",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Gemma2Model"],
    "tokenizer": ["transformers", "GemmaTokenizerFast"],
    "transformer": ["diffusers", "Lumina2Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
TRANSFORMER = {
    "_class_name": "Lumina2Transformer2DModel",
    "_diffusers_version": "0.33.0",
    "axes_dim_rope": [4, 6, 6],
    "axes_lens": [300, 512, 512],
    "cap_feat_dim": 48,
    "ffn_dim_multiplier": None,
    "hidden_size": 64,
    "in_channels": 16,
    "multiple_of": 256,
    "norm_eps": 1e-05,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "num_layers": 3,
    "num_refiner_layers": 2,
    "out_channels": None,
    "patch_size": 2,
    "sample_size": 128,
    "scaling_factor": 1.0,
}
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.33.0",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "invert_sigmas": False,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 6.0,
    "shift_terminal": None,
    "use_beta_sigmas": False,
    "use_dynamic_shifting": False,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}
VAE = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.33.0",
    "act_fn": "silu",
    "block_out_channels": [16, 32, 32, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 16,
    "latents_mean": None,
    "latents_std": None,
    "layers_per_block": 2,
    "mid_block_add_attention": True,
    "norm_num_groups": 8,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}
TEXT_ENCODER = {
    "architectures": ["Gemma2Model"],
    "model_type": "gemma2",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 30.0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "cache_implementation": "hybrid",
    "head_dim": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 48,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 8192,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "query_pre_attn_scalar": 24,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": 1024,
}
TOKENIZER = {
    "tokenizer_class": "GemmaTokenizer",
    "add_bos_token": True,
    "add_eos_token": False,
    "pad_token": "<pad>",
    "eos_token": "<eos>",
    "bos_token": "<bos>",
    "unk_token": "<unk>",
    "clean_up_tokenization_spaces": False,
    "spaces_between_special_tokens": False,
    "model_max_length": 10**30,
}
SETTINGS = {
    "model_index.json": MODEL_INDEX,
    "transformer/config.json": TRANSFORMER,
    "scheduler/scheduler_config.json": SCHEDULER,
    "vae/config.json": VAE,
    "text_encoder/config.json": TEXT_ENCODER,
    "tokenizer/tokenizer_config.json": TOKENIZER,
}

RELEASE: dict[str, dict] = {  # what of the miniature's settings the release has otherwise
    "transformer/config.json": {
        "axes_dim_rope": [32, 32, 32],
        "cap_feat_dim": 2304,
        "hidden_size": 2304,
        "num_attention_heads": 24,
        "num_kv_heads": 8,
        "num_layers": 26,
    },
    "vae/config.json": {"block_out_channels": [128, 256, 512, 512], "norm_num_groups": 32},
    "text_encoder/config.json": {
        "hidden_size": 2304,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "intermediate_size": 9216,
        "query_pre_attn_scalar": 256,
        "vocab_size": 256_000,
    },
}


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Noise determined by name and shape: float32, or float64 where a fan-in scales it."""
    rng = np.random.Generator(np.random.Philox(zlib.crc32(name.encode())))
    noise = rng.standard_normal(shape, dtype=np.float32)
    if name.endswith("bias"):
        return 0.05 * noise
    if len(shape) == 1:  # the gain of a norm; Gemma's are stored as the difference from 1
        return 0.1 * noise if name.startswith("text_encoder.") else 1 + 0.1 * noise
    if name == "vae.decoder.conv_out.weight":  # keeps most pixels within the range that is shown
        noise = 0.5 * noise
    return noise / np.sqrt(np.prod(shape[1:]))


def state_dicts(config: DiffusionConfig) -> dict[str, dict[str, np.ndarray]]:
    """Part (dit, vae, text_encoder) -> the tensors of its file, by the release's names."""
    prefixes = {"dit": "", "vae": "vae.", "text_encoder": "text_encoder."}
    return {
        part: {name: tensor(prefixes[part] + name, shape) for name, shape in shapes.items()}
        for part, shapes in stored_shapes(config).items()
    }


def write_settings(root: Path, **changes: dict) -> None:
    """Write the small files of `lumina-image2/` as `root`; `changes` maps a file to its other values."""
    for name, values in SETTINGS.items():
        write_json(root / name, values | changes.get(name, {}))
    write_tokenizer(root / "tokenizer" / "tokenizer.json")


def write_folder(folder: Path, *, vq_channels: int = VQ_CHANNELS) -> dict[str, torch.Tensor]:
    """Write `lumina-image2/` into `folder`; returns the transformer's tensors, which are of STAR's file."""
    root = folder / FOLDER
    write_settings(root)
    found = {
        part: {name: torch.from_numpy(array) for name, array in arrays.items()}
        for part, arrays in state_dicts(diffusion_from_folder(root, vq_channels=vq_channels)).items()
    }
    write_weights(root, found["vae"], found["text_encoder"])
    assert all(name.startswith(DIT) for name in found["dit"])
    return found["dit"]


def write_weights(root: Path, vae: dict[str, torch.Tensor], text: dict[str, torch.Tensor]) -> None:
    """The VAE in one file, and the text encoder in two shards with their index."""
    from safetensors.torch import save_file

    save_file(vae, root / "vae" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    names, weight_map = list(text), {}
    half = len(names) // 2
    for number, part in enumerate((names[:half], names[half:]), start=1):
        shard = f"model-{number:05d}-of-00002.safetensors"
        save_file(
            {name: text[name] for name in part}, root / "text_encoder" / shard, metadata={"format": "pt"}
        )
        weight_map |= dict.fromkeys(part, shard)
    total = sum(tensor.numel() * tensor.element_size() for tensor in text.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(root / "text_encoder" / "model.safetensors.index.json", index)


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_tokenizer(path: Path) -> None:
    """Gemma's kind: BPE with byte fallback, a space as U+2581, <bos> in front, nothing behind."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    merges: list[tuple[str, str]] = []
    for word in [["\u2581", *word] for word in PIECES.split()] + [list("You")]:
        while len(word) > 1:
            if (pair := (word[0], word[1])) not in merges:
                merges.append(pair)
            word = ["".join(pair), *word[2:]]
    pieces = SPECIAL + [f"<0x{byte:02X}>" for byte in range(256)] + [chr(c) for c in range(33, 127)]
    pieces += ["\u2581", *("".join(pair) for pair in merges)]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([AddedToken(s, normalized=False, special=True) for s in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 2)]
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
