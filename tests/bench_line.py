"""How long the whole line takes here: export of the miniature checkpoint, then the plans of each target.

.venv/bin/python -m tests.bench_line

This is a benchmark, not a test: it asserts nothing, and its times hold for this machine and this run. The
export includes the golden tensors and the publishing. Each stage runs in a process of its own, so a cold
start is part of the figure.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

TARGETS = ("rtx-3090", "rtx-4090", "rtx-5090")
LIMITS_S = {"export": 90, "build": 30}


def timed(*words: str) -> float:
    """Seconds of one run of the command line."""
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", *words], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    return time.perf_counter() - start


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        timed("reference.mini", str(root / "checkpoint"))
        print(f"{'stage':40} {'seconds':>8} {'limit':>6}")
        for precision in ("fp32", "bf16", "int4"):
            bundle = str(root / precision)
            seconds = timed(
                "star_export", "export", str(root / "checkpoint"), "--out", bundle, "--precision", precision
            )
            print(f"{'export ' + precision:40} {seconds:8.1f} {LIMITS_S['export']:6}")
            for target in TARGETS if precision != "fp32" else ():
                seconds = timed("star_export", "build", bundle, "--target", target)
                print(f"{f'build {precision} for {target}':40} {seconds:8.1f} {LIMITS_S['build']:6}")


if __name__ == "__main__":
    main()
