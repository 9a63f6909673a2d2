"""Sessions: components loaded into an executor. One protocol, whatever the executor.

A buffer may be bound to several sessions of one backend, as output of one and input of the next: nothing is copied. A cache is bound
once, under its past name, and is updated in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Protocol

import numpy as np

from ..bundle.manifest import ComponentSpec
from ..bundle.reader import Bundle
from ..bundle.tensors import check_binding, present_name, shape_from_symbols
from ..errors import UsageError

BACKENDS = (
    "onnxruntime",
    "onnxruntime-cuda",
    "tensorrt:TARGET",
    "interpreter:TARGET",
    "interpreter-fp32:TARGET",
)
TARGETED = ("tensorrt:", "interpreter:", "interpreter-fp32:")


class Buffer(Protocol):
    """Memory where a session computes."""

    shape: tuple[int, ...]
    dtype: str

    def write(self, array: np.ndarray) -> None:
        """Copy `array` in. Raises InputError unless its shape, type and layout are the buffer's."""

    def read(self) -> np.ndarray:
        """The contents; bfloat16 comes as float32. A view where the memory is the host's, else a copy."""


class Session(Protocol):
    """One component. `capacity_tokens` (slots of its caches) and `prefill_tokens` (most new positions of a step) are what was fixed when it
    was built; None where any number will do."""

    spec: ComponentSpec
    capacity_tokens: int | None
    prefill_tokens: int | None

    def buffer(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """Zeroed memory where this session computes."""

    def bind(self, tensors: Mapping[str, Buffer]) -> Callable[[], None]:
        """A step that runs once on the buffers in `tensors` (name -> buffer), reading and writing in place. Raises InputError."""

    def close(self) -> None:
        """Give the memory back. Steps that were bound can no longer run."""


def open_session(bundle: Bundle, component: str, *, backend: str = "onnxruntime") -> Session:
    """Load `component` of `bundle`. Backends: `onnxruntime` (CPU), `onnxruntime-cuda`, `tensorrt:<target>`, and `interpreter:<target>`: the
    network that TensorRT parsed, evaluated on the CPU in its own types, or with `interpreter-fp32:` in float32 throughout.

    Raises UsageError for another name, MissingError where the executor or device is absent, InputError for a bad file.
    """
    check_backend(backend)
    if backend.startswith("tensorrt:"):
        from .tensorrt import open_session as open_tensorrt

        return open_tensorrt(bundle, component, target=backend.removeprefix("tensorrt:"))
    if backend.startswith("interpreter"):
        from .interpreter import open_session as open_interpreter

        kind, _, target = backend.partition(":")
        return open_interpreter(bundle, component, target=target, wide=kind == "interpreter-fp32")
    from .onnxruntime import OnnxRuntimeSession

    return OnnxRuntimeSession(bundle, component, device="cuda" if backend.endswith("-cuda") else "cpu")


def check_backend(backend: str) -> None:
    """Refuse a name that is no backend. Raises UsageError listing them."""
    if backend not in BACKENDS[:2] and not any(
        backend.startswith(prefix) and backend != prefix for prefix in TARGETED
    ):
        raise UsageError(
            "No such backend",
            where=f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}",
            fix="use onnxruntime, or a target that the bundle was built for: tensorrt:TARGET",
        )


def run(session: Session, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One call of a component without caches: all inputs by name -> all outputs by name. Raises InputError for feeds that do not fit."""
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
