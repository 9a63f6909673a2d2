"""A miniature STAR checkpoint in the release's layout, written rather than stored: for tests and for trying the program.

Every tensor is a function of its name and shape alone. Written are STAR-mini.json, STAR-mini.pt (the trained parts),
VQ-Model.pt and Qwen2.5-VL-mini/ (configuration, tokenizer, two safetensors shards with their index). The numbers are noise
of a realistic scale: good for comparing implementations, not for images. `tests/golden/` holds what the official code
computes on them, so the bytes must not change.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np

HIDDEN, LAYERS, STACKED_LAYERS, HEADS, KV_HEADS, INTERMEDIATE = 64, 4, 2, 4, 2, 160
HEAD_DIM = HIDDEN // HEADS
VOCAB = 151_936
VISION = {
    "depth": 4,
    "hidden_size": 64,
    "num_heads": 4,
    "intermediate_size": 112,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 56,
    "fullatt_block_indexes": [1, 3],
    "out_hidden_size": HIDDEN,
    "hidden_act": "silu",
    "in_chans": 3,
    "spatial_patch_size": 14,
    "tokens_per_second": 2,
}
CODEBOOK_SIZE, CODEBOOK_DIM, Z_CHANNELS, VQ_CH, VQ_CH_MULT, VQ_HEADS, RES_BLOCKS = (
    1024,
    16,
    32,
    32,
    [1, 2, 2, 4, 8],
    8,
    2,
)
IMAGE_TOKENS = 16
FIRST_SPECIAL = 151_643
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
]
WORDS = [
    "a",
    "the",
    "and",
    "of",
    "are",
    "helpful",
    "assistant",
    "blue",
    "red",
    "green",
    "cat",
    "dog",
    "star",
    "image",
    "what",
    "is",
    "color",
    "change",
    "to",
    "photo",
]
CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

Shapes = dict[str, tuple[int, ...]]


def write_checkpoint(root: Path) -> None:
    """Write the checkpoint into the folder `root` (made when absent): all files beside it first, then each moved to its name,
    the configuration last. Files of an earlier call are replaced by the same bytes. Needs tokenizers."""
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".partial-") as staged:
        write_files(Path(staged))
        written = [path for path in Path(staged).rglob("*") if path.is_file()]
        for path in sorted(written, key=lambda path: path.name == "STAR-mini.json"):
            final = root / path.relative_to(staged)
            final.parent.mkdir(exist_ok=True)
            os.replace(path, final)


def write_files(root: Path) -> None:
    import torch

    qwen = root / "Qwen2.5-VL-mini"
    qwen.mkdir()
    for name, content in base_json().items():
        write_json(qwen / name, content)
    write_tokenizer(qwen / "tokenizer.json")
    star, vq = ({name: torch.from_numpy(array) for name, array in arrays.items()} for arrays in state_dicts())
    write_shards({name.removeprefix("llm."): t for name, t in star.items() if name.startswith("llm.")}, qwen)
    torch.save(
        {"state_dict": {name: t for name, t in star.items() if not name.startswith("llm.")}},
        root / "STAR-mini.pt",
    )
    torch.save(vq, root / "VQ-Model.pt")
    write_json(root / "STAR-mini.json", star_json())


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_shards(tensors: dict, folder: Path) -> None:
    """Two safetensors shards, as the base model of the release has, and their index."""
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


def state_dicts() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(STAR's state dict with the base model under `llm.`, the VQ model's), named as in the release."""
    embedding = (VOCAB, HIDDEN)
    star = (
        {"llm.model." + name: shape for name, shape in decoder_shapes(LAYERS).items()}
        | {"llm.model.embed_tokens.weight": embedding, "llm.lm_head.weight": embedding}
        | {"llm.visual." + name: shape for name, shape in vision_shapes().items()}
        | {"stacked_ar.model." + name: shape for name, shape in decoder_shapes(STACKED_LAYERS).items()}
        | linear("pixel_adapter.layers.0", HIDDEN, CODEBOOK_DIM)
        | linear("pixel_adapter.layers.2", HIDDEN, HIDDEN)
        | linear("pixel_output_head", CODEBOOK_SIZE, HIDDEN)
    )
    vq = {name: tensor("pixel_encoder." + name, shape) for name, shape in vq_shapes().items()}
    vq["quantize.codebook_used"] = np.zeros(65_536, np.float32)
    return {name: tensor(name, shape) for name, shape in star.items()}, vq


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Noise determined by name and shape. Float32, but float64 where a fan-in scales it (the golden arrays were made so)."""
    rng = np.random.Generator(np.random.Philox(zlib.crc32(name.encode())))
    noise = rng.standard_normal(shape, dtype=np.float32)
    if name.endswith("bias"):
        return 0.05 * noise
    if len(shape) == 1:  # gains of norms
        return 1 + 0.1 * noise
    if name.endswith(("quantize.embedding.weight", "embed_tokens.weight")):
        return noise * (0.5 if "quantize" in name else 1.0)
    if name.startswith("pixel_output_head") or name.endswith("lm_head.weight"):
        noise = 3.0 * noise
    return noise.astype(np.float64) / math.sqrt(math.prod(shape[1:]))


def linear(prefix: str, outputs: int, inputs: int, *, bias: bool = True) -> Shapes:
    return {prefix + ".weight": (outputs, inputs)} | ({prefix + ".bias": (outputs,)} if bias else {})


def decoder_shapes(layers: int) -> Shapes:
    shapes: Shapes = {"norm.weight": (HIDDEN,)}
    for i in range(layers):
        p, kv_size = f"layers.{i}.", KV_HEADS * HEAD_DIM
        shapes |= {p + "input_layernorm.weight": (HIDDEN,), p + "post_attention_layernorm.weight": (HIDDEN,)}
        shapes |= linear(p + "self_attn.q_proj", HIDDEN, HIDDEN) | linear(
            p + "self_attn.o_proj", HIDDEN, HIDDEN, bias=False
        )
        shapes |= linear(p + "self_attn.k_proj", kv_size, HIDDEN) | linear(
            p + "self_attn.v_proj", kv_size, HIDDEN
        )
        for name in ("gate_proj", "up_proj"):
            shapes |= linear(p + "mlp." + name, INTERMEDIATE, HIDDEN, bias=False)
        shapes |= linear(p + "mlp.down_proj", HIDDEN, INTERMEDIATE, bias=False)
    return shapes


def vision_shapes() -> Shapes:
    size, hidden, merged = VISION["hidden_size"], VISION["intermediate_size"], VISION["hidden_size"] * 4
    shapes: Shapes = {"patch_embed.proj.weight": (size, 3, 2, 14, 14), "merger.ln_q.weight": (size,)}
    for i in range(VISION["depth"]):
        p = f"blocks.{i}."
        shapes |= {p + "norm1.weight": (size,), p + "norm2.weight": (size,)}
        shapes |= linear(p + "attn.qkv", 3 * size, size) | linear(p + "attn.proj", size, size)
        shapes |= linear(p + "mlp.gate_proj", hidden, size) | linear(p + "mlp.up_proj", hidden, size)
        shapes |= linear(p + "mlp.down_proj", size, hidden)
    return shapes | linear("merger.mlp.0", merged, merged) | linear("merger.mlp.2", HIDDEN, merged)


def conv(prefix: str, outputs: int, inputs: int, kernel: int) -> Shapes:
    return {prefix + ".weight": (outputs, inputs, kernel, kernel), prefix + ".bias": (outputs,)}


def norm(prefix: str, channels: int) -> Shapes:
    return {prefix + ".weight": (channels,), prefix + ".bias": (channels,)}


def res_block(prefix: str, inputs: int, outputs: int) -> Shapes:
    shapes = norm(prefix + ".norm1", inputs) | conv(prefix + ".conv1", outputs, inputs, 3)
    shapes |= norm(prefix + ".norm2", outputs) | conv(prefix + ".conv2", outputs, outputs, 3)
    return shapes | (conv(prefix + ".nin_shortcut", outputs, inputs, 1) if inputs != outputs else {})


def attention_block(prefix: str, channels: int) -> Shapes:
    shapes = norm(prefix + ".norm", channels)
    for name in ("q", "k", "v", "proj_out"):
        shapes |= conv(f"{prefix}.{name}", channels, channels, 1)
    return shapes


def vq_shapes() -> Shapes:
    widths = [VQ_CH * m for m in VQ_CH_MULT]
    shapes: Shapes = {"quantize.embedding.weight": (CODEBOOK_SIZE, CODEBOOK_DIM)}
    shapes |= conv("quant_conv", CODEBOOK_DIM, Z_CHANNELS, 1) | conv(
        "post_quant_conv", Z_CHANNELS, CODEBOOK_DIM, 1
    )
    shapes |= conv("encoder.conv_in", VQ_CH, 3, 3) | conv("encoder.conv_out", Z_CHANNELS, widths[-1], 3)
    shapes |= conv("decoder.conv_in", widths[-1], Z_CHANNELS, 3) | conv("decoder.conv_out", 3, widths[0], 3)
    shapes |= norm("encoder.norm_out", widths[-1]) | norm("decoder.norm_out", widths[0])
    shapes |= levels(
        "encoder", [VQ_CH, *widths], blocks=RES_BLOCKS, attended=len(widths) - 1, resample="downsample"
    )
    shapes |= levels(
        "decoder", [widths[-1], *reversed(widths)], blocks=RES_BLOCKS + 1, attended=0, resample="upsample"
    )
    for half in ("encoder", "decoder"):
        shapes |= res_block(half + ".mid.0", widths[-1], widths[-1]) | res_block(
            half + ".mid.2", widths[-1], widths[-1]
        )
        shapes |= attention_block(half + ".mid.1", widths[-1])
    return shapes


def levels(half: str, widths: list[int], *, blocks: int, attended: int, resample: str) -> Shapes:
    """The resolutions of one half; `widths` starts with the channels that come in, `attended` is the level with attention."""
    shapes: Shapes = {}
    for level, (inputs, outputs) in enumerate(zip(widths, widths[1:])):
        p = f"{half}.conv_blocks.{level}"
        for block in range(blocks):
            shapes |= res_block(f"{p}.res.{block}", outputs if block else inputs, outputs)
            shapes |= attention_block(f"{p}.attn.{block}", outputs) if level == attended else {}
        if level < len(widths) - 2:
            shapes |= conv(f"{p}.{resample}.conv", outputs, outputs, 3)
    return shapes


def write_tokenizer(path: Path) -> None:
    """A byte-level BPE that knows a few words, with Qwen's special tokens under Qwen's ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    merges: list[tuple[str, str]] = []
    for word in [["Ġ", *word] for word in WORDS] + [
        list(word) for word in ("system", "You", "user", "assistant")
    ]:
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


def base_json() -> dict[str, dict]:
    """The base model's JSON files by name."""
    config = {
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
        "config.json": config,
        "generation_config.json": generation,
        "preprocessor_config.json": preprocessor,
        "tokenizer_config.json": tokenizer,
        "chat_template.json": {"chat_template": CHAT_TEMPLATE},
    }


def star_json() -> dict:
    """The release's configuration of the trained parts."""
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
    if len(sys.argv) != 2:
        sys.exit("usage: python -m reference.mini FOLDER")
    write_checkpoint(Path(sys.argv[1]))
