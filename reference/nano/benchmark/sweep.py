"""Measure a trained checkpoint and choose how it draws:

    python -m reference.nano.benchmark.sweep CHECKPOINT --choose     guidance, top-k and top-p: sampling.json, sweep.json and sweep.png
    python -m reference.nano.benchmark.sweep CHECKPOINT --record     the reference's score, small and full: score.json; images
                                                           of the small set, and failures.png of the full one

The sweep draws from other items than the score is measured on, so the choice cannot flatter it.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

from ..recipe import REWARD_TOP_K, REWARD_TOP_P
from . import score as benchmark
from .gallery import SHOWN, spread, write_gallery, write_results
from .painter import SAMPLED, Painter, Sampling
from .plot import chart, write_charts

GUIDANCES, TOP_PS = (1.0, 1.1, 1.25, 1.5, 2.0, 3.0), (0.7, 0.8, 0.9, 0.95, 0.98, 1.0)
# A prompt has many images; the most probable ids alone are the same one for every seed.
TOP_KS = {"generate": (3, 5, 10, 20, 100, 1000), "edit": (1, 3, 5, 10, 20, 100, 1000)}
# Where a sweep starts: as stage `reward` draws, with a little guidance. A strong one makes a small top-k look best, and where nothing but background
# is probable the release's top-p of 0.8 leaves single things out, which may begin at any of forty tokens.
START = Sampling(guidance=1.5, top_k=REWARD_TOP_K, top_p=REWARD_TOP_P)
SWEEP_SEED = 7_000_000


def share(painter: Painter, task: str, count: int) -> float:
    """Share of a task's images that are right."""
    right, asked = benchmark.measure(painter, {task: count}, seed=SWEEP_SEED).overall(task)
    return right / asked


def choose(painter: Painter, folder: Path, *, count: int) -> dict[str, Sampling]:
    """For each task top-k, then guidance, then top-p, the others at the best so far, from START. Writes all that was measured."""
    best, measured, charts = dict.fromkeys(SAMPLED, START), [], []
    for name, tried in (
        ("top_k", TOP_KS),
        ("guidance", dict.fromkeys(SAMPLED, GUIDANCES)),
        ("top_p", dict.fromkeys(SAMPLED, TOP_PS)),
    ):
        found = {}
        for task in SAMPLED:
            if name == "top_p" and best[task].top_k == 1:
                continue  # nothing to choose among
            found[task] = []
            for value in tried[task]:
                painter.sampling = best | {task: replace(best[task], **{name: value})}
                found[task].append((value, share(painter, task, count)))
                measured.append(
                    {"task": task} | asdict(painter.sampling[task]) | {"right": found[task][-1][1]}
                )
                print(f"{task} {name} {value}: {found[task][-1][1]:.3f}", file=sys.stderr, flush=True)
            best[task] = replace(best[task], **{name: max(found[task], key=lambda pair: pair[1])[0]})
        charts.append(chart(f"right images by {name}", found, x_label=name, logarithmic=name == "top_k"))
    (folder / "sampling.json").write_text(
        json.dumps({task: asdict(s) for task, s in best.items()}, indent=1) + "\n"
    )
    (folder / "sweep.json").write_text(json.dumps(measured, indent=1) + "\n")
    write_charts(folder / "sweep.png", charts)
    return best


def record(painter: Painter, folder: Path) -> dict[str, benchmark.Score]:
    """Measure the small and the full set; write both scores, images of the small set, and honest failures of the full one."""
    scores = {
        "small": benchmark.measure(painter, benchmark.SMALL),
        "full": benchmark.measure(painter, benchmark.FULL),
    }
    stored = {name: benchmark.json_from_score(score) for name, score in scores.items()}
    (folder / "score.json").write_text(json.dumps(stored, indent=1) + "\n")
    write_gallery(folder, scores["small"].results)
    (folder / "failures.png").unlink(missing_ok=True)
    if wrong := [r for r in scores["full"].results if not r.right and r.task != "reason off"]:
        write_results(folder / "failures.png", spread(wrong, SHOWN))
    return scores


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m reference.nano.benchmark.sweep", description=__doc__.splitlines()[0]
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--choose", action="store_true", help="sweep guidance, top-p and top-k")
    parser.add_argument("--record", action="store_true", help="measure and store the reference's score")
    parser.add_argument(
        "--count", type=int, default=40, help="items per category at each point of the sweep (default: 40)"
    )
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(argv)
    painter = Painter.from_checkpoint(options.checkpoint, device=options.device)
    if options.choose:
        painter.sampling = choose(painter, options.checkpoint, count=options.count)
        print(painter.sampling)
    if options.record:
        print(benchmark.table(record(painter, options.checkpoint)["full"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
