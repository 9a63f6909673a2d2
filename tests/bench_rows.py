"""What an image of the diffusion decoder loses when the rows of its guidance are computed less often.

    python -m tests.bench_rows BUNDLE [--cases t2i40 edit50]

The bundle is the miniature's, with its diffusion decoder; the cases are official ones, with their noise and
image tokens (`tests/golden/diffusion/cases.json`). The rows with text, t and an edit's x, are computed at
every step. Those without, u and i, are computed less often: their velocities, or what guidance changes in t,
are kept from an earlier step; or guidance ends early, and t is all that is left. Prints the rows that the
transformer computes and the PSNR against the image of all rows. The miniature's weights are noise, so its
images say nothing of the released model's. A benchmark, not a test: it asserts nothing.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np

from engines import Painting, Star
from engines.inputs.latents import (
    Schedule,
    images_from_painted,
    map_from_patches,
    patches_from_map,
    schedule,
    time_features,
)
from engines.runtime.painter import Group, Painter, guided
from tests.helpers.official_diffusion import CASES, arrays

ROWS, CHANGE = "velocities", "change"
SETTINGS = {"steps": "steps", "text_guidance": "g_txt", "image_guidance": "g_img", "vq_guidance": "g_vq"}


@dataclass(frozen=True)
class Variant:
    """Which steps compute u and i: one of `every`; the last `skipped` (a share) have t alone.

    In between, what is `kept` of the last step that computed them is used: their velocities, or the change
    that guidance made to that of t.
    """

    name: str
    every: int = 1
    kept: str = ROWS
    skipped: float = 0.0


ALL = Variant("all rows")
VARIANTS = (
    *(
        Variant(f"u and i at one of {n} steps, {kept} kept", n, kept)
        for n in (2, 3, 4)
        for kept in (ROWS, CHANGE)
    ),
    *(Variant(f"t alone in the last {share:.0%} of the steps", skipped=share) for share in (0.1, 0.25, 0.5)),
)


def painted(
    painter: Painter, groups: list[Group], steps: Schedule, noise: np.ndarray, variant: Variant
) -> tuple[np.ndarray, int]:
    """The latents [N, T, 4, c], and how many rows of an image the transformer computed."""
    brush, latents, rows = painter.brush, patches_from_map(noise), 0
    count, kept = len(steps.times), dict[str, np.ndarray]()
    change: np.ndarray | float = 0.0
    for k in range(count):
        last, features = k == count - 1, time_features(float(steps.times[k]))
        found = groups[0].velocities(latents, features)
        t_alone = k >= round(count * (1 - variant.skipped))
        rows += 1 if t_alone else len(groups[0].names)
        if t_alone or (last and "x" not in found):
            v = found["t"]
        elif k % variant.every == 0:
            for group in groups[1:]:
                kept = group.velocities(latents, features)
                rows += len(group.names)
            v = guided(found | kept, brush, last=last)
            change = v - found["t"]
        else:
            v = guided(found | kept, brush, last=last) if variant.kept == ROWS else found["t"] + change
        latents = latents + (steps.sigmas[k] - steps.sigmas[k + 1]) * v
    return latents, rows


def psnr(image: np.ndarray, wanted: np.ndarray) -> float:
    """Of two images of bytes, in dB."""
    mean = float(np.mean((image.astype(np.float64) - wanted) ** 2))
    return float("inf") if not mean else float(10 * np.log10(255**2 / mean))


def table(star: Star, case: str) -> None:
    """Print the table of one case."""
    c, given = CASES[case], arrays()
    settings = {name: c[key] for name, key in SETTINGS.items() if key in c}
    own = {name: f"{case}.{name}" for name in ("noise", "source_noise")}
    settings |= {name: given[key] for name, key in own.items() if key in given}
    painting, image = Painting(c["resolution"], **settings), given.get(f"{case}.image")
    painter = Painter(star.loaded, star.captions, painting, c["prompt"], seed=0, image=image)
    groups = painter.groups(given[f"{case}.codes"].astype(np.int64))
    steps = schedule(c["steps"], shift=painter.spec.time_shift, sigmas_bf16=painter.rope_bf16)
    print(f"\n{case}: {c['steps']} steps\n\n| | rows | of all | PSNR, dB |\n|---|---|---|---|")
    whole, all_rows = np.zeros(0), 0
    for variant in (ALL, *VARIANTS):
        latents, rows = painted(painter, groups, steps, given[f"{case}.noise"], variant)
        drawn = images_from_painted(painter.decoded(map_from_patches(latents)))
        if variant is ALL:
            whole, all_rows = drawn, rows
        print(f"| {variant.name} | {rows} | {rows / all_rows:.2f} | {psnr(drawn, whole):.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench_rows", description=__doc__.split("\n")[0])
    parser.add_argument("bundle")
    parser.add_argument("--cases", nargs="+", default=["t2i40", "edit50"], choices=sorted(CASES))
    given = parser.parse_args()
    with Star(given.bundle) as star:
        for case in given.cases:
            table(star, case)


if __name__ == "__main__":
    main()
