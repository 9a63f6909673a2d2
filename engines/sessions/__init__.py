"""Sessions: components loaded into an executor, behind one protocol.

A buffer may be bound to several sessions of one backend, as the output of one and the input of the next, so
nothing is copied. A cache is bound once, under its past name, and is updated in place.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Protocol, TypeVar

import numpy as np

from ..bundle.manifest import ComponentSpec
from ..bundle.reader import Bundle
from ..bundle.tensors import check_binding, present_name, shape_from_symbols
from ..errors import InputError, MissingError, UsageError
from ..fit import machine
from ..ranges import between
from ..targets import target_from_name

EXACT = "onnxruntime-exact"
ON_CPU = ("onnxruntime", EXACT)  # these differ only for int8 and int4 weights
ONE_PATH = ("fp8", "nvfp4")  # precisions that the CPU only checks, and multiplies in float32 throughout
UNTARGETED = (*ON_CPU, "onnxruntime-cuda")
TARGETED = ("tensorrt:", "interpreter:", "interpreter-fp32:")
BACKENDS = (*UNTARGETED, *(f"{prefix}TARGET" for prefix in TARGETED))
B = TypeVar("B")


class Buffer(Protocol):
    """Memory that a session computes on."""

    shape: tuple[int, ...]
    dtype: str

    def write(self, array: np.ndarray) -> None:
        """Copy `array` into the buffer. Raises InputError unless its shape, dtype and layout match."""

    def read(self) -> np.ndarray:
        """Return the contents: a view of host memory, or a copy of device memory.

        numpy has no bfloat16, so such values are returned as float32.
        """


class Session(Protocol):
    """One loaded component.

    `capacity_tokens` is the number of slots in its caches and `prefill_tokens` the most new positions of one
    step, where a plan or network fixes them; None where any number is allowed.
    """

    spec: ComponentSpec
    capacity_tokens: int | None
    prefill_tokens: int | None

    def buffer(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """Allocate a zeroed buffer for this session."""

    def bind(self, tensors: Mapping[str, Buffer]) -> Callable[[], None]:
        """Check `tensors` (name -> buffer) and return a step, which computes on them in place.

        A cache is given once, under its past name. Raises InputError with expected and got.
        """

    def close(self) -> None:
        """Release the component's memory. Bound steps can no longer run; buffers remain valid."""


def open_session(
    bundle: Bundle, component: str, *, backend: str = "onnxruntime", threads: int | None = None
) -> Session:
    """Load `component` of `bundle` on `backend`: all its parts in a chain, or the one part that is named.

    `onnxruntime` runs on the CPU, and multiplies int8 and int4 weights in int8 arithmetic;
    `onnxruntime-exact` multiplies them in float32. `onnxruntime-cuda` runs on a GPU; `tensorrt:TARGET` runs
    the target's plan. `interpreter:TARGET` evaluates on the CPU the network that TensorRT parsed, in the
    network's own dtypes, and `interpreter-fp32:TARGET` evaluates it in float32 throughout. On the CPU ONNX
    Runtime computes with as many `threads`, by default with one per core.

    Raises UsageError for an unknown backend, MissingError for a missing executor or device, and InputError
    for an invalid file.
    """
    check_backend(backend)
    check_threads(threads, backend=backend)
    if component in bundle.manifest.tables:
        from .table import TableSession

        return TableSession(bundle, component)
    if component not in bundle.manifest.components:
        from .chain import ChainSession

        return ChainSession(
            component,
            [*open_sessions(bundle, bundle.parts(component), backend=backend, threads=threads).values()],
        )
    if backend.startswith("tensorrt:"):
        from .tensorrt import open_session as open_tensorrt

        return open_tensorrt(bundle, component, target=backend.removeprefix("tensorrt:"))
    if backend.startswith("interpreter"):
        from .interpreter import open_session as open_interpreter

        kind, _, target = backend.partition(":")
        return open_interpreter(bundle, component, target=target, wide=kind == "interpreter-fp32")
    from .onnxruntime import OnnxRuntimeSession

    if backend == "onnxruntime-cuda":
        return OnnxRuntimeSession(bundle, component, device="cuda")
    return OnnxRuntimeSession(bundle, component, exact=backend == EXACT, threads=threads)


def open_sessions(
    bundle: Bundle, components: Sequence[str], *, backend: str, threads: int | None = None
) -> dict[str, Session]:
    """Load several components, as `open_session` does; on the CPU at once, since hashing and packing a
    component's weights keep one core busy, but one after the other where they are widened, which takes three
    times their wide size for a moment. Raises the error of the first one that fails, and closes the others.
    """
    if backend not in ON_CPU:
        return {name: open_session(bundle, name, backend=backend) for name in components}
    at_once = 1 if backend == EXACT else threads
    pool, loads = ThreadPoolExecutor(at_once), dict[str, Future[Session]]()
    try:
        for name in components:
            loads[name] = pool.submit(open_session, bundle, name, backend=backend, threads=threads)
        return {name: load.result() for name, load in loads.items()}
    except BaseException:  # an interruption too: ONNX Runtime must not load while the process ends
        pool.shutdown(cancel_futures=True)
        for load in loads.values():
            if not load.cancelled() and load.exception() is None:
                load.result().close()
        raise
    finally:
        pool.shutdown()


def open_in_turn(bundle: Bundle, component: str, *, backend: str, threads: int | None = None) -> Session:
    """A component in parts whose parts are loaded one after the other while a step runs; nothing is loaded
    before. Raises what `open_session` does, some of it when a step runs."""
    from .chain import TurnsSession

    check_backend(backend)
    check_threads(threads, backend=backend)
    names = bundle.parts(component)
    return TurnsSession(
        component,
        [bundle.component(name) for name in names],
        lambda i: open_session(bundle, names[i], backend=backend, threads=threads),
    )


def plan_capacity(bundle: Bundle, graph: str, *, backend: str) -> int | None:
    """The slots that the plan of a graph has in its caches, from the plan's record: nothing is loaded.

    None for a backend without plans, and for a graph without caches. Raises UsageError for an unknown
    target, InputError without a plan.
    """
    from ..tensorrt.profiles import CAPACITY

    return _plan_limit(bundle, graph, backend=backend, axis=CAPACITY)


def plan_rows(bundle: Bundle, graph: str, *, backend: str) -> int | None:
    """The largest batch of the plan of a graph, in rows, found and refused as its capacity is."""
    return _plan_limit(bundle, graph, backend=backend, axis="B")


def _plan_limit(bundle: Bundle, graph: str, *, backend: str, axis: str) -> int | None:
    if not backend.startswith("tensorrt:"):
        return None
    from ..tensorrt.plan import plan_spec
    from ..tensorrt.profiles import largest

    target = target_from_name(backend.removeprefix("tensorrt:"))
    _, plan = plan_spec(bundle, target.name, graph)
    return largest(plan.profiles, bundle.component(graph), axis=axis)


def free_memory(backend: str) -> int | None:
    """Bytes of memory that are free where `backend` computes; None if that cannot be found out."""
    if backend in ON_CPU:
        return machine.free_memory()
    if backend.startswith("interpreter"):  # it keeps nothing but what it reads
        return None
    from ..tensorrt.device import call

    try:
        free, _ = call("cudaMemGetInfo")
    except MissingError:  # opening a session says what is missing
        return None
    return int(free)


def check_backend(backend: str) -> None:
    """Raise UsageError with the valid names unless `backend` is one of them."""
    targeted = any(backend.startswith(prefix) and backend != prefix for prefix in TARGETED)
    if backend not in UNTARGETED and not targeted:
        raise UsageError(
            "No such backend",
            where=f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}",
            fix="use onnxruntime, or a target that the bundle was built for: tensorrt:TARGET",
        )


def check_threads(threads: int | None, *, backend: str) -> None:
    """Raise UsageError unless this machine has so many processors, and `backend` computes on them."""
    if threads is None:
        return
    between("threads", threads, os.cpu_count() or 1)
    if backend not in ON_CPU:
        raise UsageError(
            "This backend has no number of threads",
            where=f"threads: expected the backend {' or '.join(ON_CPU)} beside it, got {backend}",
            fix="omit it, or choose one of these backends",
        )


def run(session: Session, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run a component without caches once: all inputs by name -> all outputs by name.

    Raises InputError when the feeds do not match its inputs.
    """
    symbols = check_binding(replace(session.spec, outputs=()), feeds)
    buffers = {t.name: session.buffer(feeds[t.name].shape, t.dtype) for t in session.spec.inputs}
    for name, buffer in buffers.items():
        buffer.write(feeds[name])
    outputs = {
        t.name: session.buffer(shape_from_symbols(t.shape, symbols), t.dtype)
        for t in session.spec.outputs
        if t.name not in {present_name(name) for name in feeds}
    }
    session.bind(buffers | outputs)()
    return {name: buffer.read() for name, buffer in outputs.items()}


def own_buffers(tensors: Mapping[str, Buffer], kind: type[B], *, where: str) -> dict[str, B]:
    """Return `tensors` as buffers of class `kind`. Raises InputError for another backend's buffer."""
    own: dict[str, B] = {}
    for name, buffer in tensors.items():
        if not isinstance(buffer, kind):
            raise InputError(
                "This buffer belongs to another backend",
                where=f"{where}: {name}: expected {kind.__name__}, got {type(buffer).__name__}",
                fix="allocate it with this session's buffer()",
            )
        own[name] = buffer
    return own


def busy(where: str) -> InputError:
    """The error for a step that is called while another step of its session runs."""
    return InputError(
        "This session is in use by another thread",
        where=f"{where}: expected one thread at a time, got a second call while a step was running",
        fix="open one session per thread",
    )


def closed(where: str) -> InputError:
    """The error for using a session after `close`."""
    return InputError(
        "This session is closed",
        where=f"{where}: expected an open session, got a closed one",
        fix="open the session again",
    )
