"""Processes that a step starts: their lines as they come, and their end together with all that they started
themselves.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

from .machine import ROOT


def kill_tree(pid: int) -> None:
    """Kill a process and all its descendants (Linux: by /proc). What has gone meanwhile is no error."""
    for each in [pid, *descendants(pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """Its children, their children, and so on."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state = path.read_text(errors="replace")
        except OSError:  # it has ended
            continue
        parent = int(
            state.rpartition(")")[2].split()[1]
        )  # behind the name, which may hold anything: state, parent
        children.setdefault(parent, []).append(int(path.parent.name))
    found = [pid]
    for each in found:
        found += children.get(each, [])
    return found[1:]


def lines_of(command: list[str], *, seconds: float) -> Iterator[str | int]:
    """The lines that a command prints, as they come, copied to this process's output; last its exit status,
    unless it was killed after `seconds`."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    }
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    killed = threading.Event()
    timer = threading.Timer(max(seconds, 0.0), lambda: (killed.set(), kill_tree(process.pid)))
    timer.start()
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            yield line.rstrip("\n")
        status = process.wait()
        if not killed.is_set():
            yield status
    finally:
        timer.cancel()
        kill_tree(process.pid)
        process.wait()
