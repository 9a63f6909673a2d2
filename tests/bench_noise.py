"""What the noise of the draw costs on a CPU, beside the decode step that it belongs to.

    python -m tests.bench_noise

At STAR-3B's width: the noise of a token, `image_head` with noise of a new row each time and without any, and
the time in which a decode step in int4 reads its weights at this machine's bandwidth. In turns; medians.
This is a benchmark, not a test: it asserts nothing.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from engines.bench import host_bandwidth
from engines.bundle.reader import Bundle
from engines.runtime.gumbel import gumbel_noise
from engines.sessions import open_session
from tests.bench_decode import write_bundle

STEP_BYTES = 2_369_794_048  # STAR-3B in int4, as `tests.bench_real_size` counts them
REPEATS = 25


def main() -> None:
    argparse.ArgumentParser(
        prog="python -m tests.bench_noise", description=__doc__.split("\n")[0]
    ).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_bundle(Path(folder) / "b", "int4", 4, names=("image_head",))
        session = open_session(Bundle.open(Path(folder) / "b"), "image_head")
        hidden, size = session.spec.inputs[0].shape[-1], session.spec.outputs[2].shape[-1]
        shapes = {"hidden_states": (2, 1, hidden), "guidance": (1,), "top_k": (1,), "top_p": (1,)}
        shapes |= {"noise": (1, 1, size), "image_ids": (1, 1), "inputs_embeds": (2, 1, hidden)}
        shapes |= {"logits": (1, 1, size)}
        specs = {t.name: t for t in session.spec.inputs + session.spec.outputs}
        buffers = {name: session.buffer(shape, specs[name].dtype) for name, shape in shapes.items()}
        rng = np.random.default_rng(0)
        buffers["hidden_states"].write(rng.standard_normal(shapes["hidden_states"], dtype=np.float32))
        for name, value in (("guidance", 1.1), ("top_p", 0.8)):
            buffers[name].write(np.array([value], np.float32))
        buffers["top_k"].write(np.array([1000]))
        step, noise = session.bind(buffers), buffers["noise"]
        calls = {
            "noise of a token": lambda at: gumbel_noise(7, image=0, steps=[at], size=size),
            "image_head": lambda at: step(),
            "image_head and its noise": lambda at: (
                noise.write(gumbel_noise(7, image=0, steps=[at], size=size)[None]),
                step(),
            ),
        }
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for at in range(REPEATS + 2):
            for name, call in calls.items():
                started = time.perf_counter()
                call(at)
                seconds[name] += [time.perf_counter() - started][: at > 1]
    limit = STEP_BYTES / host_bandwidth()
    print(f"a decode step of STAR-3B in int4 reads for at least {limit * 1e3:.0f} ms")
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name}: {median * 1e3:.2f} ms, {median / limit:.2%} of that")


if __name__ == "__main__":
    main()
