"""The network that TensorRT parses from ONNX, checked against the manifest before anything is built.

A plan cannot be opened on a machine without a GPU, so the network is checked instead: the names, types and
shapes of its inputs and outputs, that a layer reads every input, and that every cache has one update layer,
from `past_key_values.*` to `present.*`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..bundle.files import read_regular
from ..bundle.held import real_path
from ..bundle.manifest import ComponentSpec, TensorSpec
from ..bundle.tensors import present_name
from ..errors import InputError, listed
from .module import log_of, words
from .onnx_axes import onnx_with_axis

GRAPH_LIMIT_BYTES = 1 << 30  # of a graph without its weights; 36 layers take 0.3 MB
CAPACITY = "C"  # the axis of the cache's slots
PLUGIN_SIDES = (7, 3)  # how many inputs and outputs KVCacheAttention has
_DTYPES = {
    "float32": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "int64": "INT64",
    "int32": "INT32",
    "bool": "BOOL",
}


def network_from_onnx(trt: Any, builder: Any, graph: Path, *, capacity_tokens: int | None) -> tuple[Any, Any]:
    """Parse `graph`, with caches of `capacity_tokens` slots, as a strongly typed network.

    The weights stay memory-mapped in their file beside the graph. Returns (network, parser); the parser owns
    memory that the network refers to, so keep it while building. Raises InputError with all of the parser's
    errors and the names of their nodes.
    """
    model = read_regular(graph, limit_bytes=GRAPH_LIMIT_BYTES, where="build")
    if capacity_tokens is not None:
        model = onnx_with_axis(model, symbol=CAPACITY, size=capacity_tokens, where=str(real_path(graph)))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log_of(trt))
    if not parser.parse(model, str(graph)):
        errors = [_parser_error(parser.get_error(i)) for i in range(parser.num_errors)]
        raise InputError(
            "TensorRT cannot read this graph",
            where=f"{real_path(graph)}: {words(errors)}",
            fix="export again with this version of star-export; if it fails again, report this graph",
        )
    return network, parser


def check_network(
    trt: Any, network: Any, spec: ComponentSpec, *, capacity_tokens: int | None, caches: int
) -> int:
    """Check that a parsed network agrees with the manifest's `spec` and updates `caches` caches in place.

    Returns the number of cache updates. Raises InputError listing the disagreements.
    """
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    wrong = _sides(trt, "input", spec.inputs, inputs, capacity_tokens)
    wrong += _sides(trt, "output", spec.outputs, outputs, capacity_tokens)
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    read = {
        tensor.name
        for layer in layers
        for tensor in map(layer.get_input, range(layer.num_inputs))
        if tensor is not None
    }
    wrong += [f"input {tensor.name}: no layer reads it" for tensor in inputs if tensor.name not in read]
    wrong += [
        f"input {tensor.name}: its values would shape the network"
        for tensor in inputs
        if tensor.is_shape_tensor
    ]
    pairs = [(layer.name, *pair) for layer in layers for pair in _updates(trt, layer)]
    wrong += [
        f"cache update {name}: {fault}"
        for name, past, present in pairs
        if (fault := _update_fault(past, present))
    ]
    if len(pairs) != caches:
        wrong.append(f"cache updates: expected {caches} (a key and a value per layer), got {len(pairs)}")
    if wrong:
        raise InputError(
            "TensorRT's network does not match the manifest",
            fix="export the bundle again",
            where=f"{spec.graph}: {listed(wrong)}",
        )
    return len(pairs)


def _sides(
    trt: Any, kind: str, expected: tuple[TensorSpec, ...], got: list, capacity_tokens: int | None
) -> list[str]:
    """What disagrees among all inputs, or all outputs. A network gives dynamic axes as -1."""
    names, found = [t.name for t in expected], {tensor.name: tensor for tensor in got}
    wrong = [f"{kind} {name}: missing" for name in names if name not in found]
    wrong += [f"{kind} {name}: extra" for name in found if name not in names]
    for spec in expected:
        if spec.name not in found:
            continue
        tensor, shape = found[spec.name], tuple(found[spec.name].shape)
        fixed = {CAPACITY: capacity_tokens}
        expected_shape = tuple(axis if isinstance(axis, int) else fixed.get(axis, -1) for axis in spec.shape)
        if tensor.dtype != getattr(trt.DataType, _DTYPES[spec.dtype]):
            wrong.append(f"{kind} {spec.name}: expected {spec.dtype}, got {tensor.dtype.name}")
        if shape != expected_shape:
            wrong.append(f"{kind} {spec.name}: expected shape {expected_shape}, got {shape}")
    return wrong


def _updates(trt: Any, layer: Any) -> list[tuple]:
    """The (past, present) tensors of every cache that `layer` updates.

    A native layer updates one cache, the plugin a key cache and a value cache.
    """
    if layer.type == getattr(trt.LayerType, "KV_CACHE_UPDATE", None):  # absent before TensorRT 10.15
        return [(layer.get_input(0), layer.get_output(0))]
    if (
        layer.type == getattr(trt.LayerType, "PLUGIN_V3", None)
        and (layer.num_inputs, layer.num_outputs) == PLUGIN_SIDES
    ):
        return [(layer.get_input(3), layer.get_output(1)), (layer.get_input(4), layer.get_output(2))]
    return []


def _update_fault(past: Any, present: Any) -> str | None:
    """Why a cache cannot be updated in place, or None.

    An update must lead from an input of the network to the output of the same cache.
    """
    if not past.is_network_input or not present.is_network_output:
        return f"expected from an input to an output of the network, got from {past.name} to {present.name}"
    if present_name(past.name) != present.name:
        return f"expected from {past.name} to {present_name(past.name)}, got to {present.name}"
    return None


def _parser_error(error: Any) -> str:
    inside = "".join(f", in {function}" for function in error.local_function_stack())
    return f"node {error.node_name()} ({error.node_operator()}{inside}): {' '.join(error.desc().split())}"
