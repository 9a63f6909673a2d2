"""Send signals to the verbs at random moments, and report what they leave.

    python -m tests.kill_verbs FOLDER BUNDLE [--source nano] [--rounds 5] [--seed 0] [--verbs export,...]

`docs/bad_inputs.md` 48: SIGINT and SIGTERM end a verb with 130, without a traceback, and without files that
nothing reads; SIGKILL leaves at most what the next run of the same command clears or takes over. Before the
program's first line runs, while Python itself starts, a signal ends the process as it ends any other: such
rounds are counted apart. What the next run makes is compared with what the undisturbed one made. BUNDLE is a
bundle of a small model, which is copied. Exit code 1 says that one of this does not hold.
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
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
OF_TORCH = "torchinductor_"  # a folder in TMPDIR that torch makes once and uses again


@dataclass
class Place:
    """The folder of one verb: `work` with the bundle and the outputs, and `temporary`, which is TMPDIR."""

    work: Path
    temporary: Path
    words: list[str]

    def run(self, moment: float | None, number: int) -> tuple[int, str, bool]:
        """Run the verb, with a signal after `moment` seconds.

        Returns the exit code, stderr, and whether the signal came before the program's first line.
        """
        early = False
        process = subprocess.Popen(
            [sys.executable, "-m", "star_export", *self.words, "--no-progress"],
            cwd=self.work,
            env=os.environ | {"TMPDIR": str(self.temporary), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            _, said = process.communicate(timeout=moment)
        except subprocess.TimeoutExpired:
            early = not catches(process.pid, signal.SIGTERM)  # Python by itself does not catch this one
            process.send_signal(number)
            try:
                _, said = process.communicate(timeout=120)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                _, said = process.communicate()
                said += "\nHUNG"
        return process.returncode, said, early

    def contents(self) -> dict[str, str]:
        """What the verb makes: its files, by their SHA-256. Plans and certificates hold times, and differ."""
        names = [name for name in self.files() if not name.startswith(("TMPDIR/", ".out.stage/"))]
        kept = [name for name in names if "/plans/" not in name and "/certificates/" not in name]
        return {name: hashlib.sha256((self.work / name).read_bytes()).hexdigest() for name in kept}

    def files(self) -> set[str]:
        """What lies in both folders, but for torch's."""
        found = {p.relative_to(self.work).as_posix() for p in self.work.rglob("*") if p.is_file()}
        return found | {
            f"TMPDIR/{p.name}" for p in self.temporary.iterdir() if not p.name.startswith(OF_TORCH)
        }


def catches(process: int, number: int) -> bool:
    """Whether a process has a handler of its own for a signal."""
    status = Path(f"/proc/{process}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (number - 1) & 1)


def words_of(verb: str, source: str) -> list[str]:
    return {
        "export": ["export", source, "--out", "out"],
        "build": ["build", "bundle", "--target", "rtx-4090"],
        "validate": ["validate", "bundle"],
        "generate": ["generate", "bundle", "a red circle", "-o", "image.png", "--force"],
    }[verb]


def place_of(folder: Path, verb: str, bundle: Path, source: str) -> Place:
    place = Place(folder / verb / "work", folder / verb / "temporary", words_of(verb, source))
    place.work.mkdir(parents=True)
    place.temporary.mkdir()
    if verb != "export":
        ignored = shutil.ignore_patterns("plans", "certificates")
        shutil.copytree(bundle, place.work / "bundle", ignore=ignored)
    return place


def renewed(place: Place, whole: set[str]) -> None:
    """Remove what a whole run made, so that the next one does all its work."""
    for name in place.files() - whole:
        (place.work / name).unlink(missing_ok=True)
    for folder in ("out", "bundle/plans", "bundle/certificates"):
        shutil.rmtree(place.work / folder, ignore_errors=True)


def disturbed(place: Place, *, rounds: int, moments: random.Random) -> list[str]:
    """Send `rounds` signals of each kind; returns what does not hold."""
    before, started = place.files(), time.monotonic()
    code, said, _ = place.run(None, 0)
    took, after, made = time.monotonic() - started, place.files(), place.contents()
    if code:
        return [f"the undisturbed run ended with {code}: {said[-300:]}"]
    print(f"{place.words[0]}: {took:.1f} s undisturbed, makes {len(after - before)} files", flush=True)
    allowed = {name for name in after if not name.startswith("TMPDIR/")}
    faults, counts, early_rounds = [], dict[int, int](), 0
    for number in SIGNALS:
        for _ in range(rounds):
            renewed(place, before)
            moment = moments.uniform(0.0, took)
            code, said, early = place.run(moment, number)
            early_rounds += early
            if early and code == -number:
                continue
            counts[code] = counts.get(code, 0) + 1
            where = f"{place.words[0]}: {signal.Signals(number).name} after {moment:.2f} s: "
            expected = (0, -signal.SIGKILL) if number == signal.SIGKILL else (0, 130)
            if code not in expected:
                faults.append(f"{where}exit code {code}: {said[-300:]}")
            if "Traceback" in said or "HUNG" in said:
                faults.append(f"{where}{said[-600:]}")
            left = {name for name in place.files() - allowed if not name.startswith(".out.stage/")}
            if left and number != signal.SIGKILL:
                faults.append(f"{where}left {sorted(left)[:5]}")
        code, said, _ = place.run(None, 0)  # it clears, or takes over, what the last one left
        left = place.files() - allowed
        if code or left:
            faults.append(
                f"{place.words[0]}: the run after: exit code {code}, left {sorted(left)[:5]} {said[-300:]}"
            )
        if place.contents() != made:
            faults.append(f"{place.words[0]}: the run after made something else than the undisturbed one")
    ended = ", ".join(f"{count} with {code}" for code, count in sorted(counts.items()))
    print(f"{place.words[0]}: ended {ended}; {early_rounds} before the first line", flush=True)
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kill_verbs", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--source", default="nano")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbs", default="export,build,validate,generate")
    options = parser.parse_args()
    if options.folder.exists():
        parser.error("FOLDER must be new")
    faults = []
    for verb in options.verbs.split(","):
        place = place_of(options.folder.absolute(), verb, options.bundle.absolute(), options.source)
        faults += disturbed(place, rounds=options.rounds, moments=random.Random(options.seed))
    print("\n".join(faults) or "every signal ended its verb cleanly")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
