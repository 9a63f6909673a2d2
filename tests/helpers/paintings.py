"""Paintings of the reference's diffusion decoder, each of whose parts may compute in a type of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reference.diffusion import tasks
from reference.model import Star
from star_export.golden.oracle import resident

from .official_diffusion import CASES, SYSTEM_PROMPT, arrays, golden

PARTS = ("text_encoder", "dit", "vae_encoder", "vae_decoder")
MAX_TOKENS = 256
PROMPT = "a photo of a red cat"


@dataclass(frozen=True)
class Given:
    """What one painting starts from: ids [1, L], image ids [N, T], noise [N, c, q, q], and of an edit the VAE
    encoder's image [1, 3, R, R] and noise [1, c, q, q]."""

    name: str
    prompt_ids: Tensor
    image_ids: Tensor
    noise: Tensor
    steps: int
    guidance: tasks.Guidance
    source: Tensor | None = None
    source_noise: Tensor | None = None


@dataclass(frozen=True)
class Painting:
    """The caption [1, L, T], the latents after each step [steps, N, c, q, q], and the image: uint8 [N, H, W,
    3], made of `decoded`, which is as the VAE decoder gives it."""

    caption: Tensor
    latents: Tensor
    decoded: Tensor
    image: Tensor


class Widened:
    """A module that takes and gives float32, and computes in `dtype`."""

    def __init__(self, module: nn.Module, dtype: torch.dtype):
        self.module, self.dtype = module, dtype
        self.config = getattr(module, "config", None)

    def __call__(self, *given):
        return self.module(*(self._narrow(x) for x in given)).float()

    def _narrow(self, given):
        if isinstance(given, tuple):
            return tuple(self._narrow(x) for x in given)
        return given.to(self.dtype) if given.is_floating_point() else given


def official(names: tuple[str, ...]) -> list[Given]:
    """The official cases of these names."""
    found = []
    for name in names:
        case = CASES[name]
        edit = case["task"] == "edit"
        found.append(
            Given(
                name,
                golden(f"{name}.prompt_ids")[None],
                golden(f"{name}.codes"),
                golden(f"{name}.noise"),
                case["steps"],
                tasks.Guidance(case["g_txt"], case["g_img"], case.get("g_vq", 0.0)),
                golden(f"{name}.source") if edit else None,
                golden(f"{name}.source_noise") if edit else None,
            )
        )
    assert all(f"{case.name}.noise" in arrays() for case in found)
    return found


def made_up(star: Star, tokenizer: str, *, resolution: int, steps: int) -> list[Given]:
    """An image and an edit by any model: random image ids, and a source of smooth colours."""
    from tokenizers import Tokenizer

    config, random = star.config, torch.Generator().manual_seed(1)
    assert config.diffusion
    ids = torch.tensor([Tokenizer.from_file(tokenizer).encode(SYSTEM_PROMPT + PROMPT).ids[:MAX_TOKENS]])
    image_ids = torch.randint(config.vq.codebook_size, (1, config.vq.image_tokens), generator=random)
    shape = (1, config.diffusion.vae.latent_channels, resolution // 8, resolution // 8)
    noise, source_noise = (torch.randn(shape, generator=random) for _ in range(2))
    colours = torch.rand(1, 3, 4, 4, generator=random) * 2 - 1
    source = nn.functional.interpolate(colours, size=(resolution, resolution), mode="bilinear")
    return [
        Given("image", ids, image_ids, noise, steps, tasks.Guidance(4.5, 1.05)),
        Given("edit", ids, image_ids, noise, steps, tasks.Guidance(3.0, 1.8, 1.0), source, source_noise),
    ]


@contextlib.contextmanager
def held(star: Star, parts: Mapping[str, nn.Module]) -> Iterator[None]:
    """Keep the transformer's weights in memory, which every step needs."""
    with resident(parts.get("dit", star.dit)):
        yield


@torch.inference_mode()
def paint(star: Star, given: Given, others: Mapping[str, tuple[nn.Module, torch.dtype]]) -> Painting:
    """Paint with `star` in float32, but for the parts in `others`: the module and the type it computes in."""
    assert star.config.diffusion
    parts = {name: Widened(*others.get(name, (getattr(star, name), torch.float32))) for name in PARTS}
    caption, empty = (
        tasks.encode_text(star.text_embedding, parts["text_encoder"], ids)  # type: ignore[arg-type]
        for ids in (given.prompt_ids, torch.tensor([[star.config.diffusion.bos]]))
    )
    vq = tasks.vq_map(star.codebook, given.image_ids, side=given.noise.shape[-1])
    if given.source is None:
        channels = given.noise.shape[1]
        rows = tasks.generate_rows(caption, empty, vq, latent_channels=channels)
    else:
        moments = parts["vae_encoder"](given.source)
        assert given.source_noise is not None
        source = tasks.source_latent(moments, given.source_noise, star.config.diffusion.vae)
        rows = tasks.edit_rows(caption, empty, vq, source)
    schedule = tasks.schedule(given.steps, shift=star.config.diffusion.time_shift, sigmas_bf16=False)
    steps = tasks.paint(parts["dit"], rows, given.noise, schedule, given.guidance)  # type: ignore[arg-type]
    latents = torch.stack([step.latents for step in steps])
    decoded = parts["vae_decoder"](latents[-1])
    return Painting(caption, latents, decoded, tasks.images_from_decoded(decoded.nan_to_num()))
