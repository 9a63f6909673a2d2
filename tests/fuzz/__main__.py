"""Run fuzzers; exit code 1 if one found something, whose input is then kept in the folder fuzz-crashes."""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np

from engines.errors import StarError
from reference.errors import CheckpointError
from reference.mini import write_checkpoint
from star_export.exporter.export import export
from tests.bench_interpreter import peak_bytes

from .targets import Target, targets

SLOW_S, MEMORY_BYTES = 2.0, 256 << 20
CRASHES = Path("fuzz-crashes")


def fuzz(name: str, target: Target, *, runs: int | None, seconds: float | None, seed: int = 0) -> int:
    """Run one fuzzer and print what it found; returns the number of findings."""
    rng, found, done, slowest = np.random.default_rng(seed), 0, 0, 0.0
    started = time.monotonic()
    before = peak_bytes(reset=True)
    while done != runs and (seconds is None or time.monotonic() - started < seconds):
        data = target.mutate(target.seeds[done % len(target.seeds)], rng)
        done += 1
        begun, fault = time.process_time(), ""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                target.read(data)
        except (StarError, CheckpointError) as error:
            if not (error.what and error.where and error.fix):
                fault = "an error without its three parts"
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
        took = time.process_time() - begun
        slowest = max(slowest, took)
        if took > SLOW_S:
            fault = fault or f"{took:.1f} s"
        if fault:
            found += 1
            CRASHES.mkdir(exist_ok=True)
            file = CRASHES / f"{name.replace(' ', '-')}-{hashlib.sha256(data).hexdigest()[:12]}"
            file.write_bytes(data)
            print(f"{name}: {fault[:200]} ({file})", flush=True)
    grown = peak_bytes() - before
    if grown > MEMORY_BYTES:
        found += 1
        print(f"{name}: {grown >> 20} MiB")
    rate = done / (time.monotonic() - started)
    print(
        f"{name}: {done} runs, {found} findings, {rate:.0f} a second, the slowest {slowest:.2f} s, "
        f"{grown >> 20} MiB",
        flush=True,
    )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("names", nargs="*", help="only these (default: all)")
    parser.add_argument("--runs", type=int)
    parser.add_argument("--seconds", type=float, help="default: 20")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    seconds = given.seconds if given.runs or given.seconds else 20.0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_checkpoint(root / "mini")
        bundle = export(str(root / "mini"), out=root / "bundle", components=["text_head"])
        (root / "scratch").mkdir()
        every = targets(bundle, root / "mini", root / "scratch")
        chosen = given.names or [*every]
        found = [
            fuzz(name, every[name], runs=given.runs, seconds=seconds, seed=given.seed) for name in chosen
        ]
    return min(sum(found), 1)


if __name__ == "__main__":
    sys.exit(main())
