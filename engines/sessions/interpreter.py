"""Sessions on the network that TensorRT parsed, evaluated in numpy: no GPU, and no word on the compiled kernels.

Buffers are numpy arrays. A bfloat16 one holds float32 numbers, rounded; `wide` computes in float32 throughout, with caches in
float32.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

import numpy as np

from ..bundle.bfloat16 import float32_from_bits
from ..bundle.manifest import ComponentSpec
from ..bundle.reader import Bundle
from ..bundle.tensors import check_array, check_binding, present_name
from ..errors import InputError
from ..interpreter import Network, describe_network, network_hash, parsed_from_network
from ..targets import target_from_name
from ..tensorrt.module import log_of, tensorrt_of
from ..tensorrt.network import check_network, network_from_onnx
from ..tensorrt.plan import plan_name, plan_spec, rebuild_command
from ..tensorrt.profiles import CAPACITY, largest, limits_from_options
from .onnxruntime import twin_spec


class ArrayBuffer:
    """Zeroed memory of the host. `array` holds a bfloat16 tensor as float32 numbers."""

    def __init__(self, shape: tuple[int, ...], dtype: str):
        self.shape, self.dtype = tuple(shape), dtype
        self.array = np.zeros(self.shape, "float32" if dtype == "bfloat16" else dtype)

    def write(self, array: np.ndarray) -> None:
        """Copy `array` in. Raises InputError unless shape, type and layout are the buffer's."""
        check_array(array, shape=self.shape, dtype=self.dtype)
        if self.dtype == "bfloat16":
            array = float32_from_bits(array.view(np.uint16))
        self.array[...] = array

    def read(self) -> np.ndarray:
        """The contents, as a view that the next step changes."""
        return self.array


class InterpreterSession:
    """One network. See `engines.sessions` for the protocol. `capacity_tokens` is that of the network's caches;
    `prefill_tokens` the most new positions that the plan takes, where there is one, `ranks` whether a layer ranks elements."""

    def __init__(self, network: Network, spec: ComponentSpec, *, prefill_tokens: int | None = None):
        self.spec = twin_spec(spec) if network.wide else spec
        self.capacity_tokens = next((t.shape[2] for t in network.inputs if present_name(t.name)), None)
        self.prefill_tokens = prefill_tokens
        self.ranks = any(layer.kind == "TOPK" for layer in network.parsed.layers)
        self._network: Network | None = network
        self._running = threading.Lock()

    def buffer(self, shape: tuple[int, ...], dtype: str) -> ArrayBuffer:
        """Zeroed memory."""
        return ArrayBuffer(shape, dtype)

    def bind(self, tensors: Mapping[str, ArrayBuffer]) -> Callable[[], None]:
        """A step on these buffers, caches under their past names only. Raises InputError for what does not fit."""
        network = self._open()
        check_binding(self.spec, tensors)
        for tensor in network.inputs:
            self._check(tensor, tensors[tensor.name])
        outputs = [(t.name, tensors[t.name].array) for t in self.spec.outputs if t.name in tensors]
        feeds = {t.name: tensors[t.name].array for t in self.spec.inputs}

        def step() -> None:
            if not self._running.acquire(blocking=False):
                raise InputError(
                    "This session is busy",
                    where=f"{self.spec.graph}: expected one thread at a time",
                    fix="open one per thread",
                )
            try:
                results = self._open().run(feeds)
                for name, array in outputs:
                    array[...] = results[name]
            finally:
                self._running.release()

        return step

    def close(self) -> None:
        """Give the memory back. Steps that were bound can no longer run."""
        self._network = None

    def _check(self, tensor, buffer: ArrayBuffer) -> None:
        if not isinstance(buffer, ArrayBuffer):
            raise InputError(
                "These buffers are another backend's",
                fix="make them with this session's buffer()",
                where=f"{self.spec.graph}: {tensor.name}: expected an ArrayBuffer, got {type(buffer).__name__}",
            )
        if any(size not in (-1, got) for size, got in zip(tensor.shape, buffer.shape)):
            raise InputError(
                "This network was not parsed for such shapes",
                fix="use the network's capacity",
                where=f"{self.spec.graph}: {tensor.name}: expected {tensor.shape}, got {buffer.shape}",
            )

    def _open(self) -> Network:
        if self._network is None:
            raise InputError(
                "This session is closed",
                where=f"{self.spec.graph}: expected an open session",
                fix="open it again",
            )
        return self._network


def open_session(
    bundle: Bundle, component: str, *, target: str, wide: bool = False, ties: str = "first"
) -> InterpreterSession:
    """Parse `component` as for `target` and read it back. With a plan there, the network must be the very one that it was built
    from.

    `wide` and `ties` as in `Network`. Raises UsageError, MissingError without the target's TensorRT, InputError for what
    cannot be read, or for a network other than the plan's.
    """
    parsed, prefill = parsed_component(bundle, component, target=target)
    return InterpreterSession(
        Network(parsed, wide=wide, ties=ties), bundle.component(component), prefill_tokens=prefill
    )


def describe_component(bundle: Bundle, component: str, *, target: str) -> dict:
    """What `inspect` shows of a component as TensorRT reads it for `target`: `describe_network`, and whether a plan was compiled
    from it.

    Needs the target's TensorRT, and no device. Errors as in `open_session`.
    """
    parsed, _ = parsed_component(bundle, component, target=target)
    plan = _plan(bundle, component, target)
    compiled = None if plan is None else "not recorded" if plan.network is None else "this network"
    return {"component": component, "target": target, "plan": compiled} | describe_network(parsed)


def parsed_component(bundle: Bundle, component: str, *, target: str):
    """(the network of `component` as TensorRT parses it for `target`, the plan's longest prefill or None); errors as in
    `open_session`."""
    row = target_from_name(target)
    trt, spec, caches = (
        tensorrt_of(row),
        bundle.component(component),
        bundle.manifest.model.cache.get(component),
    )
    plan = _plan(bundle, component, target)
    if plan is not None:
        capacity, prefill = (largest(plan.profiles, spec, axis=axis) for axis in (CAPACITY, "S"))
    else:
        capacity, prefill = (
            limits_from_options(bundle.manifest.model).capacity_tokens if caches else None,
            None,
        )
    with log_of(trt).collect():
        builder = trt.Builder(log_of(trt))
        network, parser = network_from_onnx(
            trt, builder, bundle.graph(component, dialect=row.dialect), capacity_tokens=capacity
        )
        check_network(trt, network, spec, capacity_tokens=capacity, caches=2 * caches.layers if caches else 0)
        parsed = parsed_from_network(trt, network, owner=(builder, parser))
    if plan is not None and plan.network is not None and (got := network_hash(parsed)) != plan.network:
        raise InputError(
            "This plan was compiled from another network",
            fix=rebuild_command(bundle, target),
            where=f"{component} for {target}: expected network {plan.network[:16]}..., got {got[:16]}...",
        )
    return parsed, prefill


def _plan(bundle: Bundle, component: str, target: str):
    """The record of the plan, or None where none was built: the network is read all the same."""
    bundle.component(component)
    return (
        plan_spec(bundle, target, component)[1]
        if (bundle.path / plan_name(target, component)).exists()
        else None
    )
