"""The loop on the device: its kernels beside the CPU's arithmetic, then CUDA graphs with a WHILE node, what
the host does per token and the time, on a toy model and, where there is a TensorRT, on plans of STAR-Nano.
"""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import numpy as np

from engines.bench import in_turns
from engines.sessions.device_loop import KERNELS, SOURCE
from engines.tensorrt import device, graphs, nvrtc
from tests.helpers.loop_kernels import compared, equal, loop_without_model

from . import toy
from .loop_observed import REPEATS, SEED, Subject, observe
from .measuring import Parts, forked
from .report import Report

NAME, LIMIT_SECONDS = "device_loop", 150
KERNELS_SECONDS, TOY_SECONDS = 25, 45
WINDOWS, CASES, CODEBOOKS = (1, 2, 4, 16), 9, (4200, 65_536)  # the second is the released models'
NODES, TOKENS, REAL_TOKENS, REAL_HIDDEN = 50, 64, 576, 2048
SHAPES = ((1, 1), (1, 16), (2, 1), (2, 16))  # images, window


def run(folder: Path, report: Report) -> None:
    """The step, in three processes. Raises ImportError without torch, whose profiler it uses."""
    import torch  # noqa: F401  once, before the forks

    from .loop_plans import plans

    ends = time.monotonic() + LIMIT_SECONDS - 10
    forked(report, "kernels", lambda record: kernels(record), seconds=KERNELS_SECONDS)
    forked(report, "toy", lambda record: toys(folder, record), seconds=TOY_SECONDS)
    left = ends - time.monotonic()
    forked(report, "plans", lambda record: plans(folder, record, seconds=left), seconds=left + 5)


def kernels(report: Report) -> None:
    """loop.cu compiled for this device: each kernel's results and time. Raises MissingError without a GPU,
    cuda-python or NVRTC.
    """
    gpu, started = device.gpus()[0], time.monotonic()
    report.fact("chip", f"{gpu.name}, {gpu.sm}")
    report.fact("CUDA", {"driver": device.driver_version(), "NVRTC": list(nvrtc.nvrtc_version())})
    parts = Parts(report, limit_seconds=KERNELS_SECONDS, device="cuda")
    loads = False
    with parts("loop.cu compiles and loads"):
        nvrtc.kernels_from_source(SOURCE, *KERNELS)
        loads = True
        report.check("loop.cu compiles and loads", loads, f"for {gpu.sm}")
        report.figure("loop.cu: compile and load", [time.monotonic() - started], "s")
    if loads:
        with parts("kernels: results"):
            results(report)
        with parts("kernels: time"):
            kernel_times(report)


def results(report: Report) -> None:
    """Check: what each kernel writes is what the CPU computes, bit for bit, in all steps of many images."""
    seen, wrong = Counter[str](), dict[str, list[str]]()
    for window in WINDOWS:
        for case in range(CASES):
            rng = np.random.default_rng(100 * window + case)
            codebook = CODEBOOKS[1] if case == 0 else int(rng.integers(1, CODEBOOKS[0]))
            sizes = {"images": 1 + case % 3, "tokens": window + int(rng.integers(1, 30)), "window": window}
            seed = None if case == 8 else int.from_bytes(rng.bytes(16), "big")
            for what, got, wanted in compared(rng, codebook=codebook, seed=seed, **sizes):
                name = what.partition(":")[0]
                seen[name] += 1
                if not equal(got, wanted):
                    wrong.setdefault(name, []).append(f"{what}, {sizes}, case {case}")
    for name in KERNELS:
        differ = wrong.get(name, [])
        detail = f"{len(differ)} of {seen[name]} differ" + (f", first: {differ[0]}" if differ else "")
        report.check(f"{name}: as on the CPU, bit for bit", bool(seen[name]) and not differ, detail)


def kernel_times(report: Report) -> None:
    """Figures: microseconds of each kernel in a graph of many, in the released models' sizes."""
    for window in (1, 16):
        sizes = {"window": window, "tokens": REAL_TOKENS, "codebook": CODEBOOKS[1], "hidden": REAL_HIDDEN}
        loop, _, head, _ = loop_without_model(images=1, **sizes)
        for name, kernel in zip(KERNELS, (loop._advance, loop._noise, loop._feed)):
            loop._start(0, 0, SEED)  # a window whose rows are all new
            graph = graphs.graph_of(lambda kernel=kernel: [loop._launch(kernel, head) for _ in range(NODES)])
            seconds = in_turns({name: graph.launch}, repeats=REPEATS, synchronize=device.synchronize)[name]
            graph.close()
            report.figure(f"{name}, window {window}", [1e6 * s / NODES for s in seconds], "us", **sizes)


def toys(folder: Path, report: Report) -> None:
    """The loop on the toy model, its ids beside the host's in numpy. Raises MissingError without a GPU,
    cuda-python or NVRTC.
    """
    device.gpus()
    nvrtc.nvrtc_version()
    parts = Parts(report, limit_seconds=TOY_SECONDS, device="cuda")
    for images, window in SHAPES:
        with parts(f"toy N{images} W{window}"):
            subject = toy_subject(folder, images, window)
            reference = toy.loop_on(toy.host_sessions(), images=images, window=window, tokens=TOKENS)
            observe(subject, subject.draw(reference), "the CPU's", parts, folder)


def toy_subject(folder: Path, images: int, window: int) -> Subject:
    """The toy model on the device. Raises what `kernels_from_source` does."""
    sessions, (embeds, places) = toy.device_sessions(folder), toy.prompt(images)

    def again(loop) -> None:
        loop.slots.rewind(toy.PROMPT_TOKENS)
        loop.decode(toy.PROMPT_TOKENS, SEED)

    return Subject(
        f"toy N{images} W{window}",
        window,
        TOKENS,
        lambda tokens: toy.loop_on(sessions, images=images, window=window, tokens=tokens),
        lambda loop: loop.draw(embeds, places, guidance=1.0, top_k=1, top_p=1.0, seed=SEED),
        again,
    )
