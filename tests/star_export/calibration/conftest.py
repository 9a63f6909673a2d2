"""The miniature as calibration meets it: its weights, its chat, and a Star with the folded image table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from engines.bundle.manifest import ModelSpec
from engines.inputs.prompt import Chat
from reference.config import StarConfig, config_from_files
from reference.containers import LazyTensor
from reference.weights import load_star, named_tensors, resolve_checkpoint
from star_export.exporter.model_spec import model_spec_from_checkpoint, tokenizer_files
from star_export.graph.wrappers import FoldedStar


@dataclass(frozen=True)
class Miniature:
    config: StarConfig
    tensors: Mapping[str, LazyTensor]
    star: FoldedStar
    chat: Chat
    model: ModelSpec


@pytest.fixture(scope="session")
def miniature(mini_checkpoint: Path) -> Miniature:
    """Read it, never write into its weights."""
    files = resolve_checkpoint(str(mini_checkpoint))
    config = config_from_files(files.config_json, files.qwen_folder)
    model = model_spec_from_checkpoint(files, config, rope_bf16=True)
    loaded, star = load_star(files), FoldedStar(config)
    star.load_state_dict(loaded.state_dict(), strict=False)
    with torch.inference_mode():
        table = loaded.image_embedding(torch.arange(config.vq.codebook_size))
    star.image_table.weight.data = table.clone()
    host = tokenizer_files(files, model)
    chat = Chat(*(host[name].decode() for name in ("tokenizer.json", "chat_template.jinja")), model)
    tensors = named_tensors(files, config)
    return Miniature(config, tensors, star.eval().requires_grad_(False), chat, model)
