"""Configuration files and tensor names of the released models,
STAR-3B and STAR-7B on Qwen2.5-VL: facts of their pages (docs/star.md 1 and 2)."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

from reference.config import StarConfig, config_from_files
from reference.names import SET_ASIDE
from tests.helpers.official import GOLDEN, SPECIAL

SIZES = {
    "3B": {
        "hidden": 2048,
        "layers": 36,
        "heads": 16,
        "kv_heads": 2,
        "intermediate": 11008,
        "vocab": 151936,
        "tied": True,
        "stacked": 16,
        "adapter_depth": 2,
    },
    "7B": {
        "hidden": 3584,
        "layers": 28,
        "heads": 28,
        "kv_heads": 4,
        "intermediate": 18944,
        "vocab": 152064,
        "tied": False,
        "stacked": 14,
        "adapter_depth": 4,
    },
}
GENERATION = {
    "bos_token_id": 151643,
    "pad_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "repetition_penalty": 1.05,
    "temperature": 1e-6,
    "transformers_version": "4.49.0",
}
TOKENIZER = {
    "model": {"type": "BPE", "vocab": {}, "merges": []},
    "added_tokens": [
        {"id": id, "content": f"<|{name}|>"} for name, id in dataclasses.asdict(SPECIAL).items()
    ],
}


def star_json(size: str) -> dict:
    facts = SIZES[size]
    return {
        "model_name": f"STAR_Qwen2.5-{size}_VQGAN",
        "model_type": "STARMultiModalityConfig",
        "language_model": {
            "model_name": "Qwen2.5-VL",
            "model_path": f"checkpoints/Qwen2.5-VL-{size}-Instruct",
        },
        "pixel_encoder": {
            "model_name": "VQ_Model",
            "model_path": "checkpoints/VQ-Model.pt",
            "image_token_size": 65536,
            "n_embed": 512,
            "num_tokens": 576,
            "num_heads": 8,
        },
        "pixel_adapter": {
            "model_name": "MLP_GELU",
            "depth": facts["adapter_depth"],
            "input_dim": 512,
            "n_embed": facts["hidden"],
        },
        "stacked_ar": {"num_layers": facts["stacked"]},
        "pixel_output_head": {
            "image_token_embed": 4096,
            "image_token_size": 65536,
            "n_embed": facts["hidden"],
        },
        "pixel_decoder": {"model_name": "LUMINA2", "model_path": "checkpoints/lumina-image2"},
        "torch_dtype": "bfloat16",
    }


def qwen_json(size: str) -> dict:
    """config.json as transformers 4.51 lays it out."""
    facts = SIZES[size]
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "vision_token_id": 151654,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "hidden_act": "silu",
        "hidden_size": facts["hidden"],
        "initializer_range": 0.02,
        "intermediate_size": facts["intermediate"],
        "max_position_embeddings": 128000,
        "max_window_layers": facts["layers"],
        "model_type": "qwen2_5_vl",
        "num_attention_heads": facts["heads"],
        "num_hidden_layers": facts["layers"],
        "num_key_value_heads": facts["kv_heads"],
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": facts["tied"],
        "torch_dtype": "bfloat16",
        "transformers_version": "4.41.2",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "depth": 32,
            "hidden_act": "silu",
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "in_chans": 3,
            "out_hidden_size": facts["hidden"],
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vocab_size": facts["vocab"],
    }


def nested_qwen_json(flat: dict) -> dict:
    """The same as transformers 5.x lays it out."""
    top_keys = {
        "architectures",
        "model_type",
        "vision_config",
        "image_token_id",
        "video_token_id",
        "vision_start_token_id",
        "vision_end_token_id",
        "tie_word_embeddings",
        "transformers_version",
    }
    elsewhere = top_keys | {"rope_scaling", "rope_theta", "torch_dtype", "vision_token_id"}
    text = {key: value for key, value in flat.items() if key not in elsewhere}
    text |= {
        "model_type": "qwen2_5_vl_text",
        "dtype": "bfloat16",
        "layer_types": ["full_attention"] * flat["num_hidden_layers"],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": flat["rope_theta"],
            "mrope_section": flat["rope_scaling"]["mrope_section"],
        },
    }
    vision = {
        key: value
        for key, value in flat["vision_config"].items()
        if key not in ("in_chans", "spatial_patch_size")
    }
    vision |= {"in_channels": 3, "model_type": "qwen2_5_vl_vision", "initializer_range": 0.02}
    top = {key: value for key, value in flat.items() if key in top_keys}
    return copy.deepcopy(top | {"dtype": "bfloat16", "text_config": text, "vision_config": vision})


def write_configs(folder: Path, star: dict, qwen: dict, generation: dict = GENERATION) -> StarConfig:
    """Write the JSON files, and as much of the tokenizer's as is read; read them back as the loader does."""
    (folder / "qwen").mkdir(parents=True, exist_ok=True)
    (folder / "STAR.json").write_text(json.dumps(star))
    (folder / "qwen" / "config.json").write_text(json.dumps(qwen))
    (folder / "qwen" / "generation_config.json").write_text(json.dumps(generation))
    (folder / "qwen" / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    return config_from_files(folder / "STAR.json", folder / "qwen")


def listed(file: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a key list in tests/golden."""
    rows = [line.split("\t") for line in (GOLDEN / file).read_text().splitlines() if not line.startswith("#")]
    return {name: tuple(map(int, shape.split("x"))) for name, shape in rows}


def stored_shapes(expected: dict) -> dict[str, tuple[int, ...]]:
    """Name -> shape in the file, of one part of `expected_tensors`."""
    return {name: stored for name, (_, stored, _) in expected.items()}


def without_set_aside(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The tensors that the loader reads."""
    return {name: shape for name, shape in shapes.items() if not name.startswith(SET_ASIDE)}
