"""What the measuring steps share: the device's bandwidth and memory, parts that fail alone, and a look at the
time left."""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import re
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from engines.bench import in_turns
from engines.errors import MissingError

from .report import Report

COPY_BYTES, COPY_REPEATS = 1 << 31, 10


def check_device() -> str:
    """The version of an ONNX Runtime with CUDA. Raises MissingError without one, or without a CUDA device."""
    import torch

    from .ort_decode import PROVIDERS, onnxruntime_with_libraries

    runtime = onnxruntime_with_libraries()
    if not torch.cuda.is_available() or PROVIDERS["cuda"] not in runtime.get_available_providers():
        raise MissingError(
            "ONNX Runtime has no CUDA here",
            fix="pip install onnxruntime-gpu, on a machine with an NVIDIA GPU",
            where=f"onnxruntime {runtime.__version__}: expected {PROVIDERS['cuda']} and a device, got "
            f"{', '.join(runtime.get_available_providers())} and {torch.cuda.device_count()} devices",
        )
    return runtime.__version__


def copy_bandwidth(device: str, *, size_bytes: int = COPY_BYTES) -> list[float]:
    """Bytes per second of copies within the device's memory: each byte copied is read once and written
    once."""
    import torch

    source, target = (torch.ones(size_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    seconds = in_turns(
        {"copy": lambda: target.copy_(source)}, repeats=COPY_REPEATS, synchronize=lambda: synchronize(device)
    )
    return [2 * size_bytes / s for s in seconds["copy"]]


def synchronize(device: str) -> None:
    """Wait for all work on the device."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def used_bytes(device: str) -> int:
    """Memory of the device that is taken, by whomever in this process and others; 0 for the host."""
    if device != "cuda":
        return 0
    import torch

    free, total = torch.cuda.mem_get_info()
    return total - free


def release(device: str) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()


class Parts:
    """Runs the parts of a step, each guarded: what one raises is recorded under its name, and the others go
    on.

    `with parts("name", seconds=20):` does not run the body's work when fewer seconds are left: ask
    `parts.left()` inside.
    """

    def __init__(self, report: Report, *, limit_seconds: float, device: str):
        self.report, self.device, self.ends = report, device, time.monotonic() + limit_seconds

    def left(self) -> float:
        """Seconds until the step's limit."""
        return self.ends - time.monotonic()

    def enough(self, part: str, seconds: float) -> bool:
        """Whether `part`, which takes about `seconds`, still fits; when not, the report says so."""
        if self.left() >= seconds:
            return True
        self.report.not_run(f"{self.left():.0f} s are left, and it takes about {seconds:.0f} s", part=part)
        return False

    @contextlib.contextmanager
    def __call__(self, part: str):
        """A part whose exception fails the check of its name."""
        try:
            yield
        except Exception as error:  # whatever a library raises
            traceback.print_exc()
            self.report.check(part, False, words(error))
            release(self.device)

    @contextlib.contextmanager
    def finding(self, name: str):
        """A part that may be refused: the answer is what is asked for. The fact `name` is "yes", or the
        refusal's words."""
        try:
            yield
        except Exception as error:
            self.report.fact(name, words(error))
            release(self.device)
        else:
            self.report.fact(name, "yes")


def words(error: Exception, limit: int = 600) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:limit]


def forked(report: Report, part: str, work: Callable[[Report], None], *, seconds: float) -> None:
    """Run `work` on a record of its own in a process of its own, and take what it saw into `report` while it
    runs.

    A fault on a CUDA device ends all that its process does there, so parts that must not lose each other are
    forked, by a parent that has imported what they need and has not touched the device. Killed after
    `seconds`.
    """
    path, ends = (
        report.path.with_name(f"{re.sub(r'[^a-zA-Z0-9]+', '-', part)}.part.json"),
        time.monotonic() + seconds,
    )
    process = multiprocessing.get_context("fork").Process(target=_work, args=(work, path))
    process.start()
    while process.is_alive() and time.monotonic() < ends:
        process.join(0.5)
        taken(report, path)
    if process.is_alive():
        process.kill()
        process.join()
        report.check(part, False, f"killed after {seconds:.0f} s")
    elif process.exitcode:
        report.check(part, False, f"its process ended with {process.exitcode}")
    taken(report, path)


def _work(work: Callable[[Report], None], path: Path) -> None:
    report = Report(path)
    try:
        work(report)
    except (ImportError, MissingError) as error:
        report.not_run(words(error))
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None


def taken(report: Report, path: Path) -> None:
    """What a forked part has written by now, into `report`."""
    if path.exists():
        report.take(json.loads(path.read_text()))
