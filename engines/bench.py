"""How long a bundle's decode step takes, and how near that is to what the memory allows.

Reading the weights once per step is the floor of decoding. The floor here is the bytes of the stored weights plus the filled cache,
over the bandwidth that this machine shows in the same run; an executor that widens weights when it loads them reads more.
All variants are measured in turns, and medians are reported: a machine's speed drifts.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from .bundle.tensors import bound_tensors, present_name
from .inputs.prompt import text_positions
from .progress import Progress, silent
from .runtime.decode import ImageLoop
from .runtime.sampler import uniforms
from .runtime.star import Star
from .sessions import run
from .sessions.onnxruntime import OnnxRuntimeSession

PROMPT_TOKENS, REPEATS = 32, 15
BANDWIDTH_BYTES, BANDWIDTH_REPEATS = 1 << 28, 7


@dataclass(frozen=True)
class Timing:
    """One part of an image: median `ms` of a call, the bytes it must read (0 where none is stated) and the share of that floor."""

    name: str
    ms: float
    read_bytes: int
    share: float


@dataclass(frozen=True)
class Benchmark:
    """All figures of one run. `bandwidth` in bytes per second; `ratios` of the runtime's decode step over its peers', 1 is equal."""

    model: str
    precision: str
    backend: str
    device: str
    bandwidth: float
    tokens: int
    seconds_per_image: float
    timings: tuple[Timing, ...]
    ratios: dict[str, float]


def bench(star: Star, *, repeats: int = REPEATS, progress: Progress = silent) -> Benchmark:
    """Measure `star`: one image under guidance (two rows), after a prompt of 32 tokens."""
    progress("memory bandwidth", 0, repeats + 1)
    device, bandwidth = device_bandwidth(star.backend)
    model, tokens = star.model, star.model.image_tokens
    ids = np.arange(2 * PROMPT_TOKENS, dtype=np.int64).reshape(2, PROMPT_TOKENS) % model.vocab_size
    embeds, positions = (
        run(star.session("token_embedding"), {"input_ids": ids})["inputs_embeds"],
        text_positions(2, PROMPT_TOKENS),
    )
    settings = {
        "guidance": 1.1,
        "top_k": min(1000, model.codebook_size),
        "top_p": 0.8,
        "uniforms": uniforms(seed=100, tokens=tokens, num_images=1),
    }
    loop = star.image_loop(num_images=1, length=PROMPT_TOKENS, tokens=tokens)
    drawn = loop.draw(embeds, positions, **settings)
    plain = PlainLoop(loop, star) if star.backend == "onnxruntime" else None
    kinds: dict[str, Callable[[], object]] = {
        "image": lambda: loop.draw(embeds, positions, **settings),
        "runtime": lambda: rewound(loop, settings["uniforms"]),
        "bare": lambda: bare_decode(loop),
    }
    kinds |= {"plain": plain.decode} if plain else {}
    kinds |= {
        "base_ar": loop.base_step,
        "stacked_ar": loop.stacked_step,
        "image_head": loop.head_steps[0],
        "vq_decoder": lambda: run(star.session("vq_decoder"), {"image_ids": drawn}),
    }
    seconds = in_turns(
        kinds, repeats=repeats, synchronize=lambda: loop.image_ids[0].read(), progress=progress
    )
    steps = tokens - 1
    median = {name: statistics.median(values) for name, values in seconds.items()}
    timings = [
        timing(name, median[name], bytes_read(star, loop, name), bandwidth)
        for name in ("base_ar", "stacked_ar", "image_head")
    ]
    total = sum(s.read_bytes for s in timings)
    timings += [
        timing("decode step", median["runtime"] / steps, total, bandwidth),
        timing("vq_decoder", median["vq_decoder"], 0, bandwidth),
    ]
    timings += [timing("prefill and decode of an image", median["image"], 0, bandwidth)]
    ratios = {"the same sessions in a bare loop": ratio(seconds, "runtime", "bare")}
    ratios |= (
        {"ONNX Runtime's plain run, caches returned as new arrays": ratio(seconds, "runtime", "plain")}
        if plain
        else {}
    )
    return Benchmark(
        model.name,
        star.bundle.manifest.precision,
        star.backend,
        device,
        bandwidth,
        tokens,
        median["image"] + median["vq_decoder"],
        tuple(timings),
        ratios,
    )


def in_turns(
    kinds: dict[str, Callable[[], object]],
    *,
    repeats: int,
    synchronize: Callable[[], object],
    progress: Progress = silent,
) -> dict[str, list[float]]:
    """Seconds of each call, measured in turns: name -> one figure per repeat. The first turn warms up and is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(repeats + 1):
        progress("turns", turn, repeats + 1)
        for name, call in kinds.items():
            synchronize()
            started = time.perf_counter()
            call()
            synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, peer: str) -> float:
    """Median over the turns of `name` over `peer` in the same turn."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[peer]))


def rewound(loop: ImageLoop, draws: np.ndarray) -> None:
    """The decode steps of an image again, by the runtime's loop."""
    loop.slots.rewind(PROMPT_TOKENS)
    loop.decode(PROMPT_TOKENS, draws)


def bare_decode(loop: ImageLoop) -> None:
    """As many calls of the same bound steps, and nothing else: what no runtime on these sessions can beat."""
    for i, head_step in enumerate(loop.head_steps):
        if i:
            loop.base_step()
            loop.stacked_step()
        head_step()


class PlainLoop:
    """The peer: the same ONNX Runtime sessions called with arrays, without binding; every step returns new arrays for all caches."""

    def __init__(self, loop: ImageLoop, star: Star):
        self.steps = loop.tokens - 1
        sessions = [star.session(name) for name in ("base_ar", "stacked_ar", "image_head")]
        self.sessions = [
            session.inference_session for session in sessions if isinstance(session, OnnxRuntimeSession)
        ]
        self.feeds = [
            {t.name: tensors[t.name].read().copy() for t in session.spec.inputs}
            for session, tensors in zip(sessions, loop.tensors, strict=True)
        ]

    def decode(self) -> None:
        """All decode steps of an image."""
        base, stacked, head = self.feeds
        for _ in range(self.steps):
            stacked["inputs_embeds"] = self._decoder(0)
            head["hidden_states"] = self._decoder(1)
            base["inputs_embeds"] = self.sessions[2].run(["image_ids", "inputs_embeds", "logits"], head)[1]

    def _decoder(self, index: int) -> np.ndarray:
        feeds = self.feeds[index]
        caches = [name for name in feeds if present_name(name)]
        hidden, *presents = self.sessions[index].run(["hidden_states", *map(present_name, caches)], feeds)
        feeds.update(zip(caches, presents))
        return hidden


def bytes_read(star: Star, loop: ImageLoop, component: str) -> int:
    """Bytes that a decode step of `component` must read: stored weights, and the filled part of the caches (none in a head)."""
    files = star.bundle.manifest.files
    weights = sum(files[name].size for name in star.bundle.weights(component))
    spec, used = star.session(component).spec, PROMPT_TOKENS + loop.tokens // 2  # on average over the image
    caches = [t for t in bound_tensors(spec) if present_name(t.name)]
    per_item = {"float32": 4, "float16": 2, "bfloat16": 2}
    return weights + sum(2 * used * t.shape[1] * t.shape[3] * per_item[t.dtype] for t in caches)  # two rows


def timing(name: str, seconds: float, read_bytes: int, bandwidth: float) -> Timing:
    return Timing(name, seconds * 1e3, read_bytes, read_bytes / bandwidth / seconds)


def device_bandwidth(backend: str) -> tuple[str, float]:
    """(name of the device that `backend` computes on, its measured read bandwidth in bytes per second)."""
    if backend == "onnxruntime":
        return f"{os.cpu_count()} CPU cores", host_bandwidth()
    from .tensorrt.device import gpus, read_bandwidth

    return gpus()[0].name, read_bandwidth()


def host_bandwidth() -> float:
    """Bytes per second that all cores together read from memory: a sum over 256 MiB per core, best of 7."""
    cores = os.cpu_count() or 1
    blocks = [np.ones(BANDWIDTH_BYTES // 8) for _ in range(cores)]
    best = 0.0
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(BANDWIDTH_REPEATS):
            started = time.perf_counter()
            list(pool.map(np.sum, blocks))
            best = max(best, cores * BANDWIDTH_BYTES / (time.perf_counter() - started))
    return best
