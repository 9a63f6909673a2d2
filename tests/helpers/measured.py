"""Run a command and measure it from outside: its time, the memory of its process group, what it says when.

Memory is the group's own pages, RssAnon + RssShmem of every process, sampled every 0.1 s from /proc: what
cannot be dropped and read again. Pages of mapped files are not counted. Linux only.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SAMPLE_S = 0.1
SEARCH_S = 1.0  # looking for the group's processes takes as long as 30 samples
READ_BYTES = 16 << 20


@dataclass
class Measured:
    """One run: seconds, peak bytes of own pages, exit code (negative: the signal), and its output.

    `said` holds what the command wrote to its terminal (stderr), with the seconds from its start.
    """

    seconds: float = 0.0
    peak_bytes: int = 0
    exit_code: int = 0
    stdout: str = ""
    said: list[tuple[float, str]] = field(default_factory=list)

    def first(self, text: str) -> float | None:
        """Seconds from the start until `text` was on the terminal; None if it never was."""
        seen = ""
        for seconds, words in self.said:
            seen = seen[-len(text) :] + words
            if text in seen:
                return seconds
        return None


def run_measured(
    command: Sequence[str | Path],
    *,
    stop_bytes: int | None = None,
    stop_text: str | None = None,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
) -> Measured:
    """Run `command` with a terminal as its stderr.

    A group that takes more than `stop_bytes` is killed. One that has written `stop_text` to the terminal is
    interrupted, as by Ctrl-C.
    """
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))
    measured, started = Measured(), time.monotonic()
    process = subprocess.Popen(
        [str(word) for word in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=end,
        text=True,
        cwd=cwd,
        env=env,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )
    os.close(end)
    assert process.stdout is not None
    outputs, sampled, recent = {terminal, process.stdout.fileno()}, 0.0, ""
    searched, group = 0.0, [process.pid]
    try:
        while outputs:
            for descriptor in select.select(outputs, [], [], SAMPLE_S)[0]:
                try:
                    data = os.read(descriptor, 1 << 16).decode(errors="replace")
                except OSError:  # a terminal whose other end is closed
                    data = ""
                if not data:
                    outputs.remove(descriptor)
                elif descriptor == terminal:
                    measured.said.append((time.monotonic() - started, data))
                    recent = recent[-1000:] + data
                else:
                    measured.stdout += data
            if time.monotonic() - sampled >= SAMPLE_S:
                sampled = time.monotonic()
                if sampled - searched >= SEARCH_S:
                    searched, group = sampled, processes_of(process.pid)
                pages = own_bytes(group)
                measured.peak_bytes = max(measured.peak_bytes, pages)
                if stop_bytes is not None and pages > stop_bytes:
                    os.killpg(process.pid, signal.SIGKILL)
            if stop_text is not None and stop_text in recent:
                os.killpg(process.pid, signal.SIGINT)
                stop_text = None
        measured.exit_code = process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(terminal)
    measured.seconds = time.monotonic() - started
    return measured


def processes_of(group: int) -> list[int]:
    """The processes of a process group."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):  # the process ended meanwhile, or it is no process
            if int((folder / "stat").read_text().rpartition(")")[2].split()[2]) == group:
                found.append(int(folder.name))
    return found


def own_bytes(processes: Iterable[int]) -> int:
    """RssAnon + RssShmem of these processes, in bytes."""
    total = 0
    for process in processes:
        with contextlib.suppress(OSError):  # it ended meanwhile
            lines = Path(f"/proc/{process}/status").read_text().splitlines()
            total += sum(
                int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "RssShmem:"))
            )
    return total


def seconds_to_read(paths: Iterable[Path], *, cold: bool) -> float:
    """Seconds to read the files once, one after the other; `cold`: after the page cache has dropped them."""
    if cold:
        drop_from_cache(paths)
    buffer, started = memoryview(bytearray(READ_BYTES)), time.monotonic()
    for path in paths:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.monotonic() - started


def drop_from_cache(paths: Iterable[Path]) -> None:
    """Have the page cache drop the files, which must not be mapped by anyone."""
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
