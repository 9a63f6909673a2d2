"""Record golden tensors: what the reference computes on recorded inputs, stored in the bundle.

The reference computes in float32 with the weights rounded as the bundle stores them, so a correct graph
agrees at rounding level in every precision. A case is one forward call; its keys in the file are
`case/in/name` and `case/out/name`.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from engines.bundle.manifest import GoldenSpec
from engines.bundle.tensors import PRESENT, present_name
from engines.runtime.sampler import uniforms
from reference import tasks, vision
from reference.config import DecoderConfig, StarConfig
from reference.containers import LazyTensor
from reference.model import Star

from ..components import COMPONENTS, Part, boundary
from ..graph import wrappers
from ..graph.quantize import Precision
from .activations import int8_activations
from .cases import POISON
from .compare import compare, tolerance_of
from .oracle import resident, streamed_star
from .run_case import written_slots

Case = dict[str, np.ndarray]  # input name -> value
CAPACITY = 24
PROMPT_TOKENS, TRIES = 12, 50
LARGE = 1 << 30  # weights; recording a model of more takes minutes, so it gets fewer and shorter cases
SPECS = {False: GoldenSpec(images=3, image_tokens=16, answer_tokens=8), True: GoldenSpec(1, 3, 3)}


@dataclass(frozen=True)
class Oracle:
    """The reference in float32 and, for a bundle of 16 bits, the same in its compute type (else None).

    `precision` is the bundle's; `spec` says how much is recorded.
    """

    star: wrappers.FoldedStar
    narrow: wrappers.FoldedStar | None
    precision: Precision
    spec: GoldenSpec


def oracle_of(
    config: StarConfig, tensors: Mapping[str, LazyTensor], precision: Precision, *, rope_bf16: bool
) -> Oracle:
    """The oracle of an export in `precision`; it reads weights only while it runs."""
    narrow = precision.torch_dtype
    wide = streamed_star(config, tensors, precision, rope_bf16=rope_bf16)
    return Oracle(
        wide,
        None
        if narrow == torch.float32
        else streamed_star(config, tensors, precision, rope_bf16=rope_bf16, dtype=narrow),
        precision,
        SPECS[sum(parameter.numel() for parameter in wide.parameters()) > LARGE],
    )


def component_golden(
    part: Part,
    oracle: Oracle,
    path: Path,
    *,
    before: Path | None = None,
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Record every case of one graph or table to `path`.

    For an oracle in 16 bits too, also record the noise of the same module when it computes in that type, and
    for weights in blocks that of int8 activations. The cases of a part take the residual stream from the
    golden tensors of the part before it, at `before`. A decoder runs all cases layer by layer, so that its
    weights are read once; `tick` is called after each.
    """
    config = oracle.star.config
    inputs, outputs = boundary(part, config, "float32")
    cases = CASES[part.component](config, _rng(part.name), oracle.spec, part)
    if before is not None:
        stream = load_file(before)
        for case, feeds in cases.items():
            feeds["inputs_embeds"] = stream[f"{case}/out/hidden_states"]
    run = _layer_by_layer if part.layers else _at_once
    wide, others = run(part, oracle, cases, tick)
    recorded: Case = {}
    for case, feeds in cases.items():
        recorded |= {f"{case}/in/{spec.name}": np.ascontiguousarray(feeds[spec.name]) for spec in inputs}
        recorded |= {f"{case}/out/{spec.name}": wide[case][spec.name] for spec in outputs}
        for kind, results in others.items():
            noise = _noise(results[case], wide[case], feeds, tolerances=COMPONENTS[part.component].tolerances)
            recorded |= {f"{case}/{kind}/{key}": np.array(value, np.float32) for key, value in noise.items()}
    save_file(recorded, path)


# By case: in float32, and by kind of noise in another arithmetic.
Results = tuple[dict[str, Case], dict[str, dict[str, Case]]]
NOISE, INT8 = "noise", "int8"  # of the compute type, and of int8 activations


def _at_once(part: Part, oracle: Oracle, cases: dict[str, Case], tick: Callable[[], None]) -> Results:
    found: list[dict[str, Case]] = []
    for star in filter(None, (oracle.star, oracle.narrow)):
        found.append({case: _outputs(part, star, feeds) for case, feeds in cases.items()})
        tick()
    return found[0], {NOISE: found[1]} if oracle.narrow else {}


def _layer_by_layer(part: Part, oracle: Oracle, cases: dict[str, Case], tick: Callable[[], None]) -> Results:
    stars = {"": oracle.star}
    if oracle.narrow:
        stars[NOISE] = oracle.narrow
    if oracle.precision.bits:
        stars[INT8] = oracle.star
    found: dict[str, dict[str, Case]] = {kind: {case: {} for case in cases} for kind in stars}
    for layer in part.layers or ():
        one = Part(part.name, part.component, range(layer, layer + 1))
        layers = {
            kind: star.get_submodule(f"{part.component}.layers.{layer}") for kind, star in stars.items()
        }
        with resident(*layers.values()):
            for kind, star in stars.items():
                rounding = int8_activations(layers[kind], part.component, oracle.precision)
                with rounding if kind == INT8 else contextlib.nullcontext():
                    for case, feeds in cases.items():
                        results = found[kind][case]
                        stream = results.get("hidden_states", feeds["inputs_embeds"])
                        results |= _outputs(one, star, feeds | {"inputs_embeds": stream})
        tick()
    return found.pop(""), found


def _outputs(part: Part, star: wrappers.FoldedStar, feeds: Case) -> Case:
    """Run one graph's module of `star`: returns outputs by name in float32 or int64."""
    inputs, outputs = boundary(part, star.config, "float32")
    module, dtype = wrappers.wrapper_of(part, star), star.base_ar.norm.weight.dtype
    given = [torch.from_numpy(feeds[spec.name].copy()) for spec in inputs]
    given = [t.to(dtype) if present_name(spec.name) else t for spec, t in zip(inputs, given, strict=True)]
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


def run_golden(oracle: Oracle, path: Path, *, tick: Callable[[], None] = lambda: None) -> None:
    """Record short whole runs: greedy and sampled image ids of one prompt, and an answer's ids.

    `tick` is called after each step of the three.
    """
    rng, config = _rng("run"), oracle.star.config
    shape = (2, PROMPT_TOKENS)
    settings = RunSettings(
        guidance=3.0,
        top_k=min(100, config.vq.codebook_size),
        top_p=float(np.float32(0.9)),
        uniforms=uniforms(seed=7, tokens=min(oracle.spec.image_tokens, config.vq.image_tokens), num_images=1),
        answer_tokens=oracle.spec.answer_tokens,
    )
    for _ in range(TRIES):  # a trained model may repeat one word over and over, which would prove nothing
        rows = rng.integers(0, config.vocab_size, shape)
        greedy, sampled, answer = runs_in_step(oracle.star, rows, settings, tick=tick)
        if len(set(answer.tolist())) > 2 or oracle.spec == SPECS[True]:
            break
    common = {"input_ids": rows, "guidance": np.array([settings.guidance], np.float32)}
    recorded = {f"generate/in/{k}": v for k, v in common.items()} | {
        f"sample/in/{k}": v for k, v in common.items()
    }
    recorded |= {
        "generate/out/image_ids": greedy,
        "sample/out/image_ids": sampled,
        "sample/in/top_k": np.array([settings.top_k]),
        "sample/in/top_p": np.array([settings.top_p], np.float32),
        "sample/in/uniforms": settings.uniforms,
        "answer/in/input_ids": rows[:1],
        "answer/in/position_ids": np.broadcast_to(np.arange(PROMPT_TOKENS), (3, 1, PROMPT_TOKENS)),
        "answer/out/ids": answer,
    }
    save_file({k: np.ascontiguousarray(v) for k, v in recorded.items()}, path)


@dataclass(frozen=True)
class RunSettings:
    """Settings of `runs_in_step`; `uniforms` [T,1] decide the sampled ids, and T how many there are."""

    guidance: float
    top_k: int
    top_p: float
    uniforms: np.ndarray
    answer_tokens: int


def runs_in_step(
    star: Star, rows: np.ndarray, settings: RunSettings, *, tick: Callable[[], None] = lambda: None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Greedy and sampled `tasks.generate` of rows [2,L], and `tasks.answer` of the first, in step.

    They share each step's forward, so the weights of a streamed Star are read once per step and not once per
    run. Returns image ids [1,T] of the two, and the answer's ids [n].
    """
    config, prompt = star.config, torch.from_numpy(rows)
    ids, tokens = torch.cat([prompt, prompt, prompt[:1]]), len(settings.uniforms)
    greedy: list[torch.Tensor] = []
    sampled: list[torch.Tensor] = []
    seen, first, ended = prompt[0], 0, False
    steps = max(tokens, settings.answer_tokens)
    capacity = rows.shape[1] + steps - 1
    base_cache = star.base_ar.new_cache(len(ids), capacity_tokens=capacity)
    stacked_cache = star.stacked_ar.new_cache(len(ids) - 1, capacity_tokens=capacity)
    with torch.inference_mode():
        embeds = star.token_embedding(ids)
        for step in range(steps):
            length = embeds.shape[1]
            positions = torch.arange(first, first + length).expand(3, len(ids), -1)
            hidden = tasks.decode(star.base_ar, embeds, positions, first, base_cache)
            first += length
            if step < settings.answer_tokens and not ended:
                logits = star.text_head(hidden[-1:, -1:])[0, 0].float()
                word = tasks.penalise_repetition(logits, seen, config.repetition_penalty).argmax()
                seen = torch.cat([seen, word[None]])
                ended = int(word) in config.eos_token_ids
            if step < tokens:
                drawn = tasks.decode(
                    star.stacked_ar, hidden[:-1], positions[:, :-1], first - length, stacked_cache
                )
                guided = tasks.guide(star.image_head(drawn[:, -1:]).squeeze(1).float(), settings.guidance)
                greedy.append(guided[:1].argmax(-1))
                uniform = torch.from_numpy(settings.uniforms[step])
                sampled.append(
                    tasks.sample(guided[1:], top_k=settings.top_k, top_p=settings.top_p, uniform=uniform)
                )
                pairs = star.image_embedding(torch.cat([greedy[-1], sampled[-1]])).repeat_interleave(2, dim=0)
            embeds = torch.cat([pairs, star.token_embedding(seen[-1:])])[:, None]
            tick()
    return (
        torch.stack(greedy, dim=1).numpy(),
        torch.stack(sampled, dim=1).numpy(),
        seen[rows.shape[1] :].numpy(),
    )


def _rng(name: str) -> np.random.Generator:
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

    A large model's parts lack those that the rung "decoder steps" checks anyway: caches are large.
    """
    decoder: DecoderConfig = getattr(config, part.component)
    plan = {  # rows, new positions, write indices, filled slots
        "prefill": (2, 7, (0, 0), 0),
        "decode": (2, 1, (7, 5), 7),
        "steps": (2, 3, (9, 4), 9),
        "rewind": (2, 2, (3, 6), 16),
        "last_slot": (2, 1, (CAPACITY - 1, CAPACITY - 1), CAPACITY - 1),
        "one_row": (1, 4, (2,), 2),
    }
    return {
        case: _decoder_case(decoder, part.layers or range(0), rng, rows, new, writes, filled)
        for case, (rows, new, writes, filled) in plan.items()
        if spec != SPECS[True] or case not in ("steps", "one_row")
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
    feeds = {
        "inputs_embeds": _normal(rng, rows, new, decoder.hidden_size),
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
    "image_embedding": _image_token_cases,
    "vision_encoder": _vision_cases,
    "vq_encoder": _image_cases,
    "vq_decoder": _image_id_cases,
    "base_ar": _decoder_cases,
    "stacked_ar": _decoder_cases,
    "text_head": _hidden_cases,
    "image_head": _draw_cases,
}
