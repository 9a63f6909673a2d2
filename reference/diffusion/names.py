"""The diffusion decoder's tensor names: the release's, under which its files hold them, and ours.

Below the prefix that a component has, both are the same. The transformer lies in STAR's own file, the VAE and
the text encoder in the folder in the diffusers layout.

Source: docs/diffusion.md.
"""

from __future__ import annotations

import torch
from torch import nn

from .config import DiffusionConfig
from .model import diffusion_parts
from .text_encoder import TextLayer

DIT = "diffusion_decoder.transformer."
DIT_PREFIXES = {DIT: "dit."}
VAE_PREFIXES = {"encoder.": "vae_encoder.", "decoder.": "vae_decoder."}
TEXT_PREFIXES = {"embed_tokens.": "text_embedding.", "layers.": "text_encoder.layers."}
FOLDER_PREFIXES = {"vae": VAE_PREFIXES, "text_encoder": TEXT_PREFIXES}


def is_unused(name: str, config: DiffusionConfig) -> bool:
    """Whether the release's name of a text encoder's tensor is of its last layer or its final norm."""
    return name.startswith((f"layers.{config.text_encoder.num_layers}.", "norm."))


def stored_shapes(config: DiffusionConfig) -> dict[str, dict[str, tuple[int, ...]]]:
    """Part (dit, vae, text_encoder) -> release name -> shape, of every tensor that the release's files have.

    With the text encoder's last layer and final norm, which nothing here uses.
    """
    with torch.device("meta"):
        parts = nn.ModuleDict(diffusion_parts(config))
        last = TextLayer(config.text_encoder, rotate=lambda x, cos, sin: x)
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for part, prefixes in (("dit", DIT_PREFIXES), *FOLDER_PREFIXES.items()):
        found[part] = {
            release + name[len(ours) :]: tuple(tensor.shape)
            for name, tensor in parts.state_dict().items()
            for release, ours in prefixes.items()
            if name.startswith(ours)
        }
    unused = f"layers.{config.text_encoder.num_layers}."
    found["text_encoder"] |= {unused + name: tuple(t.shape) for name, t in last.state_dict().items()}
    found["text_encoder"]["norm.weight"] = (config.text_encoder.hidden_size,)
    return found
