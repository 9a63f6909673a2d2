"""A step of the diffusion decoder on a CPU, beside diffusers' own transformer on the same weights.

    .venv-peers/bin/python -m tests.bench_painting CHECKPOINT BUNDLE [--threads 1] [--resolutions 64 ...]

`make peers` makes the environment, and the bundle is one of `dit` in fp32. A step has two calls, as the
runtime's: one row under the prompt's caption, and two under the empty one. ONNX Runtime runs the bundle's
graph, and PyTorch diffusers' class, which `tests/peers/lumina.py` makes compute the same; the largest
difference of both is printed. In turns, with as many threads; medians. A benchmark: it asserts nothing.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from importlib.metadata import version

import numpy as np
import torch

from engines.bench import in_turns, ratio
from engines.bundle.reader import Bundle
from engines.inputs.latents import FACTOR, PATCH, rotary_cos_sin, time_features
from engines.sessions import Session, open_session
from reference.weights import named_tensors, resolve_checkpoint
from tests.peers.lumina import call_of, transformer_from_tensors

CAPTIONS = {32: 1, 1: 2}  # ids of a caption -> rows under it: those with text, and those without
TIME = 0.3
OURS, PEER = "ONNX Runtime", "diffusers"


def feeds_of(session: Session, axes: tuple[int, int, int], *, side: int, ids: int, rows: int) -> dict:
    """Inputs of `dit` for `rows` images of `side` patches a side under a caption of `ids`."""
    rng, widths = np.random.default_rng(ids), {t.name: t.shape[-1] for t in session.spec.inputs}
    cos, sin = rotary_cos_sin(axes, caption_tokens=ids, side=side)
    shapes = {name: (rows, side * side, PATCH**2, widths[name]) for name in ("latents", "source", "vq_map")}
    shapes["caption"] = (1, ids, widths["caption"])
    feeds = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    tables = {
        "caption_cos": cos[:ids],
        "caption_sin": sin[:ids],
        "image_cos": cos[ids:],
        "image_sin": sin[ids:],
    }
    return feeds | {"time": time_features(TIME)} | tables


def bound(session: Session, feeds: dict) -> Callable[[], np.ndarray]:
    """A call of our graph on `feeds`, bound as the runtime binds it."""
    buffers = {name: session.buffer(array.shape, "float32") for name, array in feeds.items()}
    for name, array in feeds.items():
        buffers[name].write(np.ascontiguousarray(array))
    buffers["velocity"] = session.buffer(feeds["latents"].shape, "float32")
    step = session.bind(buffers)

    def call() -> np.ndarray:
        step()
        return buffers["velocity"].read()

    return call


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench_painting", description=__doc__.split("\n")[0]
    )
    parser.add_argument("checkpoint")
    parser.add_argument("bundle")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--resolutions", type=int, nargs="+", default=[64, 128, 256, 512])
    given = parser.parse_args(argv)
    torch.set_num_threads(given.threads)
    files, bundle = resolve_checkpoint(given.checkpoint), Bundle.open(given.bundle)
    assert files.lumina_folder and bundle.manifest.model.diffusion
    peer = transformer_from_tensors(files.lumina_folder, named_tensors(files, files.config()))
    session = open_session(bundle, "dit", threads=given.threads)
    names = ("onnxruntime", "diffusers", "torch")
    print(", ".join(f"{name} {version(name)}" for name in names), f"; threads: {given.threads}")
    print(f"| pixels | image tokens | {OURS}, ms | {PEER}, ms | ratio | largest difference / deviation |")
    print("|---|---|---|---|---|---|")
    for resolution in given.resolutions:
        side = resolution // FACTOR // PATCH
        made = [
            feeds_of(session, bundle.manifest.model.diffusion.axes, side=side, ids=ids, rows=rows)
            for ids, rows in CAPTIONS.items()
        ]
        ours = [bound(session, feeds) for feeds in made]
        theirs = [call_of(peer, feeds, TIME) for feeds in made]
        apart = max(np.abs(a() - (b := c())).max() / b.std() for a, c in zip(ours, theirs))
        calls = {OURS: lambda: [call() for call in ours], PEER: lambda: [call() for call in theirs]}
        seconds = in_turns(calls, repeats=given.repeats, synchronize=lambda: None)
        found = {name: 1e3 * statistics.median(times) for name, times in seconds.items()}
        print(
            f"| {resolution} | {2 * side * side} | {found[OURS]:.2f} | {found[PEER]:.2f} "
            f"| {ratio(seconds, OURS, PEER):.2f} | {apart:.1e} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
