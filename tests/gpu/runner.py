"""Runs steps one after another, each in a process group of its own that is killed at its limit, and keeps
one record of all.

After every step, and every second while one runs, `gpu_check.json` and `gpu_check.md` in the output folder
are replaced, so a run that is cut off keeps what it had. A later run of some steps replaces those and keeps
the others.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from .machine import ROOT, machine
from .page import page
from .processes import kill_tree
from .report import write_json, write_text

STEPS = (
    "device_loop",
    "plugin",
    "ort_cuda",
    "real_widths",
    "rtx",
    "training",
)  # most valuable first; modules of this folder
BUDGET_SECONDS = 480.0
RECORD, PAGE = "gpu_check.json", "gpu_check.md"
TAIL_CHARACTERS = 4000
PREDICTIONS = Path(__file__).parent / "predictions"


def run_steps(
    names: list[str],
    out: Path,
    *,
    budget_seconds: float = BUDGET_SECONDS,
    commit: str | None = None,
    package: str = __package__,
    tell: Callable[[str], None] = print,
) -> dict:
    """Run the modules `package`.NAME in this order and return the record of `out`, in which they replace
    what was there of them.

    Together they take at most `budget_seconds`; a step that has less left than its own limit gets what is
    left. Raises OSError where `out` cannot be written, ValueError where its record is not one.
    """
    out.mkdir(parents=True, exist_ok=True)
    ends, record = time.monotonic() + budget_seconds, read_record(out)
    record["runs"].append(machine(commit=commit))
    for name in names:
        left = ends - time.monotonic()
        entry = record["steps"][name] = {"run": len(record["runs"]) - 1, "status": "running"} | blank()
        save(record, out)
        with tempfile.TemporaryDirectory(prefix="gpu-check-") as scratch:
            for seen in attempt(f"{package}.{name}", Path(scratch), left):
                entry.update(seen)
                save(record, out)
        tell(
            f"{name}: {entry['status']} after {entry['seconds']:.0f} s"
            + (f": {entry['reason']}" if entry["reason"] else "")
        )
    return record


def attempt(module: str, scratch: Path, left: float):
    """Run one step; what is known of it, again and again, the last time with its final status."""
    began, report = time.monotonic(), scratch / "report.json"
    try:
        limit = min(importlib.import_module(module).LIMIT_SECONDS, left)
    except Exception as error:  # whatever a module raises must not end the run
        yield ended(
            "not run", f"{module} cannot be imported: {type(error).__name__}: {error}", 0.0, report, ""
        )
        return
    if limit <= 0:
        yield ended("not run", "the time of the whole run is used up", 0.0, report, "")
        return
    (scratch / "folder").mkdir()
    with open(scratch / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.child", module, str(scratch / "folder"), str(report)],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        try:
            while (status := poll(process, min(1.0, max(0.0, began + limit - time.monotonic())))) is None:
                if time.monotonic() - began >= limit:
                    break
                yield blank() | read_report(report) | {"seconds": time.monotonic() - began}
        finally:
            kill_group(process)
    yield ended(
        *verdict(status, limit, read_report(report)),
        time.monotonic() - began,
        report,
        (scratch / "log").read_text(errors="replace"),
    )


def poll(process: subprocess.Popen, seconds: float) -> int | None:
    """The process's exit status, after at most `seconds`; None while it runs."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def kill_group(process: subprocess.Popen) -> None:
    """Kill the step's process and its children, also those that it left behind."""
    kill_tree(process.pid)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def verdict(status: int | None, limit: float, report: dict) -> tuple[str, str]:
    """(done, failed or not run; the reason) of a step that exited with `status`, or was killed at its limit
    (None).
    """
    if status is None:
        return "failed", f"killed at its limit of {limit:.0f} s"
    if status != 0:
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        return "failed", f"crashed: {how}"
    if broken := [name for name, check in report["checks"].items() if not check["passed"]]:
        return "failed", "; ".join(broken)
    whole = [item["reason"] for item in report["not_run"] if not item["part"]]
    if whole or not any(report[kind] for kind in ("figures", "facts", "checks")):
        return "not run", "; ".join(
            whole or [f"{i['part']}: {i['reason']}" for i in report["not_run"]]
        ) or "it reported nothing"
    return "done", "; ".join(f"{item['part']} not run: {item['reason']}" for item in report["not_run"])


def ended(status: str, reason: str, seconds: float, report: Path, log: str) -> dict:
    return read_report(report) | {
        "status": status,
        "reason": reason,
        "seconds": round(seconds, 1),
        "output_tail": log[-TAIL_CHARACTERS:],
    }


def blank() -> dict:
    return {
        "figures": {},
        "facts": {},
        "checks": {},
        "not_run": [],
        "reason": "",
        "seconds": 0.0,
        "output_tail": "",
    }


def read_report(path: Path) -> dict:
    """What the step has written so far."""
    return (
        json.loads(path.read_text())
        if path.exists()
        else {kind: blank()[kind] for kind in ("figures", "facts", "checks", "not_run")}
    )


def read_record(out: Path) -> dict:
    """The record of earlier runs in `out`; an empty one where there is none. A step that is "running" there
    was cut off.
    """
    path = out / RECORD
    record = json.loads(path.read_text()) if path.exists() else {"runs": [], "steps": {}}
    for entry in record["steps"].values():
        if entry["status"] == "running":
            entry.update(status="failed", reason="the run was cut off in this step")
    return record


def save(record: dict, out: Path) -> None:
    """Write the record and its page, steps in their order, with the predictions of this tree."""
    order = [*STEPS, *sorted(set(record["steps"]) - set(STEPS))]
    record["steps"] = {name: record["steps"][name] for name in order if name in record["steps"]}
    record["predictions"] = {name: predictions_of(name) for name in record["steps"]}
    write_json(out / RECORD, record)
    write_text(out / PAGE, page(record))


def predictions_of(name: str) -> dict:
    """What was written of a step before it ran."""
    path = PREDICTIONS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}
