"""Decoders of STAR-3B and 7B with all layers, on noise: time per step beside PyTorch and Hugging Face.

A step is base_ar, stacked_ar and the image head under guidance. N images are 2N rows; W = 16 is one image
with 16 positions per step. The floor is the bytes of the weights that a step reads and of the filled caches,
over the bandwidth of a copy in the same run.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from engines.bench import in_turns
from reference.config import StarConfig

from .executors import OrtRunner, TorchRunner
from .measuring import COPY_BYTES, Parts, check_device, copy_bandwidth, forked, release, synchronize
from .report import Report
from .sizes import SIZES

NAME = "real_widths"
LIMIT_SECONDS = 200
ORDER = (
    ("3B", "bf16", 40),
    ("3B", "int4", 25),
    ("7B", "bf16", 60),
    ("7B", "int4", 25),
)  # and the seconds that each must have
SHAPES = {"N1": (1, 1), "N4": (4, 1), "W16": (1, 16)}  # images, positions per step
FILLED_TOKENS = 320  # of the caches: a prompt of 32 tokens and half an image
STEPS, REPEATS = 8, 5  # steps in one measurement, measurements
GOAL_SHARE = 0.8  # of the copy bandwidth, in bf16
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Plan:
    """What to measure where. The defaults are the GPU's; the tests take a tiny size on the CPU."""

    device: str = "cuda"
    graphs: Path | None = None
    limit_seconds: float = LIMIT_SECONDS
    copy_bytes: int = COPY_BYTES
    repeats: int = REPEATS
    compile: bool = True
    shapes: Mapping[str, tuple[int, int]] = field(default_factory=lambda: SHAPES)


def run(folder: Path, report: Report) -> None:
    """The step, each size and precision in a process of its own, most valuable first. STAR_GPU_GRAPHS names a
    folder of graphs that `tests.gpu.graphs` wrote; without it they are traced here. Raises MissingError for
    what this machine lacks."""
    import onnxruntime  # noqa: F401
    import torch  # noqa: F401  all imported once, before the forks
    import transformers  # noqa: F401

    ends, graphs = time.monotonic() + LIMIT_SECONDS - 10, os.environ.get("STAR_GPU_GRAPHS")
    for i, (size, precision, _) in enumerate(ORDER):
        seconds = ends - time.monotonic() - sum(needed for _, _, needed in ORDER[i + 1 :])
        plan = Plan(graphs=Path(graphs) if graphs else None, limit_seconds=seconds - 5)
        forked(
            report,
            f"{size} {precision}",
            lambda record: on_device(plan, folder, record, size, precision),
            seconds=seconds,
        )


def on_device(plan: Plan, folder: Path, report: Report, size: str, precision: str) -> None:
    """One size in one precision, where there is a CUDA device; else MissingError."""
    check_device()
    measure(plan, folder, report, size, precision)


def measure(plan: Plan, folder: Path, report: Report, size: str, precision: str) -> None:
    """All measurements of one size in one precision."""
    parts = Parts(report, limit_seconds=plan.limit_seconds, device=plan.device)
    bandwidth = copy_bandwidth(plan.device, size_bytes=plan.copy_bytes)
    report.figure(
        f"{size} {precision}: copy bandwidth", [b / 1e12 for b in bandwidth], "TB/s", bytes=plan.copy_bytes
    )
    release(plan.device)
    Measurement(plan, parts, folder / size / precision, size, precision, max(bandwidth)).run()


class Measurement:
    """One size in one precision."""

    def __init__(self, plan: Plan, parts: Parts, folder: Path, size: str, precision: str, bandwidth: float):
        self.plan, self.parts, self.report, self.folder = plan, parts, parts.report, folder
        self.size, self.precision, self.bandwidth = size, precision, bandwidth
        self.config: StarConfig = SIZES[size]
        self.name = f"{size} {precision}"

    def run(self) -> None:
        """ONNX Runtime, and for dense weights PyTorch in the same turns, then Hugging Face, then traces of
        what ran."""
        for fused in (False, True) if self.kind.formats else (False,):
            label, runner = "ONNX Runtime, MatMulNBits" if fused else "ONNX Runtime", None
            with self.parts.finding(f"{self.name}: {label} runs"):
                runner = OrtRunner(self, fused=fused, label=label)
            if runner or not self.kind.formats:
                traces = self.all_turns(runner)
                if not self.kind.formats and self.parts.enough(f"{self.name}: Hugging Face", 15):
                    with self.parts(f"{self.name}: Hugging Face"):
                        self.hugging_face()
                for name, step in traces.items():  # last: a profiler may slow what follows it
                    if self.plan.device == "cuda" and self.parts.enough(f"{self.name} N1: {name}, trace", 8):
                        with self.parts(f"{self.name} N1: {name}, trace"):
                            self.trace(name, step)
            del runner
            release(self.plan.device)

    @property
    def kind(self):
        from star_export.graph.precisions import PRECISIONS

        return PRECISIONS[self.precision]

    def all_turns(self, runner: OrtRunner | None) -> dict[str, Callable[[int], None]]:
        """Every shape, with whatever runs of ONNX Runtime and PyTorch, in turns. The steps of N1, by name."""
        peers, first = None, {}
        if not self.kind.formats:
            with self.parts(f"{self.name}: PyTorch"):
                peers = TorchRunner(self)
        for shape in self.plan.shapes:
            if self.parts.enough(f"{self.name} {shape}", 10):
                with self.parts(f"{self.name} {shape}"):
                    kinds = (runner.kinds(shape) if runner else {}) | (peers.kinds(shape) if peers else {})
                    self.turns(shape, kinds, runner)
                    first = first or kinds
        return first

    def trace(self, name: str, step: Callable[[int], None]) -> None:
        """Fact: what one step asks of the GPU."""
        from .launches import per_step

        def steps(count: int) -> None:
            for i in range(count):
                step(FILLED_TOKENS + i)

        self.report.fact(f"{self.name} N1: {name}, per step", per_step(steps, self.folder, short=1, long=3))

    def turns(self, shape: str, kinds: Mapping[str, Callable[[int], None]], runner: OrtRunner | None) -> None:
        """Measure `kinds` (name -> step at a slot) in turns and report milliseconds, shares of the floor and
        ratios."""
        images, positions = self.plan.shapes[shape]

        def many(step: Callable[[int], None]) -> Callable[[], None]:
            return lambda: [step(FILLED_TOKENS + i * positions) for i in range(STEPS)]

        seconds = in_turns(
            {name: many(step) for name, step in kinds.items()},
            repeats=self.plan.repeats,
            synchronize=lambda: synchronize(self.plan.device),
        )
        read_bytes = self.read_bytes(runner) + self.cache_bytes(2 * images)
        shares = {}
        for name, values in seconds.items():
            title, context = f"{self.name} {shape}: {name}", {"rows": 2 * images, "positions": positions}
            self.report.figure(title, [1e3 * value / STEPS for value in values], "ms per step", **context)
            shares[name] = [read_bytes * STEPS / self.bandwidth / value for value in values]
            self.report.figure(
                f"{title}, share of the copy bandwidth", shares[name], "", read_bytes=read_bytes, **context
            )
        if shape == "N1" and self.precision == "bf16":
            self.report.fact(
                f"{self.name} N1: reaches {GOAL_SHARE} of the copy bandwidth",
                {name: statistics.median(values) >= GOAL_SHARE for name, values in shares.items()},
            )
        ours = next(
            (name for name in kinds if name.startswith("ONNX Runtime") and "CUDA graph" in name),
            next(iter(kinds)),
        )
        for name in kinds:
            if name != ours:
                self.report.figure(
                    f"{self.name} {shape}: {ours} over {name}",
                    [a / b for a, b in zip(seconds[ours], seconds[name])],
                    "",
                )

    def read_bytes(self, runner: OrtRunner | None) -> int:
        """Bytes of weights that a step reads: as stored in the graphs, or dense in 16 bits."""
        if runner:
            return sum(graph.read_bytes for graph in runner.graphs.values())
        c = self.config
        d = c.base_ar
        kv = d.num_kv_heads * d.head_dim
        layer = (
            d.hidden_size * (2 * d.num_heads * d.head_dim + 2 * kv + 3 * d.intermediate_size + 2)
            + d.num_heads * d.head_dim
            + 2 * kv
        )
        return ITEM_BYTES[self.kind.dtype_name] * (
            (d.num_layers + c.stacked_ar.num_layers) * layer
            + 2 * d.hidden_size
            + (d.hidden_size + 1) * c.vq.codebook_size
        )

    def cache_bytes(self, rows: int) -> int:
        """Bytes of the filled slots of both decoders' caches."""
        d = self.config.base_ar
        layers = d.num_layers + self.config.stacked_ar.num_layers
        return (
            layers * 2 * rows * FILLED_TOKENS * d.num_kv_heads * d.head_dim * ITEM_BYTES[self.kind.dtype_name]
        )

    def hugging_face(self) -> None:
        """`generate`, from the difference of two lengths, with its own cache and with a static one."""
        from .torch_decode import generated, hugging_face_model

        model = hugging_face_model(self.config, device=self.plan.device, dtype=self.kind.dtype_name)
        for static in (False, True):
            name = f"{self.name} N1: Hugging Face generate, {'static' if static else 'dynamic'} cache"
            with self.parts(name):

                def call(tokens: int, static=static) -> Callable[[], object]:
                    return lambda: generated(
                        model, rows=2, prompt_tokens=FILLED_TOKENS, new_tokens=tokens, static=static
                    )

                seconds = in_turns(
                    {"short": call(2), "long": call(2 + 2 * STEPS)},
                    repeats=3,
                    synchronize=lambda: synchronize(self.plan.device),
                )
                self.report.figure(
                    name,
                    [1e3 * (b - a) / (2 * STEPS) for a, b in zip(seconds["short"], seconds["long"])],
                    "ms per step",
                    rows=2,
                )
