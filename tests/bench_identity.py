"""How many of 300 images bundles of STAR-Nano draw id for id like the first one of them.

    python -m tests.bench_identity fp32 bf16 int8 int4 [--backend onnxruntime-exact] [--threads N]

These are the images that `star-export score --full --compare` counts too, which scores all tasks besides and
takes an hour for four bundles; this takes minutes. In brackets stand 95 % intervals. The table is Markdown.
"""

from __future__ import annotations

import argparse
import statistics

import numpy as np

from engines.runtime.star import Star
from reference.nano.benchmark import identity
from reference.nano.benchmark.score import interval
from star_export.validator.score import RuntimePainter


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench_identity")
    parser.add_argument("first", metavar="BUNDLE")
    parser.add_argument("others", nargs="+", metavar="OTHER")
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    wanted = drawn(options.first, options)
    print("| | identical images | first other token, median |\n|---|---|---|")
    for bundle in options.others:
        first = identity.first_differences(drawn(bundle, options), wanted)
        others = [token for token in first if token is not None]
        low, high = interval(first.count(None), len(first))
        share = f"{first.count(None) / len(first):.0%} ({low:.0%} to {high:.0%})"
        median = f"{statistics.median(others):g}" if others else "none"
        print(f"| {bundle} | {first.count(None)} of {len(first)}, {share} | {median} |", flush=True)


def drawn(bundle: str, options: argparse.Namespace) -> np.ndarray:
    """The ids int64 [300, T] that a bundle draws."""
    with Star(bundle, backend=options.backend, threads=options.threads) as star:
        return identity.drawn_ids(RuntimePainter(star), full=True)


if __name__ == "__main__":
    main()
