"""Run a case and say what of the contract (docs/bad_inputs.md) it broke."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

HANG_S = 120  # on busy cores; what is refused takes a second or two
# What a refusal may take beyond what its program takes to start, once torch is imported too.
MEMORY_BYTES = 1 << 30
BUNDLE, CHECKPOINT = "bundle", "checkpoint"
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


@dataclass(frozen=True)
class Result:
    """What came of a case: `faults` are broken promises."""

    case: Case
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    faults: tuple[str, ...]


def run_case(case: Case, folder: Path, *, originals: Mapping[str, Path], program: list[str]) -> Result:
    """Run `case` in the empty `folder`."""
    places = {}
    for name, original in originals.items():
        places[name] = original
        if case.spoil is not None and any(f"{{{name}}}" in word for word in case.words):
            places[name] = shutil.copytree(original, folder / name)
    if case.spoil is not None:
        case.spoil(folder)
    before = snapshot(folder)
    words = [word.format(**places) if "{" in word else word for word in case.words]
    started = time.perf_counter()
    code, out, err, usage = _run([*program, *words], case, folder)
    seconds = time.perf_counter() - started
    changed = differences(before, snapshot(folder), allowed=case.creates)
    return Result(
        case,
        seconds,
        usage.ru_utime + usage.ru_stime,
        usage.ru_maxrss * 1024,
        tuple(faults_of(case, code, out, err, changed, usage.ru_maxrss * 1024)),
    )


def _run(command: list[str], case: Case, folder: Path) -> tuple[int | str, str, str, object]:
    logs = folder.with_name(f"{folder.name}.logs")
    logs.mkdir()
    (logs / "in").write_bytes(case.stdin)
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | dict(case.environment)
    with open(logs / "in", "rb") as given, open(logs / "out", "wb") as out, open(logs / "err", "wb") as err:
        shell = list(command)
        ends = {"closed": "{}>&-"}
        to = [
            ends.get(where, f"{{}}>{where}").format(number)
            for number, where in (("1", case.stdout), ("2", case.stderr))
            if where
        ]
        if to:
            shell = ["sh", "-c", f'exec "$@" {" ".join(to)}', "sh", *command]
        child = subprocess.Popen(
            shell, cwd=folder, env=environment, stdin=given, stdout=out, stderr=err, start_new_session=True
        )
        deadline = time.monotonic() + HANG_S
        code: int | str = "hang"
        while True:
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            if pid:
                child.returncode = os.waitstatus_to_exitcode(status)
                code = child.returncode if code != "hang" or time.monotonic() < deadline else "hang"
                break
            if time.monotonic() > deadline:
                os.killpg(child.pid, signal.SIGKILL)
            time.sleep(0.01)
    texts = [(logs / name).read_bytes().decode("utf-8", errors="replace") for name in ("out", "err")]
    shutil.rmtree(logs)
    return code, texts[0], texts[1], usage


def faults_of(
    case: Case, code: int | str, out: str, err: str, changed: list[str], peak_bytes: int
) -> list[str]:
    """The promises that a run broke, in words."""
    found = [] if code == case.code else [f"exit code {code} instead of {case.code}"]
    if "Traceback" in err or "Traceback" in out:
        found.append("a traceback")
    if case.code in (2, 3, 4, 5) and not case.stderr and not LINES.search(err):
        found.append(f"not three lines: {err[-300:]!r}")
    if not re.search(case.said, err + out, re.IGNORECASE):
        found.append(f"nothing about {case.said!r}: {err[-400:]!r}")
    if re.search("[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f]", err + out) or "\x1b[3" in err:
        found.append("control characters")
    if peak_bytes > MEMORY_BYTES:
        found.append(f"{peak_bytes >> 20} MiB of memory")
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


def program_of(python: str = sys.executable) -> list[str]:
    """The program that is installed beside an interpreter."""
    return [str(Path(python).with_name("star-export"))]
