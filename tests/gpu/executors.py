"""What executes a decode step at released width: ONNX Runtime and PyTorch, each with and without a CUDA
graph."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from .measuring import synchronize, used_bytes
from .sizes import PARTS

if TYPE_CHECKING:
    from .real_widths import Measurement

CAPACITY_TOKENS = 640  # a prompt of 32 tokens, an image of 576, and room for steps of 16


class OrtRunner:
    """The three components on ONNX Runtime, with captured CUDA graphs where it can. `kinds(shape)` are its
    steps."""

    def __init__(self, of: Measurement, *, fused: bool, label: str):
        from .graphs import read_graph
        from .noise import write_noise
        from .ort_decode import NO_GRAPH, open_session

        self.of, self.label, self.sessions, self.captures = of, label, {}, set()
        device, before, started = of.plan.device, used_bytes(of.plan.device), time.monotonic()
        self.graphs = {
            name: write_noise(
                read_graph(of.size, name, of.plan.graphs),
                of.folder / str(fused) / name,
                precision=of.kind,
                fused=fused,
            )
            for name in PARTS
        }
        written = time.monotonic()
        for name, graph in self.graphs.items():
            if device == "cuda":
                with of.parts.finding(f"{of.name}: {label}: {name} takes a CUDA graph"):
                    self.sessions[name] = open_session(graph.path, device=device, cuda_graph=True)
                    self.captures.add(name)
            if name not in self.sessions:
                self.sessions[name] = open_session(graph.path, device=device)
        for graph in self.graphs.values():
            graph.path.with_name("noise.data").unlink()
        self.steps = {}
        self._step("N1", NO_GRAPH)(0)
        of.report.fact(
            f"{of.name}: {label}: seconds to write and to load",
            [round(written - started, 1), round(time.monotonic() - written, 1)],
        )
        if device == "cuda":
            of.report.figure(
                f"{of.name}: {label}: device memory",
                [(used_bytes(device) - before) / 2**30],
                "GiB",
                weights_GiB=round(sum(g.weight_bytes for g in self.graphs.values()) / 2**30, 2),
            )

    def kinds(self, shape: str) -> dict[str, Callable[[int], None]]:
        """name -> step at a slot, for this shape."""
        from .ort_decode import NO_GRAPH

        made = {self.label: self._step(shape, NO_GRAPH)}
        if self.captures:
            name = f"{self.label}, CUDA graph" + (
                "" if len(self.captures) == len(PARTS) else f" of {' and '.join(sorted(self.captures))}"
            )
            with self.of.parts(f"{self.of.name} {shape}: {name}"):
                step = self._step(shape, str(1 + list(self.of.plan.shapes).index(shape)))
                for _ in range(3):
                    step(0)
                made[name] = step
        return made

    def _step(self, shape: str, graph_id: str) -> Callable[[int], None]:
        from .ort_decode import DecodeStep

        if (shape, graph_id) not in self.steps:
            images, positions = self.of.plan.shapes[shape]
            self.steps[shape, graph_id] = DecodeStep(
                self.sessions,
                self.of.config,
                images=images,
                positions=positions,
                capacity_tokens=CAPACITY_TOKENS,
                device=self.of.plan.device,
                cache_dtype=self.of.kind.dtype_name,
                graph_id=graph_id,
            )
        return self.steps[shape, graph_id].step


class TorchRunner:
    """The reference's modules in PyTorch: eager, captured in one CUDA graph, and captured after compiling the
    layers."""

    def __init__(self, of: Measurement):
        from .torch_decode import modules_of

        self.of, before = of, used_bytes(of.plan.device)
        self.modules = modules_of(of.config, device=of.plan.device, dtype=of.kind.dtype_name)
        self.compile_seconds = 0.0
        if of.plan.device == "cuda":
            of.report.figure(
                f"{of.name}: PyTorch: device memory", [(used_bytes(of.plan.device) - before) / 2**30], "GiB"
            )

    def kinds(self, shape: str) -> dict[str, Callable[[int], None]]:
        """name -> step at a slot, for this shape."""
        import torch

        made = {}
        with self.of.parts(f"{self.of.name} {shape}: PyTorch eager"):
            made["PyTorch eager"] = self._inference(self._step(shape))
        if self.of.plan.device == "cuda":
            with self.of.parts(f"{self.of.name} {shape}: PyTorch eager, CUDA graph"):
                step = self._step(shape)
                step.capture()
                made["PyTorch eager, CUDA graph"] = step.step
        if self.of.plan.compile and self.of.parts.enough(
            f"{self.of.name} {shape}: torch.compile", 35 + self.compile_seconds
        ):
            with self.of.parts(f"{self.of.name} {shape}: torch.compile"), torch.inference_mode():
                name, step = self._compiled(shape)
                made[name] = self._inference(step)
        return made

    def _compiled(self, shape: str):
        from .torch_decode import compile_layers, uncompile_layers

        step, started = self._step(shape), time.monotonic()
        compile_layers(self.modules)
        try:
            for _ in range(2):
                step.step(0)
            if self.of.plan.device == "cuda":
                step.capture()
        finally:
            if self.of.plan.device == "cuda":
                uncompile_layers(self.modules)
        synchronize(self.of.plan.device)
        self.compile_seconds = time.monotonic() - started
        self.of.report.fact(f"{self.of.name} {shape}: seconds to compile", round(self.compile_seconds, 1))
        return "torch.compile, static cache" + (", CUDA graph" if self.of.plan.device == "cuda" else ""), step

    def _step(self, shape: str):
        from .torch_decode import TorchStep

        images, positions = self.of.plan.shapes[shape]
        return TorchStep(
            self.modules, self.of.config, images=images, positions=positions, capacity_tokens=CAPACITY_TOKENS
        )

    def _inference(self, step) -> Callable[[int], None]:
        import torch

        def call(index: int) -> None:
            with torch.inference_mode():
                step.step(index)

        return call
