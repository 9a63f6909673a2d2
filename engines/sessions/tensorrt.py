"""Sessions on TensorRT engines: device memory, one stream, steps bound once and run many times.

A step only enqueues work; the host waits only when it reads a buffer. Each optimisation profile has one
execution context. The contexts of a session share one block of working memory, because the stream runs one of
them at a time. A cache is updated in place: `past_key_values.*` and `present.*` are bound to the same
address.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from .. import plugins
from ..bundle.bfloat16 import float32_from_bits
from ..bundle.manifest import ComponentSpec
from ..bundle.reader import Bundle
from ..bundle.tensors import ITEM_BYTES, check_array, check_binding, present_name, shape_from_symbols
from ..errors import InputError
from ..targets import target_from_name
from ..tensorrt import device
from ..tensorrt.module import log_of, tensorrt_of, words
from ..tensorrt.plan import read_plan
from ..tensorrt.profiles import CAPACITY, Profile, fits, largest
from ..tensorrt.trial import try_plan
from . import Buffer, busy, closed, own_buffers


class DeviceBuffer:
    """A tensor in device memory, zeroed. The memory is released with the object."""

    def __init__(self, shape: tuple[int, ...], dtype: str):
        self.shape, self.dtype = tuple(shape), dtype
        self.size_bytes = math.prod(self.shape) * ITEM_BYTES[dtype]
        self.address = device.allocate(max(self.size_bytes, 1))
        self._free = weakref.finalize(self, device.release, self.address)

    def write(self, array: np.ndarray) -> None:
        """Enqueue a copy of `array` to the device.

        Raises InputError unless its shape, dtype and layout match.
        """
        check_array(array, shape=self.shape, dtype=self.dtype)
        device.copy_to_device(self.address, array)

    def read(self) -> np.ndarray:
        """Wait for all enqueued work and copy the contents to the host.

        numpy has no bfloat16, so such values are returned as float32.
        """
        if self.dtype != "bfloat16":
            array = np.empty(self.shape, self.dtype)
            device.copy_to_host(array, self.address)
            plugins.check_overflow()
            return array
        bits = np.empty(self.shape, np.uint16)
        device.copy_to_host(bits, self.address)
        plugins.check_overflow()
        return float32_from_bits(bits)

    def close(self) -> None:
        """Release the memory now."""
        self._free()


def open_session(bundle: Bundle, component: str, *, target: str) -> TensorRTSession:
    """Open the plan of a component for `target`.

    Raises UsageError for an unknown target, InputError for a plan that cannot be used here, and MissingError
    without TensorRT, driver or GPU.
    """
    row = target_from_name(target)
    plan, data = read_plan(bundle, row, component)
    try_plan(bundle, row, component, data)
    trt = tensorrt_of(row)
    with log_of(trt).collect() as errors:
        runtime = trt.Runtime(log_of(trt))
        engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise InputError(
            "TensorRT cannot load this plan",
            where=f"{component} for {target}: {words(errors)}",
            fix=f"rebuild: star-export build {bundle.path} --target {target}",
        )
    return TensorRTSession(trt, engine, bundle.component(component), plan.profiles, keep=runtime)


class TensorRTSession:
    """One engine. `engines.sessions.Session` is its protocol.

    `capacity_tokens` is the capacity of its caches, which the plan fixes (None without caches).
    `prefill_tokens` is the most new positions of one step (None when the component has no such axis).
    """

    def __init__(
        self, trt, engine, spec: ComponentSpec, profiles: tuple[Profile, ...], *, keep: object = None
    ):
        check_engine(engine, spec, profiles)
        self.spec = spec
        self.capacity_tokens = largest(profiles, spec, axis=CAPACITY)
        self.prefill_tokens = largest(profiles, spec, axis="S")
        self._trt, self._engine, self._profiles, self._keep = trt, engine, profiles, keep
        self._workspace = DeviceBuffer((max(engine.device_memory_size_v2, 256),), "bool")
        self._contexts: dict[int, _Context] = {}
        self._last: _Context | None = None  # the one that ran last
        self._lock = threading.Lock()
        self.closed = False

    def buffer(self, shape: tuple[int, ...], dtype: str) -> DeviceBuffer:
        """Allocate zeroed device memory."""
        return DeviceBuffer(shape, dtype)

    def bind(self, tensors: Mapping[str, Buffer]) -> Callable[[], None]:
        """Check `tensors` against the spec and the plan's profiles, and return the step that computes on
        them.

        Raises InputError with expected and got.
        """
        self._check_open()
        symbols = check_binding(self.spec, tensors)
        buffers = own_buffers(tensors, DeviceBuffer, where=self.spec.graph)
        shapes = {t.name: buffers[t.name].shape for t in self.spec.inputs}
        index = choose_profile(self._profiles, shapes, where=self.spec.graph)
        if index not in self._contexts:
            self._contexts[index] = _Context(self._trt, self._engine, index, self._workspace)
        context = self._contexts[index]
        addresses = {name: buffer.address for name, buffer in buffers.items()}
        addresses |= {present: addresses[name] for name in buffers if (present := present_name(name))}
        outputs = {t.name: shape_from_symbols(t.shape, symbols) for t in self.spec.outputs}
        binding = _Binding(shapes, addresses, outputs, tuple(buffers.values()))
        context.apply(binding, where=self.spec.graph)
        return self._step(context, binding)

    def close(self) -> None:
        """Wait for enqueued work, then release the engine and its working memory. Buffers remain valid."""
        if not self.closed:
            self.closed = True
            device.synchronize()
            for context in self._contexts.values():
                context.trt_context = context.bound = None  # bound steps still refer to the context
            self._contexts.clear()
            self._last = None
            self._engine = self._keep = None
            self._workspace.close()

    def capturable(self) -> bool:
        """Whether TensorRT can run again, in a capture of the stream, the step that ran last. True where it
        does not say, as before TensorRT for RTX 1.2; a capture then shows it.
        """
        asked = getattr(self._last and self._last.trt_context, "is_stream_capturable", None)
        return asked is None or bool(asked(device.stream()))

    def _step(self, context: _Context, binding: _Binding) -> Callable[[], None]:
        stream, lock, where = device.stream(), self._lock, self.spec.graph

        def step() -> None:
            if not lock.acquire(blocking=False):
                raise busy(where)
            try:
                self._check_open()
                if context.bound is not binding:
                    context.apply(binding, where=where)
                self._last = context
                device.counts["launches"] += 1
                if not context.trt_context.execute_async_v3(stream):
                    raise RuntimeError(f"{where}: TensorRT could not enqueue this step")
            finally:
                lock.release()

        return step

    def _check_open(self) -> None:
        if self.closed:
            raise closed(self.spec.graph)


@dataclass(frozen=True, eq=False)
class _Binding:
    """Shapes of the inputs, addresses of all tensors and expected shapes of the outputs.

    Keeps `buffers` alive.
    """

    shapes: Mapping[str, tuple[int, ...]]
    addresses: Mapping[str, int]
    outputs: Mapping[str, tuple[int, ...]]
    buffers: tuple[DeviceBuffer, ...]


class _Context:
    """The execution context of one profile, and its current binding."""

    def __init__(self, trt, engine, index: int, workspace: DeviceBuffer):
        self.trt_context = engine.create_execution_context(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        self.bound: _Binding | None = None
        _check(self.trt_context is not None, "create_execution_context")
        self.trt_context.set_device_memory(workspace.address, workspace.size_bytes)
        _check(
            self.trt_context.set_optimization_profile_async(index, device.stream()),
            f"set_optimization_profile_async {index}",
        )

    def apply(self, binding: _Binding, *, where: str) -> None:
        """Bind shapes and addresses. Raises InputError when TensorRT infers other output shapes."""
        context, self.bound = self.trt_context, None
        for name, shape in binding.shapes.items():
            _check(context.set_input_shape(name, shape), f"set_input_shape({name}, {shape})")
        for name, address in binding.addresses.items():
            _check(context.set_tensor_address(name, address), f"set_tensor_address({name})")
        for name, shape in binding.outputs.items():
            if (got := tuple(context.get_tensor_shape(name))) != shape:
                raise InputError(
                    "The plan computes another output shape",
                    where=f"{where}: {name}: expected {shape}, got {got}",
                    fix="build the plan again",
                )
        self.bound = binding


def choose_profile(
    profiles: tuple[Profile, ...], shapes: Mapping[str, tuple[int, ...]], *, where: str
) -> int:
    """Index of the narrowest profile that fits `shapes` (of all inputs).

    Raises InputError with the input that fits no profile.
    """
    fitting = [i for i, profile in enumerate(profiles) if fits(profile, shapes)]
    if fitting:
        return min(fitting, key=lambda i: sum(math.prod(r.max) for r in profiles[i].inputs.values()))
    name = next(
        (n for n, shape in shapes.items() if not any(_fits_one(p, n, shape) for p in profiles)),
        next(iter(shapes)),
    )
    ranges = " or ".join(f"{p.inputs[name].min} to {p.inputs[name].max} ({p.name})" for p in profiles)
    raise InputError(
        "The plan was built for other shapes",
        where=f"{where}: {name}: expected {ranges}, got {shapes[name]}",
        fix="use smaller inputs and the plan's capacity, or build with another --rows or capacity",
    )


def check_engine(engine, spec: ComponentSpec, profiles: tuple[Profile, ...]) -> None:
    """Raise InputError unless the engine has the manifest's inputs and outputs and the recorded profiles."""
    names = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
    expected = {t.name for t in spec.inputs + spec.outputs}
    if names != expected or engine.num_optimization_profiles != len(profiles):
        differ = ", ".join(sorted(names ^ expected)) or "none"
        raise InputError(
            "This plan differs from its record",
            where=f"{spec.graph}: expected its inputs and outputs and {len(profiles)} profiles, "
            f"got differences in: {differ}; {engine.num_optimization_profiles} profiles",
            fix="build the plan again",
        )


def _fits_one(profile: Profile, name: str, shape: tuple[int, ...]) -> bool:
    r = profile.inputs[name]
    return all(low <= size <= high for low, size, high in zip(r.min, shape, r.max))


def _check(done: bool, what: str) -> None:
    if not done:
        raise RuntimeError(f"TensorRT refused {what}")
