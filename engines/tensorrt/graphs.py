"""CUDA graphs: work of the process's stream, captured once and launched many times.

A graph repeats what was enqueued with the addresses and shapes of that time. TensorRT must have run the same
work once before, and nothing may be allocated, copied from the host or waited for meanwhile.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from ..errors import MissingError
from . import device, nvrtc


class Graph:
    """An executable graph."""

    def __init__(self, graph: Any):
        """Take `graph` over. Raises RuntimeError for nodes that it may not hold."""
        try:
            self._executable = device.driver_call("cuGraphInstantiate", graph, 0)
        finally:
            device.driver_call("cuGraphDestroy", graph)

    def launch(self) -> None:
        """Enqueue the whole graph on the process's stream."""
        device.counts["launches"] += 1
        device.driver_call("cuGraphLaunch", self._executable, device.stream())

    def close(self) -> None:
        """Wait for its last launch, and release it."""
        device.synchronize()
        device.driver_call("cuGraphExecDestroy", self._executable)


def graph_of(work: Callable[[], None]) -> Graph:
    """A graph of what `work` enqueues. Raises RuntimeError where that cannot be captured."""
    device.driver_call("cuStreamBeginCapture", device.stream(), _mode())
    return Graph(_captured(work))


def while_graph_of(work: Callable[[int], None]) -> Graph:
    """A graph that repeats, at least once, what `work(condition)` enqueues until a kernel in it sets the
    condition to 0. Raises RuntimeError where that cannot be captured.
    """
    driver = device.driver()
    graph = device.driver_call("cuGraphCreate", 0)
    try:
        context = device.driver_call("cuCtxGetCurrent")
        assigned = driver.CU_GRAPH_COND_ASSIGN_DEFAULT
        condition = device.driver_call("cuGraphConditionalHandleCreate", graph, context, 1, assigned)
        node = driver.CUgraphNodeParams()
        node.type = driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL
        node.conditional.handle = condition
        node.conditional.type = driver.CUgraphConditionalNodeType.CU_GRAPH_COND_TYPE_WHILE
        node.conditional.size = 1
        node.conditional.ctx = context
        edges = (None, None) if device.runtime_version() >= 13000 else (None,)
        device.driver_call("cuGraphAddNode", graph, *edges, 0, node)
        body = node.conditional.phGraph_out[0]
        device.driver_call("cuStreamBeginCaptureToGraph", device.stream(), body, None, None, 0, _mode())
        _captured(lambda: work(int(condition)))
    except BaseException:
        device.driver_call("cuGraphDestroy", graph)
        raise
    return Graph(graph)


def while_refusal() -> str | None:
    """Why this machine has no WHILE nodes, on one line; None where it has them."""
    needed = ".".join(map(str, nvrtc.WHILE_VERSION))
    if nvrtc.nvrtc_version() < nvrtc.WHILE_VERSION:
        return f"NVRTC is of CUDA {'.'.join(map(str, nvrtc.nvrtc_version()))}, and WHILE nodes need {needed}"
    if not hasattr(device.driver(), "cuGraphConditionalHandleCreate"):
        return f"cuda-python is older than CUDA {needed}, which WHILE nodes need"
    version = device.driver_version()
    if version is None or tuple(map(int, version.split("."))) < nvrtc.WHILE_VERSION:
        return f"the driver is for CUDA {version}, and WHILE nodes need {needed}"
    return None


def loop_facts() -> str:
    """How this machine runs the image-token loop of TensorRT plans, on one line."""
    try:
        refusal = while_refusal()
    except MissingError as error:
        return f"on the host: {error.what} ({error.where})"
    if refusal:
        return f"on the device, one CUDA graph per step ({refusal})"
    return "on the device, one CUDA graph per step, or per image with several tokens per step"


def _captured(work: Callable[[], None]) -> Any:
    """End the capture that was begun, after `work`, and return its graph."""
    try:
        work()
    except BaseException:
        with contextlib.suppress(RuntimeError):  # the capture is invalid; ending it gives the stream back
            device.driver_call("cuStreamEndCapture", device.stream())
        raise
    return device.driver_call("cuStreamEndCapture", device.stream())


def _mode() -> Any:
    """Only what this thread does can spoil the capture."""
    return device.driver().CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
