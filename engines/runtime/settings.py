"""The settings of a task: their ranges, and what they are where none was given."""

from __future__ import annotations

from typing import Any

from ..bundle.manifest import ModelSpec, SamplingSpec
from ..ranges import between
from .gumbel import check_seed
from .sampler import check_sampling

IMAGES_LIMIT = 128  # images in one call; each needs two cache rows


def sampling_settings(
    defaults: SamplingSpec,
    model: ModelSpec,
    *,
    cfg: float | None,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    greedy: bool,
    num_images: int,
) -> dict[str, Any]:
    """The keywords of a loop's `draw`: what was given, or else the `defaults` of the task.

    A `top_k` larger than the codebook keeps all of it, as in the release. Raises UsageError for a setting out
    of range.
    """
    between("num_images", num_images, IMAGES_LIMIT)
    check_seed(seed)
    cfg = defaults.guidance if cfg is None else cfg
    top_k = min(defaults.top_k if top_k is None else top_k, model.codebook_size)
    top_p = defaults.top_p if top_p is None else top_p
    check_sampling(guidance=cfg, top_k=top_k, top_p=top_p, top_k_limit=model.top_k_limit)
    if greedy:
        return {"guidance": cfg, "top_k": 1, "top_p": 1.0, "seed": None}
    return {"guidance": cfg, "top_k": top_k, "top_p": top_p, "seed": seed}
