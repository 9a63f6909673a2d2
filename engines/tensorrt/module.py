"""The TensorRT module of a target by its name, its version, and its log.

`tensorrt_rtx` and `tensorrt` have one Python API; the target table says which one to import.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Iterator

from ..errors import MissingError, UsageError, listed
from ..targets import Target, host_platform
from . import device

EXTRAS = {"tensorrt_rtx": "rtx", "tensorrt": "tensorrt"}
JETPACK = (
    "in an environment that sees JetPack's own TensorRT (apt install python3-libnvinfer; python3 -m venv --system-site-packages "
    ".venv): pip install 'star-export[jetpack]'"
)


def tensorrt_of(target: Target):
    """The module `target.builder`. Raises MissingError when it is not installed, or older than the target needs."""
    fix = JETPACK if target.dialect == "classic" else f"pip install 'star-export[{EXTRAS[target.builder]}]'"
    try:
        module = importlib.import_module(target.builder)
    except (ImportError, OSError) as error:  # OSError: a library of it cannot be loaded
        raise MissingError(
            f"{target.builder} is not installed",
            fix=fix,
            where=f"{target.name}: expected {target.builder} {target.tensorrt} or newer, got {error}",
        ) from None
    if version_tuple(module.__version__) < version_tuple(target.tensorrt):
        raise MissingError(
            f"{target.builder} is too old",
            fix=f"upgrade to JetPack {target.jetpack}" if target.jetpack else fix,
            where=f"{target.name}: expected {target.builder} {target.tensorrt} or newer, got {module.__version__}",
        )
    return module


def version_tuple(version: str) -> tuple[int, ...]:
    """(1, 7, 1, 116) for `1.7.1.116`; what follows the digits of a part is dropped."""
    digits = ["".join(c for c in part if c.isdigit()) for part in version.split(".")]
    return tuple(int(d) for d in digits if d)


def check_platform(target: Target) -> None:
    """The target's plans are built and run on systems like this one, or UsageError: a plan is tied to where it was built."""
    if host_platform() not in target.platforms:
        raise UsageError(
            f"Plans for {target.name} belong to another system",
            fix="run this command on such a machine",
            where=f"{target.device}: expected {' or '.join(target.platforms)}, got {host_platform()}",
        )


def check_gpu(target: Target) -> device.Gpu:
    """The GPU of this machine that runs plans of `target`: the first, which sessions use. Raises MissingError."""
    gpu = device.gpus()[0]
    if gpu.compute_capability != target.compute_capability:
        raise MissingError(
            f"This machine's GPU is not {target.name}'s",
            fix="use this GPU's target: star-export doctor",
            where=f"expected {target.sm} ({target.device}), got {gpu.sm} ({gpu.name})",
        )
    return gpu


def check_runnable(target: Target) -> None:
    """This machine runs plans of `target`: system, TensorRT, GPU; or UsageError or MissingError for the first that it lacks."""
    check_platform(target)
    tensorrt_of(target)
    check_gpu(target)


@functools.cache
def log_of(module):
    """The process's one log of `module`; TensorRT ignores every logger but the first that it is given."""

    class Log(module.ILogger):
        def __init__(self):
            module.ILogger.__init__(self)
            self.errors: list[str] | None = None

        def log(self, severity, message):
            if (
                severity <= module.ILogger.Severity.ERROR
                and self.errors is not None
                and "cudaError 35" not in message
            ):
                self.errors.append(
                    " ".join(message.split())
                )  # 35: this machine has no driver, which building does not need

        @contextlib.contextmanager
        def collect(self) -> Iterator[list[str]]:
            """Errors logged within the block."""
            self.errors = []
            try:
                yield self.errors
            finally:
                self.errors = None

    return Log()


def words(messages: list[str]) -> str:
    """The first messages on one line."""
    return listed([message[:300] for message in messages], limit=5) or "no message"
