"""Which provider of ONNX Runtime takes each operator of our graphs, found by loading it alone, and where
whole graphs are placed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import onnx_ir as ir

from .ort_decode import PROVIDERS, onnxruntime_with_libraries, open_session

NOWHERE = "nowhere"


def operators_of(model: ir.Model) -> dict[str, onnx.ModelProto]:
    """`Operator-version (types of its inputs)` -> a model of one such node, for every kind of node in a graph
    and its functions.

    Values keep their types and ranks; constants that the graph holds stay constants, because some kernels
    want them so.
    """
    found: dict[str, onnx.ModelProto] = {}
    opset = model.opset_imports[""]
    nodes = [node for node in model.graph if (node.domain, node.op_type, "") not in model.functions]
    types = {value: value.type for node in model.graph for value in node.outputs}
    inlined = [
        _inlined(model, node, types)
        for node in model.graph
        if (node.domain, node.op_type, "") in model.functions
    ][:1]
    for node, inputs in [(n, list(n.inputs)) for n in nodes] + [pair for pairs in inlined for pair in pairs]:
        kinds = [
            value.dtype.name.lower() if value is not None and value.dtype is not None else "-"
            for value in inputs
        ]
        version = (
            onnx.defs.get_schema(node.op_type, opset, node.domain).since_version if node.domain == "" else 1
        )
        found.setdefault(f"{node.op_type}-{version} ({', '.join(kinds)})", None)
        name = f"{node.op_type}-{version} ({', '.join(kinds)})"
        if found[name] is None:
            found[name] = _alone(node, inputs, opset)
    return found


def _inlined(model: ir.Model, call: ir.Node, types: dict) -> list[tuple[ir.Node, list[ir.Value | None]]]:
    """The nodes of a function with the values that they would read where it is called."""
    function = model.functions[(call.domain, call.op_type, "")]
    actual = dict(zip(function.inputs, call.inputs))
    actual |= dict(zip(function.outputs, call.outputs))
    return [(node, [actual.get(value, value) for value in node.inputs]) for node in function]


def _alone(node: ir.Node, inputs: list[ir.Value | None], opset: int) -> onnx.ModelProto:
    names, values, constants = [], [], []
    for i, value in enumerate(inputs):
        if value is None:
            names.append("")
            continue
        names.append(f"in_{i}")
        if value.const_value is not None and value.const_value.size <= 64:
            constants.append(
                onnx.helper.make_tensor(
                    f"in_{i}",
                    value.dtype.value,
                    list(value.const_value.shape),
                    value.const_value.tobytes(),
                    raw=True,
                )
            )
        else:
            shape = (
                None
                if value.shape is None
                else [d if isinstance(d, int) else f"d{i}_{j}" for j, d in enumerate(value.shape)]
            )
            values.append(onnx.helper.make_tensor_value_info(f"in_{i}", value.dtype.value, shape))
    proto = onnx.helper.make_node(
        node.op_type, names, [f"out_{i}" for i in range(len(node.outputs))], domain=node.domain
    )
    proto.attribute.extend(ir.to_proto(a) for a in node.attributes.values())
    outputs = [onnx.ValueInfoProto(name=name) for name in proto.output]
    for value, info in zip(node.outputs, outputs):
        if value.dtype is not None:
            info.type.tensor_type.elem_type = value.dtype.value
    domains = {"": opset} | ({node.domain: 1} if node.domain else {})
    return onnx.helper.make_model(
        onnx.helper.make_graph([proto], "operator", values, outputs, constants),
        ir_version=11,
        opset_imports=[onnx.helper.make_opsetid(d, v) for d, v in domains.items()],
    )


def provider_of(model: onnx.ModelProto, *, device: str) -> str:
    """The provider that takes the only node of `model`, `NOWHERE` with ONNX Runtime's words when none
    does."""
    runtime = onnxruntime_with_libraries()
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    try:
        session = runtime.InferenceSession(model.SerializeToString(), options, providers=[PROVIDERS[device]])
    except Exception as error:  # the library raises bare exceptions
        return f"{NOWHERE}: {' '.join(str(error).split())[:300]}"
    nodes = [
        graph.ep_name for graph in session.get_provider_graph_assignment_info() for _ in graph.get_nodes()
    ]
    return " ".join(sorted(set(nodes))).replace("ExecutionProvider", "") or "folded"


def placement(graph: Path, folder: Path, *, device: str) -> dict[str, dict[str, int]]:
    """Provider -> operator -> number of nodes, of a graph as `device` loads it; `Memcpy` counts copies
    between host and device."""
    optimized = folder / "optimized.onnx"
    session = open_session(graph, device=device, record=True, optimized=optimized)
    found: dict[str, Counter] = {}
    for part in session.get_provider_graph_assignment_info():
        counter = found.setdefault(part.ep_name.replace("ExecutionProvider", ""), Counter())
        counter.update(node.op_type for node in part.get_nodes())
    copies = [
        node.op_type
        for node in onnx.load(optimized, load_external_data=False).graph.node
        if node.op_type.startswith("Memcpy")
    ]
    optimized.unlink()
    return {name: dict(sorted(counter.items())) for name, counter in found.items()} | {
        "Memcpy": dict(Counter(copies))
    }
