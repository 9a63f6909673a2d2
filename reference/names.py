"""Names of tensors: the one place where the release's become ours.

Our names are `Star.state_dict()`'s. The release names by transformers 4.51; files written by 5.x have two longer prefixes, which
are shortened first. After that the translation is a table of prefixes, read in both directions.

Source: STAR.md 2.2 and 2.3.
"""

from __future__ import annotations

import torch

from .config import StarConfig
from .model import Star

BASE_PREFIXES = {
    "visual.patch_embed.proj.": "vision_encoder.patch_embed.",
    "visual.": "vision_encoder.",
    "model.embed_tokens.": "token_embedding.",
    "model.layers.": "base_ar.layers.",
    "model.norm.": "base_ar.norm.",
    "lm_head.": "text_head.",
}
TRAINED_PREFIXES = {
    "pixel_adapter.layers.": "pixel_adapter.",
    "stacked_ar.model.": "stacked_ar.",
    "pixel_output_head.": "image_head.",
}
VQ_PREFIXES = {
    "quant_conv.": "vq_encoder.quant_conv.",
    "post_quant_conv.": "vq_decoder.post_quant_conv.",
    "encoder.": "vq_encoder.",
    "decoder.": "vq_decoder.",
    "quantize.embedding.": "codebook.",
}
PREFIXES = {"base": BASE_PREFIXES, "trained": TRAINED_PREFIXES, "vq": VQ_PREFIXES}

NEWER_PREFIXES = {
    "model.language_model.": "model.",
    "model.visual.": "visual.",  # transformers 5.x -> 4.51
    "stacked_ar.model.language_model.": "stacked_ar.model.",
}
SET_ASIDE = (
    "diffusion_decoder.",
    "quantize.codebook_used",
)  # in release files, not part of what is computed here


def release_name(stored: str) -> str:
    """A stored name in either spelling -> transformers 4.51's."""
    return replace_prefix(stored, NEWER_PREFIXES) or stored


def replace_prefix(name: str, prefixes: dict[str, str]) -> str | None:
    """The name with the first prefix that fits exchanged; None when none does."""
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name[len(old) :]
    return None


def aliases(config: StarConfig) -> dict[str, str]:
    """Names of `Star.state_dict()` that are another's tensor -> that other name."""
    shared = {
        "vq_encoder.codebook.weight": "codebook.weight",
        "vq_decoder.codebook.weight": "codebook.weight",
    }
    return shared | ({"text_head.weight": "token_embedding.weight"} if config.tie_word_embeddings else {})


def expected_tensors(
    config: StarConfig,
) -> dict[str, dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]]]:
    """What the files must hold: part (base, trained, vq) -> release name -> (our name, stored shape, our shape)."""
    with torch.device("meta"):
        ours = {name: tuple(tensor.shape) for name, tensor in Star(config).state_dict().items()}
    for name in aliases(config):
        del ours[name]
    vision = config.vision
    patch_shape = (vision.hidden_size, 3, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    stored_shapes = ours | {
        "vision_encoder.patch_embed.weight": patch_shape
    }  # a Conv3d there, flattened here
    found: dict[str, dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]]] = {}
    for part, prefixes in PREFIXES.items():
        backwards = {ours_prefix: release_prefix for release_prefix, ours_prefix in prefixes.items()}
        named = {name: replace_prefix(name, backwards) for name in ours}
        found[part] = {
            release: (name, stored_shapes[name], ours[name]) for name, release in named.items() if release
        }
    assert sum(map(len, found.values())) == len(ours)
    return found
