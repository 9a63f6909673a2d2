"""A decode step at STAR-3B's width on the CPU, beside its bandwidth limit: python -m tests.bench_decode

[--layers 4] [--precisions int4 int8 fp32] [--rows 1 2] [--repeats 15] [--capacity 704] [--alone]
[--keep FOLDER]

A decoder of a few layers and the image head, with weights of noise, are written to a temporary folder and run
on both backends of the CPU, at one position and, the decoder with the last number of rows, at 16. Beside them
run the decoder's products alone, as ONNX Runtime's operators, and the peers that are installed
(`bench_peers`). What has one precision is measured in turns, after each was loaded and run once: by how much
that raised the resident memory at its peak is printed, too.

Before each call, 512 MiB are read, so that no weight lies in a cache, as in a whole model. Before that, one
thread per core reads as many bytes as the call's weights are stored in, which lie in no cache either: the
median of this time is the limit, and the share is the median of this time over the call's, pair by pair.
Nothing is asserted, and what runs beside it changes the figures; two cores that nothing else may take, as
`chrt -f 1` gives them to root, repeat best.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
from onnx import TensorProto, helper, numpy_helper

from engines.bundle.files import sha256_of
from engines.bundle.manifest import FileSpec, GoldenSpec, Manifest
from engines.bundle.reader import Bundle
from engines.bundle.records import json_from_record
from engines.bundle.tensors import bound_tensors, present_name, shape_from_symbols
from engines.sessions import ON_CPU, Session, open_session
from engines.sessions.onnxruntime import ACTIVATION_BLOCK
from reference.config import DecoderConfig
from reference.containers import LazyTensor
from star_export.components import whole
from star_export.exporter.component import component_spec, write_component
from star_export.graph.precisions import PRECISIONS
from star_export.graph.quantize import TRANSPOSED
from tests.bench_interpreter import peak_bytes
from tests.bench_peers import BITS, build_peers, missing, peer_steps, versions
from tests.gpu.graphs import graph_of
from tests.gpu.sizes import SIZES
from tests.helpers.tiny_bundle import MODEL, SCHEMA
from tests.peers import Step, Steps

FLUSHED_BYTES = 1 << 29
PAUSE_S = 0.1  # after which the threads of the call before no longer spin
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
    (root / "manifest.json").write_text(json_from_record(manifest))
    return Bundle.open(root)


def noise_of(model) -> dict[str, LazyTensor]:
    """Noise for every weight of a traced graph, such that a product keeps the size of its input.

    No two weights are equal: ONNX Runtime would hold them, and read them, once.
    """

    def lazy(name: str, value) -> LazyTensor:
        shape = tuple(value.shape)[:: -1 if TRANSPOSED in value.metadata_props else 1]

        def read() -> torch.Tensor:
            made = torch.randn(shape, generator=torch.Generator().manual_seed(crc32(name.encode())))
            return made / shape[1] ** 0.5 if len(shape) > 1 else made * 0.02 + (not name.endswith("bias"))

        return LazyTensor(name, shape, torch.float32, Path("noise"), read)

    empty = {name: v for name, v in model.graph.initializers.items() if v.const_value is None}
    return {name: lazy(name, value) for name, value in empty.items()}


def bound_step(session: Session, *, rows: int, tokens: int, capacity: int) -> Callable[[], None]:
    """A step of one component, with `FILLED` slots of its caches before it."""
    sizes = {"B": rows, "S": tokens, "C": capacity, "N": max(1, rows // 2), "2N": 2 * max(1, rows // 2)}
    buffers = {}
    rng = np.random.default_rng(0)
    for spec in bound_tensors(session.spec):
        buffer = buffers[spec.name] = session.buffer(shape_from_symbols(spec.shape, sizes), spec.dtype)
        if spec.name in ("inputs_embeds", "hidden_states") or present_name(spec.name):
            buffer.write(rng.standard_normal(buffer.shape, dtype=np.float32))
        elif spec.name in GIVEN:
            buffer.write(np.full(buffer.shape, GIVEN[spec.name], buffer.dtype))
    return session.bind(buffers)


GIVEN = {"write_indices": FILLED, "top_k": 100, "top_p": 0.8, "guidance": 1.1, "noise": 0.5}


def products_steps(config: DecoderConfig, precision: str, rows: list[int]) -> Steps:
    """The products of a decoder's layers alone, as ONNX Runtime's operators, on weights of noise."""
    import onnxruntime

    size, inner, kv = config.hidden_size, config.intermediate_size, config.num_kv_heads * config.head_dim
    layer = [(size, size), (size, kv), (size, kv), (size, size), (size, inner), (size, inner), (inner, size)]
    bits, block = {"int4": (4, 128), "int8": (8, ACTIVATION_BLOCK)}.get(precision, (32, 0))
    rng, nodes, weights = np.random.default_rng(0), [], []
    for i, (features, columns) in enumerate(layer * config.num_layers):
        given, fixed = [f"x{features}", f"weight{i}"], {"K": features, "N": columns, "bits": bits}
        if not block:
            weights.append(rng.standard_normal((features, columns), dtype=np.float32))
            nodes.append(helper.make_node("MatMul", given, [f"y{i}"]))
            continue
        weights.append(rng.integers(0, 256, (columns, features // block, block * bits // 8), dtype=np.uint8))
        given.append(f"scales{features}.{columns}")
        fixed |= {"block_size": block, "accuracy_level": 4}
        nodes.append(helper.make_node("MatMulNBits", given, [f"y{i}"], domain="com.microsoft", **fixed))
    named = {f"weight{i}": array for i, array in enumerate(weights)}
    for features, columns in set(layer) if block else ():
        scales = rng.random((columns, features // block), dtype=np.float32)
        named[f"scales{features}.{columns}"] = scales
    inputs, outputs = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
        for names in ([f"x{size}", f"x{inner}"], [node.output[0] for node in nodes])
    )
    held = [numpy_helper.from_array(array, name) for name, array in named.items()]
    graph = helper.make_graph(nodes, "products", inputs, outputs, held)
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    stored = sum(array.nbytes for array in weights)

    def feeds(count: int) -> dict[str, np.ndarray]:
        return {f"x{n}": rng.standard_normal((1, count, n), dtype=np.float32) for n in (size, inner)}

    return {count: (partial(session.run, None, feeds(count)), stored) for count in rows}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench_decode", description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--precisions", nargs="+", default=["int4", "int8", "fp32"], choices=PRECISIONS)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--capacity", type=int, default=704)
    parser.add_argument("--alone", action="store_true", help="leave the peers out")
    parser.add_argument("--keep", type=Path, help="keep the bundles in this folder, and use those in it")
    given = parser.parse_args(argv)
    for peer in () if given.alone else missing():
        print(f"{peer} is not installed")
    print(", ".join(versions()), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for precision in given.precisions:
            measure(given.keep or Path(folder), precision, given)


def measure(folder: Path, precision: str, given: argparse.Namespace) -> None:
    """Measure one precision and print its table; a precision at a time, to bound memory."""
    root, config = folder / precision, few_layers(given.layers).base_ar
    if not (root / "manifest.json").exists():
        write_bundle(root, precision, given.layers)
    bundle = Bundle.open(root)
    print(f"{precision}: {given.layers} layers of STAR-3B's width, capacity {given.capacity}", flush=True)
    quantised = precision in BITS and precision != "fp32"
    calls: dict[str, Step] = {}
    for backend in ON_CPU if quantised else ON_CPU[:1]:
        for name in ("base_ar", "image_head"):
            stored, before, started = stored_bytes(bundle, name), resident_bytes(), time.perf_counter()
            session = open_session(bundle, name, backend=backend)
            seconds = time.perf_counter() - started
            shapes = [(rows, 1) for rows in given.rows]
            shapes += [(given.rows[-1], POSITIONS)] if name == "base_ar" else []
            for rows, tokens in shapes:
                step = bound_step(session, rows=rows, tokens=tokens, capacity=given.capacity)
                calls[f"{rows} x {tokens} {backend} {name}"] = step, stored
            step()
            print_load(f"{backend} {name}", stored, before, f" in {seconds:.2f} s")
    if precision in BITS:
        steps = products_steps(config, precision, given.rows)
        calls |= {f"{rows} x 1 products alone": step for rows, step in steps.items()}
    if precision in BITS and not given.alone:
        build_peers(precision, config, folder)
        sizes = {"rows": given.rows, "filled": FILLED, "capacity": given.capacity}
        before = resident_bytes()
        for name, steps in peer_steps(precision, config, folder, **sizes):
            calls |= {f"{rows} x 1 {name}": step for rows, step in steps.items()}
            step, stored = steps[given.rows[-1]]
            step()
            print_load(name, stored, before)
            before = resident_bytes()
    print_table(dict(sorted(calls.items())), repeats=given.repeats)


def resident_bytes() -> int:
    """Give freed memory back, and reset the peak to what is resident now (Linux with glibc)."""
    ctypes.CDLL(None).malloc_trim(0)
    return peak_bytes(reset=True)


def print_load(name: str, stored: int, before: int, seconds: str = "") -> None:
    """Say what a peer stores, and how far its load and first steps raised the resident memory above `before`,
    pages of mapped files included."""
    peak = peak_bytes() - before
    print(f"  {name:33} loads {stored >> 20} MiB{seconds}, peak memory {peak >> 20} MiB", flush=True)


def stored_bytes(bundle: Bundle, name: str) -> int:
    """Bytes of the weights that a step of a component reads: all but the image head's table of embeddings."""
    config, precision = few_layers(1), PRECISIONS[bundle.manifest.precision]
    sizes = config.vq.codebook_size, config.base_ar.hidden_size
    table = sum(precision.stored("image_table.weight", sizes)[1]) if name == "image_head" else 0
    return sum(bundle.manifest.files[file].size for file in bundle.weights(name)) - table


def print_table(calls: dict[str, Step], *, repeats: int) -> None:
    """Measure in turns; print the median of each, the limit and the share."""
    cores = os.cpu_count() or 1
    others = [np.ones(FLUSHED_BYTES // 4 // cores, np.float32) for _ in range(cores)]
    blocks = [np.ones(max(n for _, n in calls.values()) // 4 // cores, np.float32) for _ in range(cores)]
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    with ThreadPoolExecutor(cores) as pool:

        def cold(call: Callable[[], object]) -> float:
            list(pool.map(np.max, others))
            return timed(call)

        for turn in range(repeats + 1):
            for name, (call, stored) in calls.items():
                parts = [block[: stored // 4 // cores] for block in blocks]
                time.sleep(PAUSE_S)
                read = cold(lambda: list(pool.map(np.max, parts)))
                seconds[name] += [(cold(call), read)] if turn else []
    rates = [stored / read for name, (_, stored) in calls.items() for _, read in seconds[name]]
    usual, best = statistics.median(rates) / 1e9, max(rates) / 1e9
    print(f"  {cores} cores read {usual:.1f} GB/s in the median, {best:.1f} at best")
    print(f"  {'rows x positions':44} {'MiB':>6} {'ms':>8} {'fastest':>8} {'limit':>8} {'share':>6}")
    for name, (_, stored) in calls.items():
        taken, reads = zip(*seconds[name])
        share = statistics.median(read / took for took, read in seconds[name])
        times = [1e3 * t for t in (statistics.median(taken), min(taken), statistics.median(reads))]
        print(f"  {name:44} {stored >> 20:6} " + " ".join(f"{t:8.2f}" for t in times) + f" {share:6.2f}")


def timed(call: Callable[[], object]) -> float:
    """Seconds of a call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
