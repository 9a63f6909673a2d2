"""The diffusion decoder's components, under their names."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..layers import rotate_half
from .config import DiffusionConfig
from .dit import DiT
from .text_encoder import TextEncoder
from .vae import VAEDecoder, VAEEncoder


def diffusion_parts(
    config: DiffusionConfig, *, rope_bf16: bool = True, rotate: Callable = rotate_half
) -> dict[str, nn.Module]:
    """The components by name, on the default device, without weights.

    `rope_bf16` rounds the text encoder's rotary frequencies as the release does; the transformer's are not
    rounded there.
    """
    text = config.text_encoder
    return {
        "text_embedding": nn.Embedding(text.vocab_size, text.hidden_size),
        "text_encoder": TextEncoder(text, rope_bf16=rope_bf16, rotate=rotate),
        "dit": DiT(config.dit, rotate=rotate),
        "vae_encoder": VAEEncoder(config.vae),
        "vae_decoder": VAEDecoder(config.vae),
    }
