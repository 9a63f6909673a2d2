"""The KV-cache plugin's kernels: their speed beside torch's attention, then their tests on the GPU,
compute-sanitizer among them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

from .machine import ROOT
from .processes import lines_of
from .report import Report

NAME, LIMIT_SECONDS = "plugin", 170
SPARE_SECONDS = 5  # for what is left to do when the tests are stopped
PLUGINS = ROOT / "tests" / "plugins"
CUDA = Path("/usr/local/cuda/bin")
RESULT = re.compile(
    r"^(?:\[gw\d+\] \[ *\d+%\] (?P<first>[A-Z]+) (?P<one>.+?)"  # with pytest-xdist
    r"|(?P<other>\S+::.+?) (?P<last>[A-Z]+) +\[ *\d+%\]) *$"
)
IN_GRAPH = ("star", "sdpa")  # of the other peers only the time of a single call is kept


def run(folder: Path, report: Report) -> None:
    """Compile, measure, test. A figure of the benchmark is kept when its line is there, a test's answer when
    the test ends.
    """
    began = time.monotonic()
    if lacking := lacks():
        report.not_run(lacking)
        return
    table = Table(report)
    status = None
    for line in lines_of([sys.executable, str(PLUGINS / "bench_kv_attention.py")], seconds=LIMIT_SECONDS / 2):
        status = line if isinstance(line, int) else status
        if isinstance(line, str):
            table.take(line)
    how = "stopped" if status is None else f"exit status {status}"
    report.check("the benchmark ran to its end", status == 0, f"{how}, {table.rows} rows")
    run_tests(report, seconds=LIMIT_SECONDS - SPARE_SECONDS - (time.monotonic() - began))


def lacks() -> str:
    """What this machine has not and the step needs; empty where it has all."""
    import torch

    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return "" if program("nvcc") else "there is no nvcc"


def program(name: str) -> str | None:
    """A program of the CUDA toolkit, in the PATH or where the toolkit is installed."""
    return shutil.which(name) or shutil.which(str(CUDA / name))


class Table:
    """Takes the benchmark's lines into a report."""

    def __init__(self, report: Report):
        self.report, self.bandwidth, self.rows = report, 0.0, 0
        self.rounds: dict[tuple[str, str], list[float]] = {}

    def take(self, line: str) -> None:
        """One line of output; what is no JSON object is not the benchmark's."""
        if not line.startswith("{"):
            return
        found = json.loads(line)
        if "copies_bytes_per_s" in found:
            self.bandwidth = found["copy_bytes_per_s"]
            self.report.figure(
                "copy bandwidth", [copy / 1e12 for copy in found["copies_bytes_per_s"]], "TB/s"
            )
        elif "unavailable" in found:
            self.report.fact(f"{label(found)}: {found['peer']}", f"unavailable: {found['unavailable']}")
        elif "peer" in found:
            self.row(label(found), found)
        elif "goals" in found:
            self.report.fact(f"{self.last}: goals", found["goals"])

    def row(self, name: str, found: dict) -> None:
        """A peer's times at one shape; of the kernels also their share of the copy bandwidth, of torch its
        time over theirs.
        """
        self.last, self.rows = name, self.rows + 1
        self.rounds[name, found["peer"]] = rounds = found["rounds_us"]
        layout = {key: found[key] for key in ("configuration", "splits") if key in found}
        self.report.figure(f"{name}: {found['peer']}", rounds, "us", **layout)
        if found["peer"] in IN_GRAPH:
            self.report.figure(f"{name}: {found['peer']} in a graph", found["graph_rounds_us"], "us")
        if found["peer"] == "star":
            self.report.figure(
                f"{name}: share", [found["cache_bytes"] / us * 1e6 / self.bandwidth for us in rounds], ""
            )
        if found["peer"] == "sdpa":
            quotients = [theirs / ours for theirs, ours in zip(rounds, self.rounds[name, "star"])]
            self.report.figure(f"{name}: sdpa over star", quotients, "")


def label(found: dict) -> str:
    """A shape's name in figures."""
    rows, key_heads, new, used = (found[key] for key in ("rows", "kv_heads", "new", "used"))
    return f"{found['shape']}, {rows} rows, {key_heads} key heads, {new} new, {used} used"


def run_tests(report: Report, *, seconds: float) -> None:
    """The tests marked `gpu`, a check each; those that are not done in time are not run."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/plugins",
        "-m",
        "gpu",
        "-vv",
        "-rP",
        "-p",
        "no:cacheprovider",
        "--continue-on-collection-errors",
    ]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(max(2, min(14, (os.cpu_count() or 1) - 2))), "--maxschedchunk", "1"]
    if not program("compute-sanitizer"):
        report.not_run("there is no compute-sanitizer", part="the tests with it")
        command += ["-k", "not sanitizer"]
    status, shares, began = None, [], time.monotonic()
    for line in lines_of(command, seconds=seconds):
        if isinstance(line, int):
            status = line
        elif result := RESULT.match(line):
            name, word = result["one"] or result["other"], result["first"] or result["last"]
            if word != "SKIPPED":
                report.check(name.partition("::")[2], word == "PASSED")
        elif share := re.match(r"\d+ cases, at most (\S+) of the limit", line):
            shares.append(float(share[1]))
    if shares:
        report.figure("largest error over what is allowed, of each test", shares, "")
    if status is None:
        report.not_run(f"stopped after {seconds:.0f} s", part="the rest of the tests")
        return
    report.figure("all tests", [time.monotonic() - began], "s")
    report.check("pytest ended well", status == 0, f"exit status {status}")
