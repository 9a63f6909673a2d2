"""What a bisection compares with the reference: a graph on ONNX Runtime, or the network that TensorRT parsed.

Both run in float32, and give the tensors inside that the reference has, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from engines.bundle.reader import Bundle
from engines.bundle.tensors import present_name
from engines.errors import InputError
from engines.interpreter import Network
from engines.sessions.interpreter import parsed_component
from engines.sessions.onnxruntime import LOG_SEVERITY, weights_in_memory

from ..golden.cases import Tensors
from ..graph.modules import MODULE
from ..graph.nvfp4 import OF_ROWS, ROUNDED


@dataclass(frozen=True)
class Node:
    """A node of a graph or a layer of a network: the tensors that it `reads` and `makes`."""

    name: str
    op: str
    reads: tuple[str, ...]
    makes: tuple[str, ...]


@dataclass(frozen=True)
class Candidate:
    """What computes: its nodes in order, and `run`, which maps feeds to the outputs and to tensors inside.

    `capacity_tokens` is the capacity of a network's caches, or None for a graph, which takes any.
    """

    backend: str
    nodes: tuple[Node, ...]
    run: Callable[[Tensors], Tensors]
    capacity_tokens: int | None = None


def modules_from_graph(path: Path) -> dict[str, str]:
    """Tensor of a graph -> its name in the reference. Raises InputError for a graph without such names."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    found = {
        value.name: entry.value
        for value in (*graph.value_info, *graph.output)
        for entry in value.metadata_props
        if entry.key == MODULE
    }
    if not found:
        raise InputError(
            "This graph does not say which module each tensor comes from",
            where=f"{path}: expected values with the metadata `{MODULE}`, got none",
            fix="export the bundle again with this version of star-export",
        )
    return found


def _wanted(modules: Iterable[str]) -> Iterable[str]:
    """The tensors that the reference has, and of those that are rounded to nvfp4 what becomes of them."""
    for tensor in modules:
        yield from (tensor, f"{tensor}{OF_ROWS}", f"{tensor}{ROUNDED}")


def candidate_from_graph(path: Path) -> Candidate:
    """The graph at `path` on ONNX Runtime, with every tensor that the reference has marked as an output."""
    import onnx
    import onnxruntime
    from polygraphy.backend.onnx import ModifyOutputs
    from polygraphy.backend.onnxrt import OnnxrtRunner
    from polygraphy.logger import G_LOGGER

    model = onnx.load(path, load_external_data=False)
    nodes = tuple(Node(n.name, n.op_type, tuple(n.input), tuple(n.output)) for n in model.graph.node)
    made = {tensor for node in nodes for tensor in node.makes}
    inside = [tensor for tensor in _wanted(modules_from_graph(path)) if tensor in made]
    marked = list(dict.fromkeys([*inside, *(output.name for output in model.graph.output)]))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = LOG_SEVERITY
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # float32
    entries = (entry for tensor in model.graph.initializer for entry in tensor.external_data)
    files = dict.fromkeys(entry.value for entry in entries if entry.key == "location")
    held = weights_in_memory(options, [path.with_name(name) for name in files])
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        model = ModifyOutputs(model, outputs=marked)()
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    del held
    given = {value.name for value in session.get_inputs()}

    def run(feeds: Tensors) -> Tensors:
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL), OnnxrtRunner(session) as runner:
            return dict(runner.infer({key: array for key, array in feeds.items() if key in given}))

    return Candidate("onnxruntime-exact", nodes, run)


def candidate_from_network(bundle: Bundle, name: str, target: str) -> Candidate:
    """The network that the TensorRT of `target` parses, evaluated in numpy in float32.

    Raises the errors of `engines.sessions.interpreter.open_session`.
    """
    parsed, _ = parsed_component(bundle, name, target=target)
    inner = {tensor.name: tensor for layer in parsed.layers for tensor in layer.outputs}
    modules = modules_from_graph(bundle.graph(name))
    outputs = {tensor.name: tensor for tensor in parsed.outputs}
    outputs |= {tensor: inner[tensor] for tensor in _wanted(modules) if tensor in inner}
    network = Network(dataclasses.replace(parsed, outputs=tuple(outputs.values())), wide=True)
    nodes = tuple(
        Node(
            layer.name,
            layer.kind,
            tuple(tensor.name for tensor in layer.inputs if tensor is not None),
            tuple(tensor.name for tensor in layer.outputs),
        )
        for layer in parsed.layers
    )
    capacity = next((t.shape[2] for t in parsed.inputs if present_name(t.name)), None)
    return Candidate(f"interpreter-fp32:{target}", nodes, network.run, capacity)
