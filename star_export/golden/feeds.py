"""The inputs of the recorded cases: made of random numbers that depend only on a graph's name.

How many there are follows from the model's size; the outputs are recorded in `record.py`.
"""

from __future__ import annotations

import zlib

import numpy as np

from engines.bundle.manifest import GoldenSpec
from engines.runtime.gumbel import gumbel_noise
from reference import vision
from reference.config import DecoderConfig, StarConfig
from reference.diffusion.dit import rotary_cos_sin, time_features

from ..components import Part, diffusion_of
from ..graph import wrappers
from .cases import POISON

Case = dict[str, np.ndarray]  # input name -> value
CAPACITY, SEED = 24, 7
NOISE = {"greedy": 0, "narrow": 1e4}  # what the noise of a case of draws is multiplied by
QUIET = 1e-3  # inputs of this size have the variance of a norm's epsilon
LARGE = 1 << 30  # weights; recording a model of more takes minutes, so it gets fewer and shorter cases
SPECS = {  # is the model large?
    False: GoldenSpec(images=3, decoder_cases=6, draw_cases=5, image_tokens=16, answer_tokens=8),
    True: GoldenSpec(images=1, decoder_cases=4, draw_cases=3, image_tokens=3, answer_tokens=3),
}


def rng_of(name: str) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(zlib.crc32(name.encode())))


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)


def _token_cases(
    config: StarConfig, rng: np.random.Generator, spec: GoldenSpec, part: Part
) -> dict[str, Case]:
    return {
        f"{b}x{s}": {"input_ids": rng.integers(0, config.vocab_size, (b, s))}
        for b, s in ((1, 1), (2, 7), (3, 30))
    }


def _image_token_cases(
    config: StarConfig, rng: np.random.Generator, spec: GoldenSpec, part: Part
) -> dict[str, Case]:
    return {
        f"{n}x{t}": {"image_ids": rng.integers(0, config.vq.codebook_size, (n, t))}
        for n, t in ((1, 1), (2, 7), (3, 30))
    }


def _vision_cases(
    config: StarConfig, rng: np.random.Generator, spec: GoldenSpec, part: Part
) -> dict[str, Case]:
    pixels = 3 * config.vision.temporal_patch_size * config.vision.patch_size**2
    cases = {}
    for h, w in ((2, 2), (4, 10), (14, 6), (18, 20)):
        cos, sin = vision.rotary_cos_sin(config.vision, grid_h=h, grid_w=w)
        cases[f"{h}x{w}"] = {
            "pixel_values": _normal(rng, h * w, pixels),
            "rotary_cos": cos.numpy(),
            "rotary_sin": sin.numpy(),
            "window_ids": vision.window_ids(config.vision, grid_h=h, grid_w=w).numpy(),
        }
    return cases


def _image_cases(
    config: StarConfig, rng: np.random.Generator, spec: GoldenSpec, part: Part
) -> dict[str, Case]:
    size = config.vq.image_size
    return {
        f"{n}": {"image": rng.uniform(-1, 1, (n, 3, size, size)).astype(np.float32)}
        for n in range(1, spec.images + 1)
    }


def _image_id_cases(
    config: StarConfig, rng: np.random.Generator, spec: GoldenSpec, part: Part
) -> dict[str, Case]:
    return {
        f"{n}": {"image_ids": rng.integers(0, config.vq.codebook_size, (n, config.vq.image_tokens))}
        for n in range(1, spec.images + 1)
    }


def _decoder_cases(
    config: StarConfig, rng: np.random.Generator, spec: GoldenSpec, part: Part
) -> dict[str, Case]:
    """The cases of a decoder's layers. Slots after the filled ones hold poison.

    A large model's parts lack those that the rung "decoder steps" checks anyway: caches are large. The second
    row of the prefill is quiet, so that the epsilon of the first norm matters.
    """
    decoder: DecoderConfig = getattr(config, part.component)
    plan = {  # rows, new positions, write indices, filled slots
        "prefill": (2, 7, (0, 0), 0),
        "decode": (2, 1, (7, 5), 7),
        "rewind": (2, 2, (3, 6), 16),
        "last_slot": (2, 1, (CAPACITY - 1, CAPACITY - 1), CAPACITY - 1),
        "steps": (2, 3, (9, 4), 9),
        "one_row": (1, 4, (2,), 2),
    }
    return {
        case: _decoder_case(decoder, part.layers or range(0), rng, rows, new, writes, filled)
        for case, (rows, new, writes, filled) in list(plan.items())[: spec.decoder_cases]
    }


def _decoder_case(
    decoder: DecoderConfig,
    layers: range,
    rng: np.random.Generator,
    rows: int,
    new: int,
    writes: tuple[int, ...],
    filled: int,
) -> Case:
    offsets = np.array([0, 3, 5])[:, None, None]  # so that the three axes differ
    positions = np.array(writes)[None, :, None] + np.arange(new) + offsets
    embeds = _normal(rng, rows, new, decoder.hidden_size)
    if not filled:
        embeds[1:] *= np.float32(QUIET)
    feeds = {
        "inputs_embeds": embeds,
        "position_ids": positions,
        "write_indices": np.array(writes),
    }
    for i in layers:
        for side in ("key", "value"):
            cache = _normal(rng, rows, decoder.num_kv_heads, CAPACITY, decoder.head_dim)
            cache[:, :, filled:] = POISON * np.sign(cache[:, :, filled:])
            feeds[f"past_key_values.{i}.{side}"] = cache
    return feeds


def _hidden_cases(
    config: StarConfig, rng: np.random.Generator, spec: GoldenSpec, part: Part
) -> dict[str, Case]:
    return {f"{b}": {"hidden_states": _normal(rng, b, 1, config.base_ar.hidden_size)} for b in (1, 2, 3)}


def _draw_cases(
    config: StarConfig, rng: np.random.Generator, spec: GoldenSpec, part: Part
) -> dict[str, Case]:
    """Greedy, the release's defaults at two positions, a narrow filter, no guidance and an open filter.

    A large model has the first three. The noise of the narrow filter outweighs all logits, so that any
    candidate that it keeps or drops too many is soon drawn or missed.
    """
    size = config.vq.codebook_size
    plan = {  # images, positions, guidance, top_k, top_p
        "greedy": (1, 1, 3.0, 1, 1.0),
        "defaults": (1, 2, 1.1, 1000, 0.8),
        "narrow": (2, 4, 20.0, 5, 0.5),
        "unguided": (2, 1, 1.0, 50, 1.0),
        "open": (2, 3, 7.5, 2048, 1.0),
    }
    return {
        case: {
            "hidden_states": _normal(rng, 2 * n, s, config.base_ar.hidden_size),
            "guidance": np.array([w], np.float32),
            "top_k": np.array([min(k, size, wrappers.TOP_K_LIMIT)]),
            "top_p": np.array([p], np.float32),
            "noise": _noise(n, s, size) * np.float32(NOISE.get(case, 1)),
        }
        for case, (n, s, w, k, p) in list(plan.items())[: spec.draw_cases]
    }


def _noise(images: int, positions: int, size: int) -> np.ndarray:
    return np.stack([gumbel_noise(SEED, image=i, steps=range(positions), size=size) for i in range(images)])


def _text_cases(
    config: StarConfig, rng: np.random.Generator, spec: GoldenSpec, part: Part
) -> dict[str, Case]:
    rows = diffusion_of(config).text_encoder.vocab_size
    return {f"{b}x{s}": {"input_ids": rng.integers(0, rows, (b, s))} for b, s in ((1, 1), (2, 7), (1, 30))}


def _caption_cases(
    config: StarConfig, rng: np.random.Generator, spec: GoldenSpec, part: Part
) -> dict[str, Case]:
    """Rows of the size that an embedding has, of captions from the empty one on."""
    size = diffusion_of(config).text_encoder.hidden_size
    return {
        f"{length}": {
            "inputs_embeds": _normal(rng, 1, length, size) * np.float32(size**-0.5),
            "position_ids": np.arange(length)[None],
        }
        for length in (1, 9, 33)[: spec.images]
    }


def _dit_cases(config: StarConfig, rng: np.random.Generator, spec: GoldenSpec, part: Part) -> dict[str, Case]:
    """Captions from the empty one on. A later part's cases take the results of the part before."""
    dit, cases = diffusion_of(config).dit, {}
    plan = ((2, 6, 9, 0.7), (1, 4, 1, 0.0), (1, 2, 33, 0.96))  # images, patches a side, ids, time
    for images, side, length, time in plan[: spec.images]:
        shape = (images, side * side, dit.patch_size**2)
        cos, sin = (t.numpy() for t in rotary_cos_sin(dit, caption_tokens=length, side=side))
        case = cases[f"{images}x{side}x{length}"] = {
            "latents": _normal(rng, *shape, dit.latent_channels),
            "source": _normal(rng, *shape, dit.latent_channels),
            "vq_map": _normal(rng, *shape, dit.vq_channels) * np.float32(0.5),
            "caption": _normal(rng, 1, length, dit.caption_size),
            "time": time_features(time).numpy(),
            "caption_cos": cos[:length],
            "caption_sin": sin[:length],
            "image_cos": cos[length:],
            "image_sin": sin[length:],
        }
        if part.layers and part.layers.start:
            case["caption_embeds"] = _normal(rng, images, length, dit.hidden_size)
            case["image_embeds"] = _normal(rng, images, 2 * side * side, dit.hidden_size)
            case["time_embeds"] = _normal(rng, 1, dit.time_size)
    return cases


def _vae_image_cases(
    config: StarConfig, rng: np.random.Generator, spec: GoldenSpec, part: Part
) -> dict[str, Case]:
    return {
        f"{n}x{size}": {"image": rng.uniform(-1, 1, (n, 3, size, size)).astype(np.float32)}
        for n, size in ((1, 64), (2, 80), (1, 96))[: spec.images]
    }


def _latent_cases(
    config: StarConfig, rng: np.random.Generator, spec: GoldenSpec, part: Part
) -> dict[str, Case]:
    channels = diffusion_of(config).vae.latent_channels
    return {
        f"{n}x{side}": {"latents": _normal(rng, n, channels, side, side)}
        for n, side in ((1, 8), (2, 10), (1, 12))[: spec.images]
    }


CASES = {
    "token_embedding": _token_cases,
    "image_embedding": _image_token_cases,
    "vision_encoder": _vision_cases,
    "vq_encoder": _image_cases,
    "vq_decoder": _image_id_cases,
    "base_ar": _decoder_cases,
    "stacked_ar": _decoder_cases,
    "text_head": _hidden_cases,
    "image_head": _draw_cases,
    "codebook": _image_token_cases,
    "text_embedding": _text_cases,
    "text_encoder": _caption_cases,
    "dit": _dit_cases,
    "vae_encoder": _vae_image_cases,
    "vae_decoder": _latent_cases,
}
