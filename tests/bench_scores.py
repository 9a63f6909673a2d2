"""What bundles of STAR-Nano get right in several sets of the benchmark, beside the first of them.

    python -m tests.bench_scores fp32 int8 [--tasks generate reason] [--sets 3] [--backend onnxruntime-exact]

The full set has 300 to 1,000 items of a task, and 0.5 points of it are 1.5 to 5 items: less than chance. Each
set here has as many, with other items and other random numbers, and all sets count together. In parentheses
stand 95 % intervals, Newcombe's of the paired difference. The table is Markdown.
"""

from __future__ import annotations

import argparse

from engines.runtime.star import Star
from reference.nano.benchmark.score import FULL, GOALS, SEED, measure, paired_difference
from star_export.validator.score import RuntimePainter


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench_scores", description=__doc__.split("\n")[0])
    parser.add_argument("first", metavar="BUNDLE")
    parser.add_argument("others", nargs="+", metavar="OTHER")
    parser.add_argument("--tasks", nargs="+", default=list(GOALS), choices=list(GOALS))
    parser.add_argument("--sets", type=int, default=3)
    parser.add_argument("--backend", default="onnxruntime")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    first = right_of(options.first, options)
    print("| | " + " | ".join(f"{task}, of {len(found)}" for task, found in first.items()) + " |")
    print("|---" * (1 + len(first)) + "|")
    print(f"| {options.first} | " + " | ".join(str(sum(found)) for found in first.values()) + " |")
    for bundle in options.others:
        cells = []
        for task, found in right_of(bundle, options).items():
            points = [100 * share for share in paired_difference(found, first[task])]
            cells.append("{}, {:+.2f} ({:+.2f} to {:+.2f})".format(sum(found), *points))
        print(f"| {bundle} | " + " | ".join(cells) + " |", flush=True)


def right_of(bundle: str, options: argparse.Namespace) -> dict[str, list[bool]]:
    """Task -> whether each of its items was right, in all sets; none is the set that `score` runs."""
    counts, right = {task: FULL[task] for task in options.tasks}, {}
    with Star(bundle, backend=options.backend, threads=options.threads) as star:
        for number in range(1, options.sets + 1):
            for result in measure(RuntimePainter(star), counts, seed=SEED + 1000 * number).results:
                right.setdefault(result.task, []).append(result.right)
    return right


if __name__ == "__main__":
    main()
