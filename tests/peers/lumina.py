"""diffusers' own Lumina-Image-2.0 transformer with STAR's weights.

STAR's transformer differs in three ways. Its image tokens are wider, which is a setting of diffusers' class
(`in_channels`). They are two halves, one below the other, which an image of twice the height is. And its
lower half goes through a small network before the layers, which a hook adds here. So both compute the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from diffusers import Lumina2Transformer2DModel
from torch import Tensor, nn

from engines.inputs.latents import map_from_patches, patches_from_map
from reference.containers import LazyTensor

COMPONENT, OWN = "dit.", "ori_inp_refiner."  # of the names of weights; what diffusers does not have


def transformer_from_tensors(folder: Path, tensors: Mapping[str, LazyTensor]) -> nn.Module:
    """diffusers' class, in float32, with the `tensors` of a checkpoint whose diffusion decoder is `folder`.

    Every weight that it has is given, and every weight is used.
    """
    settings = json.loads((folder / "transformer" / "config.json").read_text())
    weights = {
        name.removeprefix(COMPONENT): lazy.load().float()
        for name, lazy in tensors.items()
        if name.startswith(COMPONENT)
    }
    own = {name.removeprefix(OWN): weights.pop(name) for name in list(weights) if name.startswith(OWN)}
    places = settings["patch_size"] ** 2
    channels = weights["x_embedder.weight"].shape[1] // places
    kept = {name: value for name, value in settings.items() if not name.startswith("_")}
    model = Lumina2Transformer2DModel(
        **kept | {"in_channels": channels, "out_channels": settings["in_channels"]}
    )
    model.load_state_dict(weights)
    size = settings["hidden_size"]
    lower = nn.Sequential(
        nn.Linear(size, size), nn.GELU(approximate="tanh"), nn.Linear(size, size, bias=False)
    )
    lower.load_state_dict(own)

    def refine(_: nn.Module, given: tuple, image: Tensor) -> Tensor:
        half = image.shape[1] // 2
        return torch.cat([image[:, :half], lower(image[:, half:])], dim=1)

    model.noise_refiner[-1].register_forward_hook(refine)
    return model.eval().requires_grad_(False)


def call_of(model: nn.Module, feeds: Mapping[str, np.ndarray], time: float) -> Callable[[], np.ndarray]:
    """A call with the inputs of `dit` but for its tables: returns the velocity [N, T, 4, c] in patches."""
    halves = [np.concatenate([feeds[half], feeds["vq_map"]], axis=-1) for half in ("latents", "source")]
    image = torch.from_numpy(np.concatenate([map_from_patches(half) for half in halves], axis=2))
    rows = len(image)
    caption = torch.from_numpy(feeds["caption"]).expand(rows, -1, -1)
    mask, times = torch.ones(caption.shape[:2], dtype=torch.bool), torch.full((rows,), time)

    def call() -> np.ndarray:
        with torch.inference_mode():
            found = model(image, times, caption, mask, return_dict=False)[0]
        return patches_from_map(found[:, :, : found.shape[2] // 2].numpy())

    return call
