"""What the host asks of the GPU per step, counted in a profiler's trace: launches, copies, waits, and the
GPU's busy time.

torch.profiler records every call of the CUDA runtime and driver in the process through CUPTI, ONNX Runtime's
too.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest import mock

KINDS = {
    "graph launches": ("cudaGraphLaunch", "cuGraphLaunch"),
    "kernel launches": ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchCooperativeKernel"),
    "copies": ("cudaMemcpy", "cuMemcpy"),
    "fills": ("cudaMemset", "cuMemset"),
    "syncs": (
        "cudaStreamSynchronize",
        "cudaDeviceSynchronize",
        "cudaEventSynchronize",
        "cuStreamSynchronize",
        "cuCtxSynchronize",
        "cuEventSynchronize",
    ),
}


def traced(call: Callable[[], object], path: Path) -> dict:
    """The profiler's trace of `call`, as chrome://tracing reads it."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    with profile(activities=activities) as profiler:
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    profiler.export_chrome_trace(str(path))
    return json.loads(path.read_text())


def calls_of(trace: dict) -> Counter:
    """Kind of call -> how many of them the host made. A call of the driver that a call of the runtime makes
    is not counted again."""
    counts: Counter = Counter(dict.fromkeys(KINDS, 0))
    within: dict[object, float] = {}  # thread -> end of the runtime's last call
    calls = [event for event in trace["traceEvents"] if event.get("cat") in ("cuda_runtime", "cuda_driver")]
    for event in sorted(calls, key=lambda event: (event["ts"], event["cat"] == "cuda_driver")):
        if event["cat"] == "cuda_runtime":
            within[event["tid"]] = event["ts"] + event["dur"]
        elif event["ts"] < within.get(event["tid"], float("-inf")):
            continue
        for kind, prefixes in KINDS.items():
            counts[kind] += event["name"].startswith(prefixes)
    return counts


class Counted:
    """A module of cuda-python whose functions are counted by name."""

    def __init__(self, module, counts: Counter):
        self._module, self._counts = module, counts

    def __getattr__(self, name: str):
        value = getattr(self._module, name)
        if not name.startswith("cu") or isinstance(value, type) or not callable(value):
            return value

        def call(*arguments):
            self._counts[name] += 1
            return value(*arguments)

        return call


def own_calls(call: Callable[[], object]) -> Counter:
    """Kind of call -> how many of them `call` makes through cuda-python: those that the profiler leaves out
    too, and not a library's own."""
    from engines.tensorrt import device

    names: Counter = Counter()
    runtime, driver = Counted(device.cudart(), names), Counted(device.driver(), names)
    with (
        mock.patch.object(device, "cudart", lambda: runtime),
        mock.patch.object(device, "driver", lambda: driver),
    ):
        call()
    return Counter(
        {kind: sum(names[n] for n in names if n.startswith(prefixes)) for kind, prefixes in KINDS.items()}
    )


def own_calls_per_step(run: Callable[[int], object], *, short: int, long: int) -> dict[str, float]:
    """`own_calls` of one step, from the difference of `run(short)` and `run(long)` steps."""
    few, many = (own_calls(lambda steps=steps: run(steps)) for steps in (short, long))
    return {kind: round((many[kind] - few[kind]) / (long - short), 2) for kind in KINDS}


def kernels_of(trace: dict) -> tuple[float, int, list[tuple[str, float, int]]]:
    """(milliseconds in which the GPU computed or copied, number of kernels, the costliest: name,
    milliseconds, number)."""
    busy: Counter = Counter()
    number: Counter = Counter()
    spans = []
    for event in trace["traceEvents"]:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            spans.append((event["ts"], event["ts"] + event["dur"]))
            busy[event["name"]] += event["dur"]
            number[event["name"]] += 1
    covered, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered / 1e3, len(spans), [(name, ms / 1e3, number[name]) for name, ms in busy.most_common()]


def per_step(run: Callable[[int], object], folder: Path, *, short: int, long: int) -> dict:
    """What one step costs, from the difference of `run(short)` and `run(long)` steps, both warm: calls by
    kind, GPU milliseconds and kernels, and the ten costliest kernels of the longer run with their share of
    its GPU time."""
    traces = [
        traced(lambda steps=steps: run(steps), folder / f"trace-{steps}.json") for steps in (short, long)
    ]
    steps, (few, many) = long - short, map(calls_of, traces)
    (busy_few, count_few, _), (busy_many, count_many, costly) = map(kernels_of, traces)
    total = sum(ms for _, ms, _ in costly) or 1.0
    return {kind: round((many[kind] - few[kind]) / steps, 2) for kind in KINDS} | {
        "GPU ms": round((busy_many - busy_few) / steps, 4),
        "GPU activities": round((count_many - count_few) / steps, 2),
        "costliest": [
            f"{name[:90]}: {ms / total:.3f} of the time, {number} times" for name, ms, number in costly[:10]
        ],
    }
