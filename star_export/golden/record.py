"""Record golden tensors: what the reference computes on recorded inputs, stored in the bundle.

The reference computes in float32 with the weights rounded as the bundle stores them, so a correct graph
agrees at rounding level in every precision. A case is one forward call; its keys in the file are
`case/in/name` and `case/out/name`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from torch.func import functional_call

from engines.bundle.manifest import TensorSpec
from engines.bundle.tensors import PRESENT, present_name
from engines.runtime.sampler import uniforms
from reference import tasks, vision
from reference.config import DecoderConfig, StarConfig

from ..components import COMPONENTS
from ..graph import wrappers
from .cases import POISON
from .compare import compare, tolerance_of
from .run_case import written_slots

Case = dict[str, np.ndarray]  # input name -> value
CAPACITY = 24
PROMPT_TOKENS, IMAGE_TOKENS, ANSWER_TOKENS, TRIES = 12, 16, 8, 50


def component_golden(name: str, star: wrappers.FoldedStar, path: Path, *, compute: torch.dtype) -> None:
    """Record every case of component `name` of `star` (float32, on CPU, with rounded weights) to `path`.

    If `compute` has 16 bits, also record the noise of the same module when it computes in that type.
    """
    module = getattr(wrappers, COMPONENTS[name].wrapper)(star).eval()
    narrow = {n: p.to(compute) for n, p in module.named_parameters()} if compute != torch.float32 else None
    inputs, outputs = COMPONENTS[name].boundary(star.config, "float32")
    recorded: Case = {}
    for case, feeds in CASES[name](star.config, _rng(name)).items():
        results = _outputs(module, feeds, inputs, outputs)
        recorded |= {f"{case}/in/{spec.name}": np.ascontiguousarray(feeds[spec.name]) for spec in inputs}
        recorded |= {f"{case}/out/{key}": array for key, array in results.items()}
        if narrow:
            rounded = _outputs(
                lambda *given: functional_call(module, narrow, given), feeds, inputs, outputs, compute=compute
            )
            noise = _noise(rounded, results, feeds, tolerances=COMPONENTS[name].tolerances)
            recorded |= {f"{case}/noise/{key}": np.array(value, np.float32) for key, value in noise.items()}
    save_file(recorded, path)


def _outputs(
    module: Callable,
    feeds: Case,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    *,
    compute: torch.dtype = torch.float32,
) -> Case:
    """Run a module: returns outputs by name in float32 or int64. Caches are passed in the type `compute`."""
    given = [torch.from_numpy(feeds[spec.name].copy()) for spec in inputs]
    given = [t.to(compute) if present_name(spec.name) else t for spec, t in zip(inputs, given, strict=True)]
    with torch.inference_mode():
        results = module(*given)
    results = results if isinstance(results, tuple) else (results,)
    return {
        spec.name: (r if r.dtype == torch.int64 else r.float()).contiguous().numpy()
        for spec, r in zip(outputs, results, strict=True)
    }


def _noise(got: Case, wanted: Case, feeds: Case, *, tolerances: dict[str, float]) -> dict[str, float]:
    """The largest distance of each family of outputs from its float32 values, as `compare` measures it.

    Only of outputs that are not exact; of caches, only the written slots.
    """

    def seen(name: str, array: np.ndarray) -> np.ndarray:
        return (
            written_slots(array, feeds["write_indices"], feeds["inputs_embeds"].shape[1])
            if name.startswith(PRESENT)
            else array
        )

    bounded = [name for name in wanted if tolerance_of(name, tolerances) > 0]
    found = compare(
        {n: seen(n, got[n]) for n in bounded}, {n: seen(n, wanted[n]) for n in bounded}, tolerances=tolerances
    )
    noise: dict[str, float] = {}
    for result in found:
        family = result.tensor.partition(".")[0]
        noise[family] = max(result.value, noise.get(family, 0.0))
    return noise


def run_golden(star: wrappers.FoldedStar, path: Path) -> None:
    """Record short whole runs of `reference.tasks`: greedy and sampled image ids, and an answer's ids."""
    rng, config = _rng("run"), star.config
    positions = np.broadcast_to(np.arange(PROMPT_TOKENS), (3, 1, PROMPT_TOKENS))
    cond, ids = _telling_answer(star, rng, positions)
    rows = np.concatenate([cond, rng.integers(0, config.vocab_size, (1, PROMPT_TOKENS))])
    tokens = min(IMAGE_TOKENS, config.vq.image_tokens)
    guidance, top_k, top_p = np.float32(3.0), min(100, config.vq.codebook_size), np.float32(0.9)
    draws = uniforms(seed=7, tokens=tokens, num_images=1)
    common = {"input_ids": rows, "guidance": np.array([guidance])}
    with torch.inference_mode():
        greedy = tasks.generate(
            star,
            torch.from_numpy(rows),
            guidance=float(guidance),
            top_k=1,
            top_p=1.0,
            uniforms=None,
            image_tokens=tokens,
        )
        sampled = tasks.generate(
            star,
            torch.from_numpy(rows),
            guidance=float(guidance),
            top_k=top_k,
            top_p=float(top_p),
            uniforms=torch.from_numpy(draws),
            image_tokens=tokens,
        )
    recorded = {f"generate/in/{k}": v for k, v in common.items()} | {
        f"sample/in/{k}": v for k, v in common.items()
    }
    recorded |= {
        "generate/out/image_ids": greedy.image_ids.numpy(),
        "sample/out/image_ids": sampled.image_ids.numpy(),
        "sample/in/top_k": np.array([top_k]),
        "sample/in/top_p": np.array([top_p]),
        "sample/in/uniforms": draws,
        "answer/in/input_ids": cond,
        "answer/in/position_ids": positions,
        "answer/out/ids": ids,
    }
    save_file({k: np.ascontiguousarray(v) for k, v in recorded.items()}, path)


def _telling_answer(
    star: wrappers.FoldedStar, rng: np.random.Generator, positions: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A prompt of random ids [1, S] and its answer's ids, the first of up to TRIES that has varied ids.

    A trained model may repeat one word over and over, which would prove nothing.
    """
    for _ in range(TRIES):
        cond = rng.integers(0, star.config.vocab_size, (1, PROMPT_TOKENS))
        with torch.inference_mode():
            ids = tasks.answer(
                star,
                torch.from_numpy(cond),
                torch.from_numpy(positions.copy()),
                None,
                max_new_tokens=ANSWER_TOKENS,
            ).numpy()
        if len(set(ids.tolist())) > 2:
            break
    return cond, ids


def _rng(name: str) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(zlib.crc32(name.encode())))


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)


def _token_cases(config: StarConfig, rng: np.random.Generator) -> dict[str, Case]:
    return {
        f"{b}x{s}": {"input_ids": rng.integers(0, config.vocab_size, (b, s))}
        for b, s in ((1, 1), (2, 7), (3, 30))
    }


def _vision_cases(config: StarConfig, rng: np.random.Generator) -> dict[str, Case]:
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


def _image_cases(config: StarConfig, rng: np.random.Generator) -> dict[str, Case]:
    size = config.vq.image_size
    return {f"{n}": {"image": rng.uniform(-1, 1, (n, 3, size, size)).astype(np.float32)} for n in (1, 2, 3)}


def _image_id_cases(config: StarConfig, rng: np.random.Generator) -> dict[str, Case]:
    return {
        f"{n}": {"image_ids": rng.integers(0, config.vq.codebook_size, (n, config.vq.image_tokens))}
        for n in (1, 2, 3)
    }


def _decoder_cases(decoder: DecoderConfig, rng: np.random.Generator) -> dict[str, Case]:
    """The cases of a decoder. Slots after the filled ones hold poison."""
    plan = {  # rows, new positions, write indices, filled slots
        "prefill": (2, 7, (0, 0), 0),
        "decode": (2, 1, (7, 5), 7),
        "steps": (2, 3, (9, 4), 9),
        "rewind": (2, 2, (3, 6), 16),
        "last_slot": (2, 1, (CAPACITY - 1, CAPACITY - 1), CAPACITY - 1),
        "one_row": (1, 4, (2,), 2),
    }
    return {
        case: _decoder_case(decoder, rng, rows, new, writes, filled)
        for case, (rows, new, writes, filled) in plan.items()
    }


def _decoder_case(
    decoder: DecoderConfig,
    rng: np.random.Generator,
    rows: int,
    new: int,
    writes: tuple[int, ...],
    filled: int,
) -> Case:
    offsets = np.array([0, 3, 5])[:, None, None]  # so that the three axes differ
    positions = np.array(writes)[None, :, None] + np.arange(new) + offsets
    feeds = {
        "inputs_embeds": _normal(rng, rows, new, decoder.hidden_size),
        "position_ids": positions,
        "write_indices": np.array(writes),
    }
    for i in range(decoder.num_layers):
        for part in ("key", "value"):
            cache = _normal(rng, rows, decoder.num_kv_heads, CAPACITY, decoder.head_dim)
            cache[:, :, filled:] = POISON * np.sign(cache[:, :, filled:])
            feeds[f"past_key_values.{i}.{part}"] = cache
    return feeds


def _hidden_cases(config: StarConfig, rng: np.random.Generator) -> dict[str, Case]:
    return {f"{b}": {"hidden_states": _normal(rng, b, 1, config.base_ar.hidden_size)} for b in (1, 2, 3)}


def _draw_cases(config: StarConfig, rng: np.random.Generator) -> dict[str, Case]:
    """Greedy, the release's defaults, no guidance, an open filter and a narrow one."""
    size = config.vq.codebook_size
    plan = {  # images, guidance, top_k, top_p, uniform number
        "greedy": (1, 3.0, 1, 1.0, 0.0),
        "defaults": (2, 1.1, 1000, 0.8, None),
        "unguided": (1, 1.0, 50, 1.0, None),
        "open": (3, 7.5, 2048, 1.0, None),
        "narrow": (2, 20.0, 5, 0.05, None),
    }
    return {
        case: {
            "hidden_states": _normal(rng, 2 * n, 1, config.base_ar.hidden_size),
            "guidance": np.array([w], np.float32),
            "top_k": np.array([min(k, size, wrappers.TOP_K_LIMIT)]),
            "top_p": np.array([p], np.float32),
            "uniform": rng.random(n, np.float32) if u is None else np.full(n, u, np.float32),
        }
        for case, (n, w, k, p, u) in plan.items()
    }


CASES = {
    "token_embedding": _token_cases,
    "vision_encoder": _vision_cases,
    "vq_encoder": _image_cases,
    "vq_decoder": _image_id_cases,
    "base_ar": lambda c, r: _decoder_cases(c.base_ar, r),
    "stacked_ar": lambda c, r: _decoder_cases(c.stacked_ar, r),
    "text_head": _hidden_cases,
    "image_head": _draw_cases,
}
