"""Tensor names: the one place that translates the release's names to ours.

Our names are those of `Star.state_dict()`. The release uses the names of transformers 4.51; files written by
5.x have two longer prefixes, which are shortened first. The rest is a table of prefixes that is read in both
directions.

Source: docs/star.md 2.2 and 2.3.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .config import StarConfig
from .diffusion.names import DIT, DIT_PREFIXES, FOLDER_PREFIXES, is_unused
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

# part -> release name -> (our name, stored shape, our shape). The parts are base, trained and vq, and of a
# diffusion decoder vae and text_encoder.
Expected = dict[str, dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]]]

NEWER_PREFIXES = {  # transformers 5.x -> 4.51
    "model.language_model.": "model.",
    "model.visual.": "visual.",
    "stacked_ar.model.language_model.": "stacked_ar.model.",
}
# What DistributedDataParallel, torch.compile and training scripts put before all names of a model.
WRAPPERS = ("module.", "_orig_mod.", "model.")
# The release's files hold these too, but the model does not use them.
SET_ASIDE = ("diffusion_decoder.", "quantize.codebook_used")


def is_set_aside(name: str, part: str, config: StarConfig) -> bool:
    """Whether the model does not use a part's tensor of this release name, which it may hold."""
    if part == "text_encoder" and config.diffusion:
        return is_unused(name, config.diffusion)
    return name.startswith(SET_ASIDE) and not (config.diffusion and name.startswith(DIT))


def wrapper_of(stored: Iterable[str]) -> str:
    """What wrappers put before all names of a `.pt`, such as `module._orig_mod.`; empty for a release's."""
    names, found = list(stored), ""
    while names and (wrapper := next((w for w in WRAPPERS if all(n.startswith(w) for n in names)), "")):
        names, found = [name[len(wrapper) :] for name in names], found + wrapper
    return found


def release_name(stored: str) -> str:
    """The name that transformers 4.51 gives a stored tensor, from either spelling."""
    return replace_prefix(stored, NEWER_PREFIXES) or stored


def replace_prefix(name: str, prefixes: dict[str, str]) -> str | None:
    """The name with its first matching prefix replaced, or None if no prefix matches."""
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name[len(old) :]
    return None


def prefixes_of(config: StarConfig) -> dict[str, dict[str, str]]:
    """Part -> the release's prefixes of its names -> ours."""
    if config.diffusion is None:
        return PREFIXES
    return PREFIXES | FOLDER_PREFIXES | {"trained": TRAINED_PREFIXES | DIT_PREFIXES}


def aliases(config: StarConfig) -> dict[str, str]:
    """Names in `Star.state_dict()` that share another name's tensor -> that other name."""
    shared = {
        "vq_encoder.codebook.weight": "codebook.weight",
        "vq_decoder.codebook.weight": "codebook.weight",
    }
    return shared | ({"text_head.weight": "token_embedding.weight"} if config.tie_word_embeddings else {})


def expected_tensors(config: StarConfig) -> Expected:
    """The tensors that the files must hold: part -> release name -> (our name, stored shape, our shape)."""
    with torch.device("meta"):
        ours = {name: tuple(tensor.shape) for name, tensor in Star(config).state_dict().items()}
    for name in aliases(config):
        del ours[name]
    vision = config.vision
    patch_shape = (vision.hidden_size, 3, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    # The release stores a Conv3d, which is a linear layer on flattened patches here.
    stored_shapes = ours | {"vision_encoder.patch_embed.weight": patch_shape}
    found: Expected = {}
    for part, prefixes in prefixes_of(config).items():
        backwards = {ours_prefix: release_prefix for release_prefix, ours_prefix in prefixes.items()}
        named = {name: replace_prefix(name, backwards) for name in ours}
        found[part] = {
            release: (name, stored_shapes[name], ours[name]) for name, release in named.items() if release
        }
    assert sum(map(len, found.values())) == len(ours)
    return found
