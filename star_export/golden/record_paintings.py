"""Let the reference paint an image and an edit, with the weights that a bundle stores, in a few steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from engines.inputs.caption import Captions
from engines.inputs.latents import FACTOR
from engines.runtime.normal import PAINT, SOURCE, normal_noise
from engines.runtime.painting import EDIT, GENERATE, Painting
from reference.diffusion import tasks

from ..components import whole
from ..graph.wrappers import FoldedStar
from ..tensor_files import save_tensors
from .cases import Tensors
from .compare import compare
from .oracle import resident
from .paintings import RESOLUTION
from .record import Oracle, arithmetic, module_of, stars_of
from .runs import HELD

STEPS, FEW_STEPS = 4, 2  # of a small model, and of one whose weights are read again at every call
SQUARE = (tasks.SOURCE_SIDE, tasks.SOURCE_SIDE)
PARTS = ("text_embedding", "text_encoder", "dit", "vae_encoder", "vae_decoder")


@dataclass(frozen=True)
class Asked:
    """What is painted: the `image_ids` int64 [1, T] of `prompt`, as an edit of `image` uint8 [H, W, 3] if
    there is one."""

    prompt: str
    image_ids: np.ndarray
    image: np.ndarray | None = None


def record_paintings(
    oracle: Oracle, captions: Captions, asked: dict[str, Asked], *, seed: int, rope_bf16: bool, path: Path
) -> None:
    """Write to `path` what the reference paints: case -> the latents after each step, and the image.

    Noise is recorded as `component_golden` does, of the arithmetics that the bundle has.
    """
    numbers = sum(parameter.numel() for parameter in oracle.star.parameters())
    steps = STEPS if numbers <= HELD else FEW_STEPS
    parts = [whole(name, oracle.star.config) for name in PARTS]
    stars = {kind: star for part in parts for kind, star in stars_of(part, oracle).items()}
    recorded: Tensors = {}
    for case, one in asked.items():
        given = _given(one, seed=seed, steps=steps)
        recorded |= {f"{case}/in/{name}": np.ascontiguousarray(array) for name, array in given.items()}
        found = {}
        for kind, star in stars.items():
            with torch.inference_mode(), resident(*[star] * (numbers <= HELD)), _all(kind, star, oracle):
                found[kind] = painted(star, captions, one, given, rope_bf16=rope_bf16)
        wanted = found.pop("")
        recorded |= {f"{case}/out/{name}": array for name, array in wanted.items()}
        for kind, got in found.items():
            apart = compare(got, wanted, tolerances=dict.fromkeys(wanted, 1.0))
            recorded |= {f"{case}/{kind}/{x.tensor}": np.array(x.value, np.float32) for x in apart}
    save_tensors(recorded, path)


def painted(
    star: FoldedStar, captions: Captions, asked: Asked, given: Tensors, *, rope_bf16: bool
) -> Tensors:
    """What `star` paints of `asked` with the settings `given`: the latents after each step float32 [n, 1, c,
    q, q], and the image float32 [1, 3, R, R]."""
    config, side = star.config.diffusion, RESOLUTION // FACTOR
    assert config
    parts: dict[str, Any] = {name: _Float32(star.get_submodule(name)) for name in (*PARTS, "codebook")}
    seed, shape = int(given["seed"][0]), (config.vae.latent_channels, side, side)
    guidance = tasks.Guidance(*map(float, given["guidance"]))

    def noise(what: int) -> Tensor:
        return torch.from_numpy(normal_noise(seed, images=1, shape=shape, what=what))

    caption, empty = (
        tasks.encode_text(parts["text_embedding"], parts["text_encoder"], torch.from_numpy(ids))
        for ids in (captions.ids(asked.prompt)[0], captions.empty)
    )
    vq_map = tasks.vq_map(parts["codebook"], torch.from_numpy(asked.image_ids), side=side)
    if asked.image is None:
        rows = tasks.generate_rows(caption, empty, vq_map, latent_channels=shape[0])
    else:
        square = np.array(Image.fromarray(asked.image).resize(SQUARE, Image.Resampling.BILINEAR))
        moments = parts["vae_encoder"](tasks.source_from_square(torch.from_numpy(square), side=RESOLUTION))
        source = tasks.source_latent(moments, noise(SOURCE), config.vae)
        rows = tasks.edit_rows(caption, empty, vq_map, source)
    steps = tasks.schedule(int(given["steps"][0]), shift=config.time_shift, sigmas_bf16=rope_bf16)
    latents = [step.latents for step in tasks.paint(parts["dit"], rows, noise(PAINT), steps, guidance)]
    image = parts["vae_decoder"](latents[-1])
    return {"latents": torch.stack(latents).numpy(), "image": image.numpy()}


def _given(asked: Asked, *, seed: int, steps: int) -> Tensors:
    how: Painting = GENERATE if asked.image is None else EDIT
    weights = how.text_guidance, how.image_guidance, how.vq_guidance
    given = {
        "prompt": np.frombuffer(asked.prompt.encode(), np.uint8).astype(np.int64),
        "image_ids": asked.image_ids,
        "seed": np.array([seed]),
        "steps": np.array([steps]),
        "guidance": np.array(weights, np.float32),
    }
    return given if asked.image is None else given | {"image": asked.image.astype(np.float32)}


class _Float32(nn.Module):
    """A module with float32 in and out, as at the boundary of its graph, whatever it computes in."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module, self.config = module, getattr(module, "config", None)

    def forward(self, *given: Any) -> Tensor:
        dtype = next(self.module.parameters()).dtype

        def narrowed(x: Any) -> Any:
            if isinstance(x, (tuple, list)):
                return [narrowed(one) for one in x]
            return x.to(dtype) if x.is_floating_point() else x

        return self.module(*map(narrowed, given)).float()


@contextlib.contextmanager
def _all(kind: str, star: FoldedStar, oracle: Oracle) -> Iterator[None]:
    """Let all parts of `star` compute results of `kind`."""
    with contextlib.ExitStack() as stack:
        for name in PARTS:
            part = whole(name, star.config)
            stack.enter_context(arithmetic(kind, module_of(part, star), name, oracle))
        yield
