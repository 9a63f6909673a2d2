"""Measure a bundle's decode step, and how close it comes to the memory-bandwidth limit.

A decode step reads all weights once, which bounds its time from below. The bound is the size of the stored
weights and the filled cache over the bandwidth that is measured in the same run; an executor that widens
weights on loading reads more. All variants are measured in turns and reported as medians, because a machine's
speed drifts.
"""

from __future__ import annotations

import functools
import math
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from .bundle.tensors import ITEM_BYTES, bound_tensors, present_name, shape_from_symbols
from .inputs.prompt import Prompt
from .progress import Progress, silent
from .runtime.decode import ImageLoop
from .runtime.star import Star
from .sessions import ON_CPU, run
from .sessions.onnxruntime import OnnxRuntimeSession

PROMPT, REPEATS, SEED = "a red circle", 15, 100
STEP = ("base_ar", "stacked_ar", "image_head")  # the components of a decode step
BANDWIDTH_BYTES, BANDWIDTH_REPEATS = 1 << 28, 7
PEERS = {
    "bare": "the same sessions in a bare loop",
    "plain": "ONNX Runtime's plain run, caches returned as new arrays",
}


@dataclass(frozen=True)
class Timing:
    """One part of an image.

    `ms` is the median of a call, `read_bytes` what it must read (0 where not stated), and `share` the
    fraction of the measured bandwidth at which it reads them.
    """

    name: str
    ms: float
    read_bytes: int
    share: float


@dataclass(frozen=True)
class Benchmark:
    """All figures of one run.

    `bandwidth` is in bytes per second. A decode step draws `window` tokens, of which `tokens_per_forward`
    were right on average. `loop` says who advances it, and `per_token` what the host does for a token with
    TensorRT: launches, writes and syncs. `ratios` divides the runtime's decode step by each peer's: 1 is
    equal.
    """

    model: str
    precision: str
    backend: str
    device: str
    bandwidth: float
    tokens: int
    window: int
    tokens_per_forward: float
    loop: str
    per_token: dict[str, float]
    seconds_per_image: float
    timings: tuple[Timing, ...]
    ratios: dict[str, float]


def bench(star: Star, *, repeats: int = REPEATS, progress: Progress = silent) -> Benchmark:
    """Measure `star`: one image of a short prompt under guidance (two rows), with the model's sampling."""
    progress("memory bandwidth", 0, repeats + 1)
    device = device_name(star.backend, star.loaded.threads)
    bandwidth = device_bandwidth(star.backend, star.loaded.threads)
    prompt = star.chat.generate_prompt(PROMPT, num_images=1)
    length = prompt.input_ids.shape[1]
    loop = star.image_loop(num_images=1, length=length, tokens=star.model.image_tokens)
    calls, synchronize = calls_of(star, loop, prompt), loop.image_ids[0].read
    seconds = in_turns(calls, repeats=repeats, synchronize=synchronize, progress=progress)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return Benchmark(
        model=star.model.name,
        precision=star.bundle.manifest.precision,
        backend=star.backend,
        device=device,
        bandwidth=bandwidth,
        tokens=loop.tokens,
        window=loop.window,
        tokens_per_forward=(loop.tokens - 1) / loop.forwards,
        loop=loop_of(loop),
        per_token=work_per_token(star.backend, calls["image"], loop.tokens),
        seconds_per_image=median["image"] + median["vq_decoder"],
        timings=timings_of(star, loop, median, bandwidth, length),
        ratios={PEERS[peer]: ratio(seconds, "runtime", peer) for peer in PEERS if peer in seconds},
    )


def calls_of(star: Star, loop: ImageLoop, prompt: Prompt) -> dict[str, Callable[[], object]]:
    """What is measured, by name: an image, its decode steps in several loops, and single steps."""
    sampling, position = star.model.sampling.generate, int(prompt.position_ids.max()) + 1
    draw = functools.partial(
        loop.draw,
        star.embedded(prompt),
        prompt.position_ids,
        guidance=sampling.guidance,
        top_k=min(sampling.top_k, star.model.codebook_size),
        top_p=sampling.top_p,
        seed=SEED,
    )
    drawn = draw()
    calls: dict[str, Callable[[], object]] = {
        "image": draw,
        "runtime": lambda: rewound(loop, prompt.input_ids.shape[1], position),
        "bare": lambda: bare_decode(loop),
    }
    if loop.window == 1 and all(isinstance(star.session(name), OnnxRuntimeSession) for name in STEP):
        calls["plain"] = PlainLoop(loop, star).decode
    return calls | {
        "base_ar": loop.base_step,
        "stacked_ar": loop.stacked_step,
        "image_head": loop.head_steps[-1],
        "vq_decoder": lambda: run(star.session("vq_decoder"), {"image_ids": drawn}),
    }


def loop_of(loop: ImageLoop) -> str:
    """Who advances the decode loop, and why not the device where it is the host."""
    if loop.on_device is None:
        return f"on the host: {loop.on_host_because}"
    return f"on the device, {loop.on_device.how}" + (f" ({loop.on_device.why})" if loop.on_device.why else "")


def work_per_token(backend: str, draw: Callable[[], object], tokens: int) -> dict[str, float]:
    """What the host does while an image is drawn, by token: launches, writes and syncs. {} without TensorRT.

    The prefill, which is the same for every loop, counts too.
    """
    if not backend.startswith("tensorrt:"):
        return {}
    from .tensorrt.device import counts

    before = counts.copy()
    draw()
    return {name: (counts[name] - before[name]) / tokens for name in ("launches", "writes", "syncs")}


def timings_of(
    star: Star, loop: ImageLoop, median: dict[str, float], bandwidth: float, length: int
) -> tuple[Timing, ...]:
    """The timings of single steps and of a whole image, from the `median` seconds of each call."""
    steps = [timing(name, median[name], bytes_read(star, loop, name, length), bandwidth) for name in STEP]
    step_bytes = sum(step.read_bytes for step in steps)
    return (
        *steps,
        timing("decode step", median["runtime"] / loop.forwards, step_bytes, bandwidth),
        timing("vq_decoder", median["vq_decoder"], 0, bandwidth),
        timing("prefill and decode of an image", median["image"], 0, bandwidth),
    )


def in_turns(
    calls: dict[str, Callable[[], object]],
    *,
    repeats: int,
    synchronize: Callable[[], object],
    progress: Progress = silent,
) -> dict[str, list[float]]:
    """Measure the calls in turns: name -> seconds, one figure per repeat.

    The first turn warms up and is not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        progress("measure, in turns", turn, repeats + 1)
        for name, call in calls.items():
            synchronize()
            started = time.perf_counter()
            call()
            synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, peer: str) -> float:
    """Median over the turns of the time of `name` divided by that of `peer` in the same turn."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[peer]))


def rewound(loop: ImageLoop, slot: int, position: int) -> None:
    """Repeat the decode steps of an image, which begin at `slot` and `position`, with the runtime's loop."""
    loop.slots.rewind(slot)
    loop.decode(position, SEED)


def bare_decode(loop: ImageLoop) -> None:
    """Call the same bound steps as often, and do nothing else. No runtime on these sessions can be faster."""
    loop.head_steps[0]()
    for i in range(loop.forwards):
        loop.base_step()
        loop.stacked_step()
        loop.head_steps[1 + (i if loop.window == 1 else 0)]()


class PlainLoop:
    """A peer: the same ONNX Runtime sessions called with arrays, without binding.

    Every step returns new arrays for all caches.
    """

    def __init__(self, loop: ImageLoop, star: Star):
        self.steps = loop.tokens - 1
        sessions = [star.session(name) for name in STEP]
        self.sessions = [
            session.inference_session for session in sessions if isinstance(session, OnnxRuntimeSession)
        ]
        self.feeds = [
            {t.name: tensors[t.name].read().copy() for t in session.spec.inputs}
            for session, tensors in zip(sessions, loop.tensors, strict=True)
        ]

    def decode(self) -> None:
        """Run all decode steps of an image, one token each."""
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


def bytes_read(star: Star, loop: ImageLoop, component: str, length: int) -> int:
    """Bytes that a decode step of `component` must read after a prompt of `length` tokens.

    These are the stored weights and the filled part of its caches. Of the table of image embeddings it reads
    one row per image, which does not count.
    """
    manifest = star.bundle.manifest
    files = {file for part in star.bundle.parts(component) for file in star.bundle.weights(part)}
    weights = sum(manifest.files[name].size for name in files)
    table = manifest.tables["image_embedding"]
    if table.file in files:
        weights -= math.prod(table.shape) * ITEM_BYTES[table.dtype]
        if table.scales_dtype is not None:
            weights -= table.shape[0] * ITEM_BYTES[table.scales_dtype]
    used = {"B": 2, "C": length + loop.tokens // 2}  # two rows; slots on average over the image
    caches = [t for t in bound_tensors(star.session(component).spec) if present_name(t.name)]
    sizes = [math.prod(shape_from_symbols(t.shape, used)) * ITEM_BYTES[t.dtype] for t in caches]
    return weights + sum(sizes)


def timing(name: str, seconds: float, read_bytes: int, bandwidth: float) -> Timing:
    """The timing of a call that takes `seconds`, on a device of `bandwidth` bytes per second."""
    return Timing(name, seconds * 1e3, read_bytes, read_bytes / bandwidth / seconds)


def device_name(backend: str, threads: int | None = None) -> str:
    """The name of the device that `backend` runs on; of a CPU, as many `threads`, by default one per core."""
    if backend in ON_CPU:
        cores = threads or os.cpu_count() or 1
        return f"{cores} CPU core{'s' * (cores > 1)}"
    from .tensorrt.device import gpus

    return gpus()[0].name


def device_bandwidth(backend: str, threads: int | None = None) -> float:
    """The measured read bandwidth of that device, in bytes per second."""
    if backend in ON_CPU:
        return host_bandwidth(threads)
    from .tensorrt.device import read_bandwidth

    return read_bandwidth()


def host_bandwidth(threads: int | None = None) -> float:
    """Bytes per second that `threads`, by default one per core, read from memory: sums of 256 MiB per thread,
    best of 7."""
    cores = threads or os.cpu_count() or 1
    blocks = [np.ones(BANDWIDTH_BYTES // 8) for _ in range(cores)]
    best = 0.0
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(BANDWIDTH_REPEATS):
            started = time.perf_counter()
            list(pool.map(np.sum, blocks))
            best = max(best, cores * BANDWIDTH_BYTES / (time.perf_counter() - started))
    return best
