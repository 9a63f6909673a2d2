"""What evaluating a parsed network costs: one decoder layer of STAR-3B's size in bf16, 64 positions, on the
CPU.

.venv/bin/python -m tests.bench_interpreter

This is a benchmark, not a test: it asserts nothing, and its times hold for this machine and this run. The
layer is measured in a process of its own, and the memory is what that process grew by at its peak, from
before the parse to the end; it includes the weights that the parser maps from the file.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

POSITIONS, CAPACITY = 64, 128
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 2048, 16, 2, 128, 11008  # STAR-3B's base model
LIMIT_S, LIMIT_RATIO = 15, 2.0


def write_layer(folder: Path) -> None:
    """`folder/base_ar`: a decoder of one layer of that size, random weights in bf16."""
    import torch

    from reference.config import config_from_files
    from reference.mini import write_checkpoint
    from reference.weights import resolve_checkpoint
    from star_export.components import whole
    from star_export.exporter.component import write_component
    from star_export.graph.precisions import PRECISIONS
    from star_export.graph.repeat import graph_from_config
    from star_export.graph.trace import meta_star

    write_checkpoint(folder / "mini")
    files = resolve_checkpoint(str(folder / "mini"))
    config = config_from_files(files.config_json, files.qwen_folder)
    sizes = {
        "hidden_size": HIDDEN,
        "num_layers": 1,
        "num_heads": HEADS,
        "num_kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "intermediate_size": INTERMEDIATE,
        "mrope_section": (16, 24, 24),
    }
    config = dataclasses.replace(
        config,
        **{name: dataclasses.replace(getattr(config, name), **sizes) for name in ("base_ar", "stacked_ar")},
    )

    class Random:
        def __init__(self, shape):
            self.shape = shape

        def load(self):
            return torch.randn(self.shape) / self.shape[-1] ** 0.5

    tensors = {name: Random(p.shape) for name, p in meta_star(config, rope_bf16=True).named_parameters()}
    graph = graph_from_config(whole("base_ar", config), config, rope_bf16=True)
    write_component(graph, tensors, PRECISIONS["bf16"], folder / "base_ar")


def peak_bytes(*, reset: bool = False) -> int:
    """The most memory that this process had resident, since the start or the last reset (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
    )
    return int(line.split()[1]) * 1024


def measure(graph: Path) -> None:
    """Parse, read and run the layer twice; print the figures."""
    import tensorrt_rtx as trt

    from engines.interpreter import Network, parsed_from_network
    from engines.tensorrt.module import log_of
    from engines.tensorrt.network import network_from_onnx

    caches = [np.zeros((1, KV_HEADS, CAPACITY, HEAD_DIM), np.float32) for _ in range(2)]
    feeds = {
        "inputs_embeds": np.random.default_rng(0).standard_normal((1, POSITIONS, HIDDEN)).astype(np.float32),
        "write_indices": np.zeros(1, np.int64),
        "position_ids": np.broadcast_to(np.arange(POSITIONS), (3, 1, POSITIONS)),
        "past_key_values.0.key": caches[0],
        "past_key_values.0.value": caches[1],
    }
    builder = trt.Builder(log_of(trt))
    before, start = peak_bytes(reset=True), time.perf_counter()
    network, parser = network_from_onnx(trt, builder, graph, capacity_tokens=CAPACITY)
    parsed = parsed_from_network(trt, network, owner=(builder, parser))
    weights = 4 * sum(layer["weights"].count for layer in parsed.layers if layer.kind == "CONSTANT")
    evaluator, read = Network(parsed), time.perf_counter()
    evaluator.run(feeds)
    first = time.perf_counter()
    evaluator.run(feeds)
    second, grown = time.perf_counter(), peak_bytes() - before
    print(
        f"{'parse and read':28} {read - start:8.2f} s\n{'first run':28} {first - read:8.2f} s\n"
        f"{'second run':28} {second - first:8.2f} s\n"
        f"{'parse, read and first run':28} {first - start:8.2f} s  limit {LIMIT_S} s\n"
        f"{'peak growth of the process':28} {grown / 1e6:8.0f} MB, {grown / weights:.2f} x "
        f"the {weights / 1e6:.0f} MB of weights in fp32  limit {LIMIT_RATIO}"
    )


def main() -> None:
    if len(sys.argv) == 2:
        measure(Path(sys.argv[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_layer(Path(folder))
        subprocess.run(
            [sys.executable, "-m", "tests.bench_interpreter", str(Path(folder) / "base_ar/model.onnx")],
            check=True,
        )


if __name__ == "__main__":
    main()
