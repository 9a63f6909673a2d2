"""How often the rungs whose inputs follow from a seed fail on a clean bundle, and how near they come.

    python -m tests.bench_false_alarms BUNDLE [--seeds 200] [--first 0] [--rungs NAME ...]

The rungs are "decoder steps", with other embeddings, and "other ways", with other draws of the recorded
prompt. Printed is, for each of their rows, in how many seeds it failed and the largest share of its tolerance
over all seeds. The other rungs have recorded inputs: a second run of them is the same run.
"""

from __future__ import annotations

import argparse
import time

from engines.bundle.reader import Bundle
from engines.progress import silent
from star_export.golden.compare import excess
from star_export.golden.tolerances import compute_of
from star_export.validator.other_ways import other_ways
from star_export.validator.rungs import decoder_steps
from star_export.validator.subject import Subject

RUNGS = {"decoder steps": decoder_steps, "other ways": other_ways}
APART = 16  # between the seeds of two runs: a rung makes several streams of numbers from its own


def alarms(
    subject: Subject, seeds: range, rungs: list[str]
) -> dict[tuple[str, str, str, float], tuple[int, float]]:
    """(component, check, tensor, tolerance) -> the number of seeds that failed, and the largest share."""
    found: dict[tuple[str, str, str, float], tuple[int, float]] = {}
    for seed in seeds:
        for rung in rungs:
            for row in RUNGS[rung](subject, silent, seed=seed * APART)[0]:
                kind = row.worst.tensor.partition(".")[0]
                key = row.component, row.check, kind, row.worst.tolerance
                failed, share = found.get(key, (0, 0.0))
                found[key] = failed + (not row.worst.passed), max(share, excess(row.worst))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle")
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--backend", default="onnxruntime-exact")
    parser.add_argument("--rungs", nargs="+", choices=RUNGS, default=list(RUNGS))
    given = parser.parse_args()
    bundle, started = Bundle.open(given.bundle), time.monotonic()
    subject = Subject(bundle, given.backend, compute_of(given.backend, bundle.manifest.precision))
    seeds = range(given.first, given.first + given.seeds)
    found = alarms(subject, seeds, given.rungs)
    for (component, check, tensor, tolerance), (failed, share) in found.items():
        print(
            f"{component}: {check}: {tensor}, tolerance {tolerance:g}: {failed} failed, largest {share:.3f}"
        )
    total, manifest = sum(failed for failed, _ in found.values()), bundle.manifest
    print(
        f"{manifest.model.name}, {manifest.precision}: {total} false alarms in {len(seeds)} seeds of "
        f"{len(found)} rows, {time.monotonic() - started:.0f} s"
    )


if __name__ == "__main__":
    main()
