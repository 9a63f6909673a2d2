"""Run a case and say what of the contract (docs/bad_inputs.md) it broke."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HANG_S = 120  # on busy cores; what is refused takes a second or two
# What a refusal may take beyond what its program takes to start, once torch is imported too.
MEMORY_BYTES = 1 << 30
HOLLOW_BYTES = 1 << 19
BUNDLE, CHECKPOINT = "bundle", "checkpoint"
CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
LINES = re.compile(r"error: .+\n  where: .+\n  fix: .+\n?\Z")


@dataclass(frozen=True)
class Case:
    """One command line, with {bundle} and {checkpoint} for a good one of each.

    `spoil` changes copies of them in the case's folder, or adds to it. `said` is a pattern of what stderr
    must hold, and `creates` the files that a success leaves.
    """

    name: str
    words: tuple[str, ...]
    code: int
    said: str = ""
    spoil: Callable[[Path], None] | None = None
    creates: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    stdin: bytes = b""
    stdout: str = ""  # a file to write to instead of a pipe, or "closed"
    stderr: str = ""
    hollow: bool = False  # copies have large files of the right size with nothing in them


Run = Callable[[Case, list[str], Path], "Ended"]


@dataclass(frozen=True)
class Ended:
    """How a command line ended."""

    code: int | str
    out: str
    err: str
    cpu_seconds: float = 0.0
    peak_bytes: int = 0


@dataclass(frozen=True)
class Result:
    """What came of a case: `faults` are broken promises."""

    case: Case
    ended: Ended
    faults: tuple[str, ...]


def run_case(case: Case, folder: Path, run: Run, *, originals: Mapping[str, Path]) -> Result:
    """Run `case` in the empty `folder`."""
    places = {}
    for name, original in originals.items():
        places[name] = original
        if case.spoil is not None and any(f"{{{name}}}" in word for word in case.words):
            copy = _hollow_copy if case.hollow else shutil.copy2
            places[name] = shutil.copytree(original, folder / name, copy_function=copy)
    if case.spoil is not None:
        case.spoil(folder)
    before = snapshot(folder)
    words = [word.format(**places) if "{" in word else word for word in case.words]
    ended = run(case, words, folder)
    changed = differences(before, snapshot(folder), allowed=case.creates)
    return Result(case, ended, tuple(faults_of(case, ended, changed)))


def put(whole: Any, *keys: str | int, value: object) -> None:
    """Set one entry of nested JSON."""
    *way, last = keys
    for key in way:
        whole = whole[key]
    whole[last] = value


def _hollow_copy(source: str, target: str) -> None:
    """Copy a small file, and give a large one its size alone."""
    if (size := os.stat(source).st_size) <= HOLLOW_BYTES:
        shutil.copy2(source, target)
        return
    with open(target, "wb") as made:
        made.truncate(size)


def installed(program: str) -> Run:
    """Runs of an installed `star-export`, each in a process of its own."""

    def run(case: Case, words: list[str], folder: Path) -> Ended:
        logs = folder.with_name(f"{folder.name}.logs")
        logs.mkdir()
        (logs / "in").write_bytes(case.stdin)
        ends = {number: name for number, name in ((1, case.stdout), (2, case.stderr)) if name}
        moved = " ".join(f"{n}>&-" if name == "closed" else f"{n}>{name}" for n, name in ends.items())
        with (
            (logs / "in").open("rb") as given,
            (logs / "out").open("wb") as out,
            (logs / "err").open("wb") as err,
        ):
            child = subprocess.Popen(
                ["sh", "-c", f'exec "$@" {moved}', "sh", program, *words],
                cwd=folder,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | dict(case.environment),
                stdin=given,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
            timer = threading.Timer(HANG_S, os.killpg, (child.pid, signal.SIGKILL))
            timer.start()
            _, status, usage = os.wait4(child.pid, 0)
            timer.cancel()
        child.returncode = os.waitstatus_to_exitcode(status)
        told, said = ((logs / name).read_bytes().decode(errors="replace") for name in ("out", "err"))
        shutil.rmtree(logs)
        code = "hang" if child.returncode == -signal.SIGKILL else child.returncode
        return Ended(code, told, said, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)

    return run


def faults_of(case: Case, ended: Ended, changed: list[str]) -> list[str]:
    """The promises that a run broke, in words."""
    both = ended.err + ended.out
    found = [] if ended.code == case.code else [f"exit code {ended.code} instead of {case.code}"]
    if "Traceback" in both:
        found.append("a traceback")
    if case.code in (2, 3, 4, 5) and not case.stderr and not LINES.search(ended.err):
        found.append(f"not three lines: {ended.err[-300:]!r}")
    if not re.search(case.said, both, re.IGNORECASE):
        found.append(f"nothing about {case.said!r}: {both[-400:]!r}")
    if CONTROLS.search(both):
        found.append("control characters")
    if ended.peak_bytes > MEMORY_BYTES:
        found.append(f"{ended.peak_bytes >> 20} MiB of memory")
    return found + [f"changed: {name}" for name in changed]


def snapshot(folder: Path) -> dict[str, str]:
    """Every path below `folder`, and what is there."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "folder" if path.is_dir() else "special"
    return found


def differences(before: dict[str, str], after: dict[str, str], *, allowed: tuple[str, ...]) -> list[str]:
    """The names whose contents differ, but for those of `allowed` files."""
    names = before.keys() | after.keys()
    return sorted(name for name in names if before.get(name) != after.get(name) and name not in allowed)
