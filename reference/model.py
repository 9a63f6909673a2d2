"""STAR: its components and how they fit together. `tasks.py` holds what one does with them.

Source: docs/star.md 1; MM-MVR/STAR, star/models/model.py.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from .config import StarConfig
from .decoder import Decoder, kv_cache_attention
from .diffusion.model import diffusion_parts
from .layers import rotate_half
from .vision import VisionEncoder
from .vq import VQDecoder, VQEncoder


class Star(nn.Module):
    """The model: one attribute per component, under the component's name.

    `attention` and `rotate` are the two operations that a compiler may replace by its own (signatures:
    `decoder.kv_cache_attention`, `layers.rotate_half`). `rope_bf16` rounds the rotary frequencies as the
    release does (docs/star.md 0.2). Build the model under `torch.device("meta")` and let `weights.load_star`
    assign the weights.
    """

    def __init__(
        self,
        config: StarConfig,
        *,
        rope_bf16: bool = True,
        attention: Callable = kv_cache_attention,
        rotate: Callable = rotate_half,
    ):
        super().__init__()
        hidden_size, vq = config.base_ar.hidden_size, config.vq
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, hidden_size)
        self.vision_encoder = VisionEncoder(config.vision, rotate=rotate)
        self.codebook = nn.Embedding(vq.codebook_size, vq.codebook_dim)
        self.vq_encoder = VQEncoder(vq, self.codebook)
        self.vq_decoder = VQDecoder(vq, self.codebook)
        self.pixel_adapter = pixel_adapter(vq.codebook_dim, hidden_size, depth=config.adapter_depth)
        self.base_ar = Decoder(config.base_ar, rope_bf16=rope_bf16, attention=attention, rotate=rotate)
        self.stacked_ar = Decoder(config.stacked_ar, rope_bf16=rope_bf16, attention=attention, rotate=rotate)
        self.text_head = nn.Linear(hidden_size, config.vocab_size, bias=False)
        self.image_head = nn.Linear(hidden_size, vq.codebook_size)
        if config.diffusion:
            parts = diffusion_parts(config.diffusion, rope_bf16=rope_bf16, rotate=rotate)
            for name, part in parts.items():
                self.add_module(name, part)
        self.tie_text_head()

    def tie_text_head(self) -> None:
        """Share one parameter between token embedding and text head if the configuration ties them. Call it
        again after assigning weights."""
        if self.config.tie_word_embeddings:
            self.text_head.weight = self.token_embedding.weight

    def image_embedding(self, image_ids: Tensor) -> Tensor:
        """image_ids [...] -> the embeddings that the decoders take, [..., H] (docs/star.md 1.3)."""
        return self.pixel_adapter(self.codebook(image_ids))

    def constants(self) -> dict[str, Tensor]:
        """The buffers that no checkpoint stores, by name. The values are on the CPU even if the model is on
        the meta device."""
        return {
            f"{name}.rotary.{key}": value
            for name, component in self.named_children()
            if hasattr(component, "rotary")
            for key, value in component.rotary.constants().items()
        }


def pixel_adapter(codebook_dim: int, hidden_size: int, *, depth: int) -> nn.Sequential:
    """`depth` linear layers with exact GELU between them: [..., codebook_dim] -> [..., H]."""
    layers: list[nn.Module] = [nn.Linear(codebook_dim, hidden_size)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(hidden_size, hidden_size)]
    return nn.Sequential(*layers)
