"""STAR-Nano trains on the GPU for a while: its loss falls, and the checkpoint that it leaves goes on on the
CPU.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
import time
from pathlib import Path

from .processes import lines_of
from .report import Report

NAME, LIMIT_SECONDS = "training", 90
STAGE, BATCH = "base", 32  # the decoder, on text and images
GPU_SECONDS, CPU_SECONDS, START_SECONDS = (
    25.0,
    8.0,
    25.0,
)  # the first two count from when the modules are there
FALLEN = 0.5  # of the loss at first; what remains at the end of the run on the GPU must be less
SHARE = 0.1  # of the log, at either end, that is compared
LINE = re.compile(rf"{STAGE} (\d+)/\d+ .* [\d.]+/s$")


def run(folder: Path, report: Report) -> None:
    """Train, compare the two ends of the log, go on on the CPU."""
    import torch

    if not torch.cuda.is_available():
        report.not_run("torch sees no CUDA device")
        return
    observe(folder, report, device="cuda", seconds=GPU_SECONDS, cpu_seconds=CPU_SECONDS, workers=8, scale=0.5)


def observe(
    folder: Path,
    report: Report,
    *,
    device: str,
    seconds: float,
    cpu_seconds: float,
    workers: int,
    scale: float,
) -> None:
    """Two runs of the training's own command: `seconds` on `device`, then `cpu_seconds` on the CPU from
    where it stopped.
    """
    speeds = trained(folder, report, device, seconds, workers, scale)
    if speeds is None:
        return
    if speeds:
        report.figure(f"samples per second on {device}", speeds, "/s", stage=STAGE, batch=BATCH)
    log = losses_of(folder)
    if len(log) < 4:
        report.check("the loss falls", False, f"the log has {len(log)} lines, too few to say")
        return
    ends = max(2, round(SHARE * len(log)))
    first, last = [loss for _, loss in log[:ends]], [loss for _, loss in log[-ends:]]
    report.figure("loss, first tenth", first, "", steps=f"to {log[ends - 1][0]}")
    report.figure("loss, last tenth", last, "", steps=f"to {log[-1][0]}")
    fallen = statistics.median(last) / statistics.median(first)
    report.check("the loss falls", fallen <= FALLEN, f"{fallen:.3f} of what it was; at most {FALLEN}")
    stopped = step_of(folder)
    if trained(folder, report, "cpu", cpu_seconds, 0, scale) is None:
        return
    report.check(
        "the checkpoint goes on on the CPU",
        step_of(folder) > stopped,
        f"stopped at step {stopped}, on the CPU to {step_of(folder)}",
    )
    resumed = [loss for step, loss in losses_of(folder) if step > stopped]
    if resumed:
        report.figure("loss on the CPU, resumed", resumed, "", steps=f"{stopped} to {step_of(folder)}")
        middle = (statistics.median(first) * statistics.median(last)) ** 0.5
        report.check(
            "it goes on where it was",
            statistics.median(resumed) <= middle,
            f"{statistics.median(resumed):.3f}; at most {middle:.3f}",
        )


def trained(
    folder: Path, report: Report, device: str, seconds: float, workers: int, scale: float
) -> list[float] | None:
    """Samples per second between the lines that one run tells; None, and a check that did not hold, where it
    failed.
    """
    command = [
        sys.executable,
        "-m",
        "reference.nano.training.train",
        "--out",
        str(folder),
        "--stages",
        STAGE,
        "--device",
        device,
        "--workers",
        str(workers),
        "--scale",
        str(scale),
        "--minutes",
        str(seconds / 60),
    ]
    speeds, before, status = [], None, None
    for line in lines_of(command, seconds=START_SECONDS + seconds):
        if isinstance(line, int):
            status = line
        elif found := LINE.match(line):
            now = int(found[1]), time.monotonic()
            speeds += (
                [BATCH * (now[0] - before[0]) / (now[1] - before[1])] if before and now[1] > before[1] else []
            )
            before = now
    if status == 3:  # saved and stopped in time
        return speeds
    report.check(
        f"training on {device}",
        False,
        "killed at its limit" if status is None else f"exit status {status}, expected 3",
    )
    return None


def losses_of(folder: Path) -> list[tuple[int, float]]:
    """(step, loss) of each line of the log."""
    lines = (folder / "training" / f"{STAGE}.jsonl").read_text().splitlines()
    return [(line["step"], line["loss"]) for line in map(json.loads, lines)]


def step_of(folder: Path) -> int:
    """At which step the checkpoint was saved."""
    import torch

    return torch.load(folder / "training" / f"{STAGE}.ckpt", map_location="cpu", weights_only=True)["step"]
