"""A decode step at STAR-3B's width on the CPU, beside its bandwidth limit: python -m tests.bench_decode

[--layers 4] [--precisions int4 int8 fp32] [--rows 1 2] [--repeats 15] [--capacity 704] [--keep FOLDER]

A decoder of a few layers and the image head, with weights of noise, are written to a temporary folder and run
on both backends of the CPU, at one position and, with the last number of rows, at 16. PyTorch runs the same
decoder in float32; OpenVINO (from the fp32 graph) joins it where it is installed. All variants are measured
in turns. Before each call two threads read 512 MiB, so that no weight lies in a cache, as in a whole model;
the fastest such read is the bandwidth. The limit is the stored weights over the bandwidth, and a share is the
limit divided by the time. Nothing is asserted, and what runs beside it changes the figures.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from engines.bundle.files import sha256_of
from engines.bundle.manifest import FileSpec, GoldenSpec, Manifest, json_from_manifest
from engines.bundle.reader import Bundle
from engines.bundle.tensors import bound_tensors, present_name, shape_from_symbols
from engines.sessions import ON_CPU, open_session
from reference.containers import LazyTensor
from reference.model import Star
from star_export.components import whole
from star_export.exporter.export import component_spec, write_component
from star_export.graph.precisions import PRECISIONS
from star_export.graph.quantize import TRANSPOSED
from tests.gpu.graphs import graph_of
from tests.gpu.sizes import SIZES
from tests.helpers.tiny_bundle import MODEL, SCHEMA

READ_BYTES = 1 << 29
POSITIONS, FILLED = 16, 320  # of a prefill; slots before the step that is measured


def few_layers(layers: int):
    """STAR-3B's configuration with a base decoder of `layers`."""
    config = SIZES["3B"]
    return replace(config, base_ar=replace(config.base_ar, num_layers=layers))


def write_bundle(root: Path, precision: str, layers: int, names=("base_ar", "image_head")) -> Bundle:
    """A bundle of the components `names` with weights of noise, without golden tensors."""
    config = few_layers(layers)
    for name in names:
        model = graph_of(name, config)
        write_component(model, noise_of(model), PRECISIONS[precision], root / name)
        (root / name / "golden.safetensors").write_bytes(b"none")
    files = sorted(path for path in root.rglob("*") if path.is_file())
    manifest = Manifest(
        schema=SCHEMA,
        precision=precision,
        model=MODEL,
        components={
            name: component_spec(whole(name, config), config, PRECISIONS[precision]) for name in names
        },
        tables={},
        part_bytes=1 << 40,
        golden=GoldenSpec(1, 1, 1, 1, 1),
        files={p.relative_to(root).as_posix(): FileSpec(p.stat().st_size, sha256_of(p)) for p in files},
    )
    (root / "manifest.json").write_text(json_from_manifest(manifest))
    return Bundle.open(root)


def noise_of(model) -> dict[str, LazyTensor]:
    """Noise for every weight of a traced graph, such that a product keeps the size of its input."""

    def lazy(name: str, value) -> LazyTensor:
        shape = tuple(value.shape)[:: -1 if TRANSPOSED in value.metadata_props else 1]

        def read() -> torch.Tensor:
            made = torch.randn(shape, generator=torch.Generator().manual_seed(len(name)))
            return made / shape[1] ** 0.5 if len(shape) > 1 else made * 0.02 + (not name.endswith("bias"))

        return LazyTensor(name, shape, torch.float32, Path("noise"), read)

    empty = {name: v for name, v in model.graph.initializers.items() if v.const_value is None}
    return {name: lazy(name, value) for name, value in empty.items()}


def bound_step(bundle: Bundle, name: str, backend: str, *, rows: int, tokens: int, capacity: int):
    """(step, session) of one component, with `FILLED` slots of its caches before it."""
    session = open_session(bundle, name, backend=backend)
    sizes = {"B": rows, "S": tokens, "C": capacity, "N": max(1, rows // 2), "2N": 2 * max(1, rows // 2)}
    buffers = {}
    rng = np.random.default_rng(0)
    for spec in bound_tensors(session.spec):
        buffer = buffers[spec.name] = session.buffer(shape_from_symbols(spec.shape, sizes), spec.dtype)
        if spec.name in ("inputs_embeds", "hidden_states") or present_name(spec.name):
            buffer.write(rng.standard_normal(buffer.shape, dtype=np.float32))
        elif spec.name in GIVEN:
            buffer.write(np.full(buffer.shape, GIVEN[spec.name], buffer.dtype))
    return session.bind(buffers), session


GIVEN = {"write_indices": FILLED, "top_k": 100, "top_p": 0.8, "guidance": 1.1, "noise": 0.5}


def torch_step(layers: int, *, rows: int, tokens: int, capacity: int) -> Callable[[], object]:
    """The same decoder in PyTorch, eager, float32: `reference.decoder` with random weights."""
    config = few_layers(layers)
    small = replace(config, stacked_ar=replace(config.stacked_ar, num_layers=0))
    with torch.device("meta"):
        decoder = Star(small, rope_bf16=True).base_ar
    decoder = decoder.to_empty(device="cpu")
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    cache = config.base_ar
    shape = (rows, cache.num_kv_heads, capacity, cache.head_dim)
    pairs = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(layers)]
    given = torch.randn(rows, tokens, cache.hidden_size)
    positions, indices = torch.zeros(3, rows, tokens, dtype=torch.int64), torch.full((rows,), FILLED)

    def step() -> object:
        with torch.inference_mode():
            return decoder(given, positions, indices, pairs)

    step()
    return step


def openvino_step(graph: Path, *, rows: int, tokens: int, capacity: int) -> Callable[[], object]:
    """The fp32 graph in OpenVINO, which is no dependency of this project."""
    import openvino

    compiled = openvino.Core().compile_model(str(graph), "CPU")
    request = compiled.create_infer_request()
    for port in compiled.inputs:
        name = port.get_any_name()
        tail = [d.get_length() if d.is_static else None for d in port.partial_shape]
        shape = {"inputs_embeds": (rows, tokens, tail[-1]), "position_ids": (3, rows, tokens)}.get(name)
        shape = shape or ((rows,) if name == "write_indices" else (rows, tail[1], capacity, tail[3]))
        kind = np.int64 if "ids" in name or "indices" in name else np.float32
        request.set_tensor(name, openvino.Tensor(np.full(shape, GIVEN.get(name, 0), kind)))
    return request.infer


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench_decode", description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--precisions", nargs="+", default=["int4", "int8", "fp32"], choices=PRECISIONS)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--capacity", type=int, default=704)
    parser.add_argument("--keep", type=Path, help="keep the bundles in this folder, and use those in it")
    given = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        for precision in given.precisions:
            measure(given.keep or Path(folder), precision, given)


def measure(folder: Path, precision: str, given: argparse.Namespace) -> None:
    """Measure one precision and print its table; a precision at a time, to bound memory."""
    root = folder / precision
    if not (root / "manifest.json").exists():
        write_bundle(root, precision, given.layers)
    bundle = Bundle.open(root)
    print(f"{precision}: {given.layers} layers of STAR-3B's width, capacity {given.capacity}", flush=True)
    shapes = [(rows, 1) for rows in given.rows] + [(given.rows[-1], POSITIONS)]
    backends = ON_CPU if precision in ("int8", "int4") else ON_CPU[:1]
    for backend in backends:
        for name in ("base_ar", "image_head"):
            stored = stored_bytes(bundle, name)
            started = time.perf_counter()
            open_session(bundle, name, backend=backend).close()
            seconds = time.perf_counter() - started
            print(f"  {backend:20} {name:12} loads {stored >> 20} MiB in {seconds:.2f} s", flush=True)
    calls: dict[str, tuple[Callable[[], object], int]] = {}
    for rows, tokens in shapes:
        size = {"rows": rows, "tokens": tokens, "capacity": given.capacity}
        label = f"{rows} x {tokens}"
        for backend in backends:
            for name in ("base_ar", "image_head") if tokens == 1 else ("base_ar",):
                stored = stored_bytes(bundle, name)
                calls[f"{backend} {name} {label}"] = bound_step(bundle, name, backend, **size)[0], stored
        if precision == "fp32":
            stored = stored_bytes(bundle, "base_ar")
            calls[f"PyTorch, eager base_ar {label}"] = torch_step(given.layers, **size), stored
            if importlib.util.find_spec("openvino"):
                graph = bundle.path / bundle.component("base_ar").graph
                calls[f"OpenVINO base_ar {label}"] = openvino_step(graph, **size), stored
    print_table(calls, repeats=given.repeats)


def stored_bytes(bundle: Bundle, name: str) -> int:
    """Bytes of the weights that a step of a component reads: all but the image head's table of embeddings."""
    config, item = few_layers(1), 4 if bundle.manifest.precision == "fp32" else 2
    table = config.vq.codebook_size * config.base_ar.hidden_size * item if name == "image_head" else 0
    return sum(bundle.manifest.files[file].size for file in bundle.weights(name)) - table


def print_table(calls: dict[str, tuple[Callable[[], object], int]], *, repeats: int) -> None:
    """Measure in turns; print the median of each, the limit and the share."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    cores = os.cpu_count() or 1
    blocks, reads = [np.ones(READ_BYTES // 8 // cores) for _ in range(cores)], []
    with ThreadPoolExecutor(cores) as pool:
        for turn in range(repeats + 1):
            for name, (call, _) in calls.items():
                reads.append(timed(lambda: list(pool.map(np.sum, blocks))))
                seconds[name] += [timed(call)] if turn else []
    bandwidth = READ_BYTES / min(reads)
    print(
        f"  {cores} cores read {bandwidth / 1e9:.1f} GB/s, {READ_BYTES / statistics.median(reads) / 1e9:.1f} "
        "in the median"
    )
    print(f"  {'':44} {'ms':>8} {'fastest':>8} {'limit':>8} {'share':>6}")
    for name, (_, stored) in calls.items():
        median, limit = statistics.median(seconds[name]), stored / bandwidth
        times = f"{median * 1e3:8.2f} {min(seconds[name]) * 1e3:8.2f} {limit * 1e3:8.2f}"
        print(f"  {name:44} {times} {limit / median:6.2f}", flush=True)


def timed(call: Callable[[], object]) -> float:
    """Seconds of a call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
