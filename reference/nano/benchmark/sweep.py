"""Measure a trained checkpoint and choose how it samples.

    python -m reference.nano.benchmark.sweep CHECKPOINT --choose --record

`--choose` sweeps guidance, top-k and top-p and writes sampling.json, sweep.json and sweep.png. `--record`
writes the reference's score, small and full, and the ids of some images to score.json, images of the small
set, and failures.png from the full one. The sweep draws other items than those of the score, so that the
choice cannot flatter it.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..recipe import REWARD_TOP_K, REWARD_TOP_P
from . import identity
from . import score as benchmark
from .gallery import SHOWN, spread, write_gallery, write_results
from .painter import SAMPLED, Painter, Sampling
from .plot import Series, chart, write_charts

GUIDANCES, TOP_PS = (1.0, 1.1, 1.25, 1.5, 2.0, 3.0), (0.7, 0.8, 0.9, 0.95, 0.98, 1.0)
# A prompt has many images, so drawing does not try top-k 1, which gives the same image for every seed.
TOP_KS = {"generate": (3, 5, 10, 20, 100, 1000), "edit": (1, 3, 5, 10, 20, 100, 1000)}
# A sweep starts from the sampling of stage `reward` with a little guidance. Strong guidance makes a small
# top-k look best. Where mostly background is probable, the release's top-p of 0.8 omits single things, which
# may begin at any of forty tokens.
START = Sampling(guidance=1.5, top_k=REWARD_TOP_K, top_p=REWARD_TOP_P)
SWEEP_SEED = 7_000_000


def share(painter: Painter, task: str, count: int) -> float:
    """The share of a task's images that are right."""
    right, asked = benchmark.measure(painter, {task: count}, seed=SWEEP_SEED).overall(task)
    return right / asked


def choose(painter: Painter, folder: Path, *, count: int) -> dict[str, Sampling]:
    """For each task choose top-k, then guidance, then top-p, starting from START.

    The other values are the best so far. Writes all that was measured into `folder`.
    """
    best, measured, charts = dict.fromkeys(SAMPLED, START), [], []
    guidances, top_ps = dict.fromkeys(SAMPLED, GUIDANCES), dict.fromkeys(SAMPLED, TOP_PS)
    for name, tried in (("top_k", TOP_KS), ("guidance", guidances), ("top_p", top_ps)):
        found: Series = {}
        for task in SAMPLED:
            if name == "top_p" and best[task].top_k == 1:
                continue  # top-p has no choice to restrict
            found[task] = []
            for value in tried[task]:
                painter.sampling = best | {task: replace(best[task], **{name: value})}
                right = share(painter, task, count)
                found[task].append((value, right))
                measured.append({"task": task} | asdict(painter.sampling[task]) | {"right": right})
                print(f"{task} {name} {value}: {right:.3f}", file=sys.stderr, flush=True)
            best[task] = replace(best[task], **{name: max(found[task], key=lambda pair: pair[1])[0]})
        charts.append(chart(f"right images by {name}", found, x_label=name, logarithmic=name == "top_k"))
    chosen = {task: asdict(sampling) for task, sampling in best.items()}
    (folder / "sampling.json").write_text(json.dumps(chosen, indent=1) + "\n")
    (folder / "sweep.json").write_text(json.dumps(measured, indent=1) + "\n")
    write_charts(folder / "sweep.png", charts)
    return best


def record(painter: Painter, folder: Path) -> dict[str, benchmark.Score]:
    """Measure the small and the full set; write both scores and the ids of some images (`identity.py`),
    images of the small set and failures of the full one."""
    scores = {
        "small": benchmark.measure(painter, benchmark.SMALL),
        "full": benchmark.measure(painter, benchmark.FULL),
    }
    stored: dict[str, Any] = {name: benchmark.json_from_score(score) for name, score in scores.items()}
    stored["image_ids"] = identity.drawn_ids(painter).tolist()
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
