"""Sessions that evaluate in numpy the network that TensorRT parsed.

They need no GPU, and say nothing about the compiled kernels. Buffers are numpy arrays; a bfloat16 buffer
holds rounded float32 values. `wide` computes in float32 throughout, with caches in float32.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from ..bundle.manifest import ComponentSpec
from ..bundle.reader import Bundle
from ..bundle.tensors import check_binding, present_name
from ..errors import InputError
from ..interpreter import Network, describe_network, network_hash, parsed_from_network
from ..interpreter.parsed import Parsed
from ..targets import target_from_name
from ..tensorrt.module import log_of, tensorrt_of
from ..tensorrt.network import check_network, network_from_onnx
from ..tensorrt.plan import plan_name, plan_spec, rebuild_command
from ..tensorrt.profiles import CAPACITY, largest, limits_from_options
from . import Buffer, busy, closed, own_buffers
from .array_buffer import ArrayBuffer
from .onnxruntime import twin_spec


class InterpreterSession:
    """One parsed network. `engines.sessions.Session` is its protocol.

    `capacity_tokens` is the capacity of the network's caches. `prefill_tokens` is the most new positions that
    the plan accepts, or None without a plan. `ranks` tells whether a layer ranks elements (TopK).
    """

    def __init__(self, network: Network, spec: ComponentSpec, *, prefill_tokens: int | None = None):
        self.spec = twin_spec(spec) if network.wide else spec
        self.capacity_tokens = next((t.shape[2] for t in network.inputs if present_name(t.name)), None)
        self.prefill_tokens = prefill_tokens
        self.ranks = any(layer.kind == "TOPK" for layer in network.parsed.layers)
        self._network: Network | None = network
        self._running = threading.Lock()

    def buffer(self, shape: tuple[int, ...], dtype: str) -> ArrayBuffer:
        """Allocate a zeroed buffer."""
        return ArrayBuffer(shape, dtype)

    def bind(self, tensors: Mapping[str, Buffer]) -> Callable[[], None]:
        """Check `tensors` and return a step, which computes on them in place. Raises InputError."""
        network = self._open()
        check_binding(self.spec, tensors)
        buffers = own_buffers(tensors, ArrayBuffer, where=self.spec.graph)
        for tensor in network.inputs:
            self._check_shape(tensor, buffers[tensor.name].shape)
        outputs = [(t.name, buffers[t.name].array) for t in self.spec.outputs if t.name in buffers]
        feeds = {t.name: buffers[t.name].array for t in self.spec.inputs}

        def step() -> None:
            if not self._running.acquire(blocking=False):
                raise busy(self.spec.graph)
            try:
                results = self._open().run(feeds)
                for name, array in outputs:
                    array[...] = results[name]
            finally:
                self._running.release()

        return step

    def close(self) -> None:
        """Release the network. Bound steps can no longer run."""
        self._network = None

    def _check_shape(self, tensor, shape: tuple[int, ...]) -> None:
        if any(size not in (-1, got) for size, got in zip(tensor.shape, shape)):
            raise InputError(
                "The network was parsed for other shapes",
                where=f"{self.spec.graph}: {tensor.name}: expected {tensor.shape}, got {shape}",
                fix="allocate the caches with the session's capacity_tokens",
            )

    def _open(self) -> Network:
        if self._network is None:
            raise closed(self.spec.graph)
        return self._network


def open_session(
    bundle: Bundle, component: str, *, target: str, wide: bool = False, ties: str = "first"
) -> InterpreterSession:
    """Parse `component` with the TensorRT of `target`, for evaluation in numpy.

    Where the bundle has a plan, the network must be the one that the plan was compiled from. `wide` and
    `ties` are those of `Network`. Raises UsageError for an unknown target, MissingError without the target's
    TensorRT, and InputError for a graph that cannot be interpreted or differs from the plan's network.
    """
    parsed, prefill = parsed_component(bundle, component, target=target)
    return InterpreterSession(
        Network(parsed, wide=wide, ties=ties), bundle.component(component), prefill_tokens=prefill
    )


def describe_component(bundle: Bundle, component: str, *, target: str) -> dict:
    """Describe the network that TensorRT parses for `target`, as the verb `inspect` shows it.

    The entry `plan` tells whether a plan was compiled from this network. Needs the target's TensorRT but no
    device. Raises the errors of `open_session`.
    """
    parsed, _ = parsed_component(bundle, component, target=target)
    plan = _plan(bundle, component, target)
    compiled = None if plan is None else "not recorded" if plan.network is None else "this network"
    return {"component": component, "target": target, "plan": compiled} | describe_network(parsed)


def parsed_component(bundle: Bundle, component: str, *, target: str) -> tuple[Parsed, int | None]:
    """Parse `component` with the TensorRT of `target`.

    Returns the network and the longest prefill of the plan, or None without a plan. Raises the errors of
    `open_session`.
    """
    row = target_from_name(target)
    trt, spec = tensorrt_of(row), bundle.component(component)
    caches = sum(present_name(t.name) is not None for t in spec.inputs)
    plan = _plan(bundle, component, target)
    capacity: int | None = None
    prefill: int | None = None
    if plan is not None:
        capacity, prefill = (largest(plan.profiles, spec, axis=axis) for axis in (CAPACITY, "S"))
    elif caches:
        capacity = limits_from_options(bundle.manifest.model).capacity_tokens
    with log_of(trt).collect(), bundle.loading(component, dialect=row.dialect) as graph:
        builder = trt.Builder(log_of(trt))
        network, parser = network_from_onnx(trt, builder, graph, capacity_tokens=capacity)
        check_network(trt, network, spec, capacity_tokens=capacity, caches=caches)
        parsed = parsed_from_network(trt, network, owner=(builder, parser))
    if plan is not None and plan.network is not None and (got := network_hash(parsed)) != plan.network:
        raise InputError(
            "This plan was compiled from another network",
            where=f"{component} for {target}: expected network {plan.network[:16]}..., got {got[:16]}...",
            fix=rebuild_command(bundle, target),
        )
    return parsed, prefill


def _plan(bundle: Bundle, component: str, target: str):
    """The record of the plan, or None where none was built: a network can be interpreted without a plan."""
    if not (bundle.path / plan_name(target, component)).exists():
        return None
    return plan_spec(bundle, target, component)[1]
