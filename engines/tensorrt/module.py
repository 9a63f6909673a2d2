"""The TensorRT module of a target: its import, version and log, and whether this machine suits the target.

`tensorrt_rtx` and `tensorrt` share one Python API; the target table says which one to import.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator
from typing import Any

from ..errors import MissingError, UsageError, install, listed
from ..targets import Target, host_platform
from . import device

EXTRAS = {"tensorrt_rtx": "rtx", "tensorrt": "tensorrt"}
JETPACK = (
    "in an environment that sees JetPack's own TensorRT (apt install python3-libnvinfer; "
    f"python3 -m venv --system-site-packages .venv): {install('jetpack')}"
)


def tensorrt_of(target: Target) -> Any:
    """Import the module `target.builder`.

    Raises MissingError when it is not installed or older than the target needs.
    """
    fix = JETPACK if target.dialect == "classic" else install(EXTRAS[target.builder])
    try:
        module = importlib.import_module(target.builder)
    except (ImportError, OSError) as error:  # OSError: one of its libraries cannot be loaded
        raise MissingError(
            f"{target.builder} is not installed",
            fix=fix,
            where=f"{target.name}: expected {target.builder} {target.tensorrt} or newer, got {error}",
        ) from None
    if version_tuple(module.__version__) < version_tuple(target.tensorrt):
        raise MissingError(
            f"{target.builder} is too old",
            fix=f"upgrade to JetPack {target.jetpack}" if target.jetpack else fix,
            where=f"{target.name}: expected {target.builder} {target.tensorrt} or newer, "
            f"got {module.__version__}",
        )
    return module


def version_tuple(version: str) -> tuple[int, ...]:
    """(1, 7, 1, 116) for `1.7.1.116`; characters of a part that are not digits are dropped."""
    digits = ["".join(c for c in part if c.isdigit()) for part in version.split(".")]
    return tuple(int(d) for d in digits if d)


def check_platform(target: Target) -> None:
    """Check that plans of `target` belong to this system: a plan is tied to the system that built it.

    Raises UsageError.
    """
    if host_platform() not in target.platforms:
        raise UsageError(
            f"Plans for {target.name} belong to another system",
            fix="run this command on such a machine",
            where=f"{target.device}: expected {' or '.join(target.platforms)}, got {host_platform()}",
        )


def check_gpu(target: Target) -> device.Gpu:
    """The GPU that runs plans of `target`: this machine's first, which sessions use.

    Raises MissingError when its architecture is not the target's.
    """
    gpu = device.gpus()[0]
    if gpu.compute_capability != target.compute_capability:
        raise MissingError(
            f"This machine's GPU cannot run plans for {target.name}",
            fix="use this GPU's target: star-export doctor",
            where=f"expected {target.sm} ({target.device}), got {gpu.sm} ({gpu.name})",
        )
    return gpu


def check_runnable(target: Target) -> None:
    """Check that this machine can run plans of `target`: its system, its TensorRT and its GPU, in this order.

    Raises UsageError for the system, MissingError for the others.
    """
    check_platform(target)
    tensorrt_of(target)
    check_gpu(target)


@functools.cache
def log_of(trt: Any) -> Any:
    """The process's one log of the module `trt`: TensorRT ignores every logger after the first."""

    class Log(trt.ILogger):
        def __init__(self):
            trt.ILogger.__init__(self)
            self.errors: list[str] | None = None

        def log(self, severity, message):
            no_driver = "cudaError 35" in message  # building does not need one
            if severity <= trt.ILogger.Severity.ERROR and self.errors is not None and not no_driver:
                self.errors.append(" ".join(message.split()))

        @contextlib.contextmanager
        def collect(self) -> Iterator[list[str]]:
            """Collect the errors that are logged within the block."""
            self.errors = []
            try:
                yield self.errors
            finally:
                self.errors = None

    return Log()


def words(messages: list[str]) -> str:
    """The first few messages, on one line."""
    return listed([message[:300] for message in messages], limit=5) or "no message"
