"""TensorRT for RTX on a chip that it does not name: what it answers; and where it runs, the whole ladder,
the score and the benchmark.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from engines import targets
from engines.tensorrt import module as trt
from engines.tensorrt.device import gpus

from .machine import ROOT
from .report import Report

NAME, LIMIT_SECONDS = "rtx", 90
COMPONENT, CAPABILITIES = "stacked_ar", ("SM80", "CURRENT")
PROBE_SECONDS = 30
BENCHES, BENCH_REPEATS = 3, 5


def run(folder: Path, report: Report) -> None:
    """Ask for plans of each capability, load them, run them once. Raises MissingError without TensorRT for
    RTX or a GPU.
    """
    trt.tensorrt_of(targets.TARGETS["a100"])
    here = gpus()[0]
    report.fact("chip", f"{here.name}, {here.sm}")
    bundle = exported(folder / "probe", "--components", COMPONENT)
    ran = [capability for capability in CAPABILITIES if probed(folder, bundle, capability, report)]
    if not ran:
        report.not_run("no plan runs on this chip", part="the ladder")
        return
    whole_ladder(exported(folder / "whole"), ran[0], here.compute_capability, report)


def exported(path: Path, *options: str) -> Path:
    """STAR-Nano's bundle in bf16. Raises CalledProcessError."""
    command = [
        sys.executable,
        "-m",
        "star_export",
        "export",
        "nano",
        "--out",
        str(path),
        "--precision",
        "bf16",
        "--no-progress",
        *options,
    ]
    subprocess.run(command, cwd=ROOT, check=True)
    return path


def probed(folder: Path, bundle: Path, capability: str, report: Report) -> bool:
    """Build and load one plan, each in a process of its own, and record the answers; whether it ran."""
    plan = folder / f"{capability}.plan"
    words = (str(bundle), COMPONENT, capability, str(plan))
    answers = {"build": answer("build", *words)}
    if plan.exists():
        answers["load"] = answer("load", *words)
    for verb, found in answers.items():
        report.fact(f"{capability}: {verb}", found["answer"])
        report.fact(
            f"{capability}: {verb}: said", {key: value for key, value in found.items() if key != "answer"}
        )
    return answers.get("load", {}).get("answer") == "ran"


def answer(*words: str) -> dict:
    """What the probe prints last; where it crashed or hung, that is its answer, with what it had printed by
    then.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", "tests.gpu.rtx_probe", *words],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PROBE_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        return {
            "answer": f"no answer within {PROBE_SECONDS} s",
            "output": (error.stdout or b"").decode(errors="replace")[-2000:],
        }
    lines = done.stdout.splitlines()
    if done.returncode == 0:
        return json.loads(lines[-1])
    return {"answer": f"crashed with status {done.returncode}", "output": lines[-10:]}


def whole_ladder(bundle: Path, capability: str, here: tuple[int, int], report: Report) -> None:
    """Plans of all components for `capability`: the rungs of `validate`, with the score, and `bench`."""
    from engines.bench import bench
    from engines.bundle.reader import Bundle
    from engines.runtime.star import Star
    from engines.tensorrt.build import build_plans
    from star_export.golden.tolerances import compute_type
    from star_export.validator.ladder import run_ladder
    from star_export.validator.subject import Subject

    from .rtx_probe import foreign_target

    target = foreign_target(capability, here=here)
    targets.TARGETS[target.name] = target  # for this process alone
    opened, backend = Bundle.open(bundle), f"tensorrt:{target.name}"
    build_plans(opened, [target.name])
    certificate = run_ladder(
        Subject(opened, backend, compute_type(opened.manifest.precision, twin=False)), lambda *progress: None
    )
    for rung in certificate.rungs:
        report.check(f"ladder: {rung.name}", rung.passed, rung.note)
        if rung.name == "score":
            report.fact("score", [row.check for row in rung.rows])
    benches = []
    with Star(bundle, backend=backend) as star:
        for _ in range(BENCHES):
            benches.append(bench(star, repeats=BENCH_REPEATS))
    for index, timing in enumerate(benches[0].timings):
        report.figure(timing.name, [b.timings[index].ms for b in benches], "ms", precision="bf16")
    report.figure("image", [b.seconds_per_image for b in benches], "s", tokens=benches[0].tokens)
