"""Compile one component: its ONNX parsed, checked, shown to the caller and compiled into a file.

The same code drives both builders, `tensorrt_rtx` and `tensorrt`.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .. import plugins
from ..bundle.held import real_path
from ..bundle.manifest import FileSpec
from ..bundle.reader import Bundle
from ..bundle.tensors import present_name
from ..errors import InputError, MissingError
from ..interpreter import network_hash, parsed_from_network
from ..interpreter.parsed import Parsed
from ..targets import Target
from .device import call
from .module import log_of, tensorrt_of, words
from .network import CAPACITY, check_network, network_from_onnx
from .profiles import Profile, largest

HOST_RATIO = 3  # memory that TensorRT for RTX takes per byte of weights, beyond 0.1 GB; measured: 1.4 to 2.8
# What TensorRT for RTX logs when an allocation fails; the last is a null pointer in its compiler.
_SHORT_OF_MEMORY = ("out of memory", "outofmemory", "bad_alloc", "check(p) failed")

# Called with a component and its network, just before it is compiled; raises to stop the build.
Look = Callable[[str, Parsed], None]


def compile_plan(
    bundle: Bundle,
    target: Target,
    component: str,
    graph: Path,
    profiles: tuple[Profile, ...],
    file: BinaryIO,
    *,
    look: Look | None = None,
) -> tuple[int, str | None, FileSpec]:
    """Compile `component` for `target` and write the plan to `file`.

    Returns the number of cache updates, the hash of the network (None where it cannot be interpreted), and
    the plan's size and hash. Raises InputError for a graph that TensorRT cannot build, MissingError when the
    GPU's memory is too small, and what `look` raises.
    """
    trt, spec = tensorrt_of(target), bundle.component(component)
    caches = sum(present_name(t.name) is not None for t in spec.inputs)
    capacity = largest(profiles, spec, axis=CAPACITY)
    with log_of(trt).collect() as errors:
        builder = trt.Builder(log_of(trt))
        network, parser = network_from_onnx(trt, builder, graph, capacity_tokens=capacity)
        updates = check_network(trt, network, spec, capacity_tokens=capacity, caches=caches)
        digest = _inspected(trt, network, component, look, owner=(builder, parser))
        errors.clear()  # TensorRT logs an error for each attribute that is asked for and not set
        config = _config(trt, builder, target, profiles)
        writer = _stream_writer(trt, file)
        with _interruptible(trt, config):
            done = _serialized(builder, network, config, writer)
        plugins.take_overflow()  # TensorRT may time layers on values of its own: their overflow means nothing
        del parser  # kept until here, because it owns memory that the network refers to
    if writer.error is not None:
        raise writer.error
    if not done or not writer.size:
        raise _failure(target, graph, errors)
    return updates, digest, FileSpec(writer.size, writer.hash.hexdigest())


def _inspected(trt: Any, network: Any, component: str, look: Look | None, *, owner: object) -> str | None:
    """The hash of the network that is compiled next, after `look` has seen it.

    None for a network that cannot be interpreted, such as one of a TensorRT that names its layers
    differently: it can be built all the same, unless `look` must see it.
    """
    try:
        parsed = parsed_from_network(trt, network, owner=owner)
    except (InputError, MissingError):
        if look is not None:
            raise
        return None
    if look is not None:
        look(component, parsed)
    return network_hash(parsed)


def _config(trt: Any, builder: Any, target: Target, profiles: tuple[Profile, ...]) -> Any:
    """The builder's configuration: the target's architecture and the optimisation profiles.

    The runtime of TensorRT for RTX allocates nothing while such a plan runs, so its steps can be captured
    into a CUDA graph; TensorRT proper has no such flag.
    """
    config = builder.create_builder_config()
    if (flag := getattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)) is not None:
        config.set_flag(flag)
    if target.builder == "tensorrt_rtx":  # the other builder builds for the device that it runs on
        architecture = trt.ComputeCapability.__members__[target.sm.upper().replace("_", "")]
        config.num_compute_capabilities = 1
        config.set_compute_capability(architecture, 0)
    for profile in profiles:
        ranges = builder.create_optimization_profile()
        for name, r in profile.inputs.items():
            ranges.set_shape(name, r.min, r.opt, r.max)
        config.add_optimization_profile(ranges)
    return config


def _serialized(builder: Any, network: Any, config: Any, writer: Any) -> bool:
    """Build the plan and hand it to `writer`.

    An older TensorRT cannot stream, and holds the plan in memory first.
    """
    if hasattr(builder, "build_serialized_network_to_stream"):
        return builder.build_serialized_network_to_stream(network, config, writer)
    plan = builder.build_serialized_network(network, config)
    return plan is not None and writer.write(plan) > 0


def _stream_writer(trt: Any, file: BinaryIO) -> Any:
    """A writer that hashes what TensorRT writes.

    TensorRT does not report a failed write, so `error` keeps it.
    """
    base: Any = getattr(trt, "IStreamWriter", object)  # absent in an older TensorRT

    class Writer(base):
        def __init__(self) -> None:
            base.__init__(self)
            self.size, self.hash = 0, hashlib.sha256()
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                file.write(data)
            except OSError as error:
                self.error = error
                return 0
            self.hash.update(data)
            size = memoryview(data).nbytes
            self.size += size
            return size

    return Writer()


@contextlib.contextmanager
def _interruptible(trt: Any, config: Any) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM stop the build, and raise KeyboardInterrupt afterwards.

    An exception must not pass through TensorRT's own frames.
    """

    class Monitor(trt.IProgressMonitor):
        def __init__(self):
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, name, parent, steps):
            pass

        def phase_finish(self, name):
            pass

        def step_complete(self, name, step) -> bool:
            return not signals

    if threading.current_thread() is not threading.main_thread():  # no other thread gets signals
        yield
        return
    signals: list[int] = []
    monitor = Monitor()  # kept in a variable: the configuration does not keep it alive
    config.progress_monitor = monitor
    numbers = [
        n for n in (signal.SIGINT, signal.SIGTERM) if callable(signal.getsignal(n))
    ]  # not ignored ones
    before = {n: signal.signal(n, lambda number, frame: signals.append(number)) for n in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if signals:
        raise KeyboardInterrupt


def give_back_memory() -> None:
    """Return what was freed to the system. glibc keeps it otherwise, up to 0.5 GB after a plan."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another system, or another C library
        ctypes.CDLL(None).malloc_trim(0)


def _failure(target: Target, graph: Path, errors: list[str]) -> InputError | MissingError:
    if any(word in message.lower() for message in errors for word in _SHORT_OF_MEMORY):
        return _memory_failure(target, graph, errors)
    return InputError(
        f"TensorRT cannot build this graph for {target.name}",
        where=f"{real_path(graph)}: {words(errors)}",
        fix="try another precision, a smaller capacity or fewer rows; if it fails again, report this graph",
    )


def _memory_failure(target: Target, graph: Path, errors: list[str]) -> MissingError:
    """The error for too little memory: of the GPU where the builder runs on the device, else of the host."""
    if target.builder == "tensorrt":
        free, total = call("cudaMemGetInfo")
        return MissingError(
            "The GPU has too little free memory to build this plan",
            where=f"{real_path(graph)}: free {free} of {total} bytes; {words(errors)}",
            fix="close other programs, or build with a smaller capacity or fewer rows",
        )
    weights = sum(path.stat().st_size for path in graph.parent.glob("*.data"))
    return MissingError(
        "This machine has too little memory to build this plan",
        where=f"{real_path(graph)}: expected about {HOST_RATIO} x the {weights} bytes of its weights, "
        f"got too little; {words(errors)}",
        fix="close other programs, raise the limit (ulimit -v), or export with a smaller --part-bytes",
    )
