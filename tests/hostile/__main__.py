"""python -m tests.hostile [--program PATH] [NAME ...]: run all cases, or those whose names hold a NAME."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from .cases import CASES
from .harness import BUNDLE, CHECKPOINT, installed, run_case


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.hostile")
    parser.add_argument("names", nargs="*", help="run only cases whose names hold one of these words")
    beside = Path(sys.executable).with_name("star-export")
    parser.add_argument("--program", default=beside, help="default: the one of this environment")
    given = parser.parse_args()
    chosen = [case for case in CASES if not given.names or any(name in case.name for name in given.names)]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        originals = {BUNDLE: root / "good", CHECKPOINT: root / "mini"}
        for words in (  # in processes of their own: a run's peak of memory counts that of whoever starts it
            ("-m", "reference.mini", root / "mini"),
            ("-m", "star_export", "export", root / "mini", "--out", root / "good", "-q"),
        ):
            subprocess.run([sys.executable, *map(str, words)], check=True)
        held, slowest, largest = 0, 0.0, 0
        for i, case in enumerate(chosen):
            place = root / f"case{i}"
            place.mkdir()
            result = run_case(case, place, installed(str(given.program)), originals=originals)
            shutil.rmtree(place)
            held += not result.faults
            slowest = max(slowest, result.ended.cpu_seconds)
            largest = max(largest, result.ended.peak_bytes)
            for fault in result.faults:
                print(f"{case.name}: {fault}", flush=True)
    print(f"{held} of {len(chosen)}; at most {slowest:.1f} s of processor time, {largest >> 20} MiB")
    return held != len(chosen)


if __name__ == "__main__":
    sys.exit(main())
