"""SIGKILL an export at random moments, repeat it until it completes, and compare the bytes.

    python -m tests.kill_export FOLDER [--source nano] [--precision int4] [--kills 20] [--seed 0]

`docs/bad_inputs.md` 16: the bundle equals that of an export that nobody disturbed, file by file, and what a
killed run leaves is the stage that the next run takes over. Every process has a temporary folder of its own
inside FOLDER, which must be empty in the end. Exit code 1 says that one of this does not hold.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from star_export.exporter.publish import JOURNAL, stage_path

ROOT = Path(__file__).parents[1]
TORCH_CACHE = "torchinductor_"  # a folder that torch makes once and uses again


@dataclass(frozen=True)
class Undisturbed:
    """An export that nobody disturbed: its bundle, and the seconds to its first step and in all."""

    bundle: Path
    start_s: float
    seconds: float


def undisturbed_export(folder: Path, export: Sequence[str]) -> Undisturbed:
    """Export to `folder/undisturbed` with the words `export`. Raises RuntimeError if that fails."""
    bundle, started, start_s = folder / "undisturbed", time.monotonic(), 0.0
    process = run([*export, "--out", str(bundle)], temporary_folder(folder))
    while process.poll() is None:
        if not start_s and (stage_path(bundle) / JOURNAL).exists():
            start_s = time.monotonic() - started
        time.sleep(0.05)
    if process.returncode:
        raise RuntimeError(f"the undisturbed export ended with exit code {process.returncode}")
    return Undisturbed(bundle, start_s, time.monotonic() - started)


def killed_export(
    folder: Path, export: Sequence[str], undisturbed: Undisturbed, *, kills: int, seed: int = 0
) -> list[str]:
    """Export to `folder/killed` with the words `export` and `kills` kills; returns what does not hold."""
    temporary, whole, out = temporary_folder(folder), undisturbed.bundle, folder / "killed"
    faults: list[str] = []
    # Every run starts anew and goes on with the steps: so the kills are spread over one export.
    longest_s = undisturbed.start_s + 2 * (undisturbed.seconds - undisturbed.start_s) / kills
    moments = random.Random(seed)
    for kill in range(1, kills + 1):
        process, moment = run([*export, "--out", str(out)], temporary), moments.uniform(0, longest_s)
        try:
            code = process.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
        left = sorted(path.name for path in folder.iterdir() if path not in (temporary, whole))
        print(f"kill {kill} of {kills}: after {moment:.1f} s, left {left}", file=sys.stderr, flush=True)
        if out.exists():  # it was complete before its moment came
            faults += compared(whole, out)
            shutil.rmtree(out)
            left.remove(out.name)
        elif code != -signal.SIGKILL:
            faults.append(f"kill {kill}: the export after it ended with exit code {code}")
        if set(left) - {".killed.stage"}:
            faults.append(f"kill {kill}: expected at most .killed.stage, got {', '.join(left)}")
    if code := run([*export, "--out", str(out)], temporary).wait():
        return [*faults, f"the export that nobody killed ended with exit code {code}"]
    faults += compared(whole, out)
    left = sorted(path.name for path in folder.iterdir() if path not in (temporary, whole, out))
    left += [path.name for path in temporary.iterdir() if not path.name.startswith(TORCH_CACHE)]
    return [*faults, *(f"left behind: {name}" for name in left)]


def temporary_folder(folder: Path) -> Path:
    """The folder for the temporary files of every export here."""
    path = folder / "temporary"
    path.mkdir(parents=True, exist_ok=True)
    return path


def run(export: Sequence[str], temporary: Path) -> subprocess.Popen:
    """Start an export in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "star_export", "export", *export, "--no-progress"],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(temporary)},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )


def compared(whole: Path, again: Path) -> list[str]:
    """The files in which two bundles differ."""
    first, second = hashes(whole), hashes(again)
    names = sorted(first.keys() | second.keys())
    return [f"{name} differs" for name in names if first.get(name) != second.get(name)]


def hashes(bundle: Path) -> dict[str, str]:
    """Name of each file of a folder -> its SHA-256."""
    found = {}
    for path in bundle.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                found[path.relative_to(bundle).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kill_export", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--source", default="nano")
    parser.add_argument("--precision", default="int4")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--undisturbed", type=Path, metavar="BUNDLE", help="the same export, at hand")
    parser.add_argument(
        "--took", type=float, nargs=2, metavar="S", help="its seconds to the first step, in all"
    )
    options = parser.parse_args()
    if options.folder.exists() or (options.undisturbed is None) != (options.took is None):
        parser.error("FOLDER must be new, and --undisturbed and --took come together")
    folder, export = options.folder.absolute(), [options.source, "--precision", options.precision]
    undisturbed = (
        Undisturbed(options.undisturbed.absolute(), *options.took)
        if options.undisturbed
        else undisturbed_export(folder, export)
    )
    print(f"undisturbed: {undisturbed.start_s:.1f} s to the first step, {undisturbed.seconds:.1f} s in all")
    faults = killed_export(folder, export, undisturbed, kills=options.kills, seed=options.seed)
    print("\n".join(faults) or f"{options.kills} kills: the bundle is the same, and nothing is left behind")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
