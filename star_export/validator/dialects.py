"""The graphs that only TensorRT runs as they are: those in 16 bits, and those of the classic dialect.

A device compiles its plans from them, so each must give the golden tensors too. Each is widened to float32 in
memory, with the same weights, and the plugin's operation gets the body of its function. This module knows
nothing of the ladder.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from engines.bundle.manifest import ComponentSpec
from engines.progress import Progress
from engines.sessions.onnxruntime import OnnxRuntimeSession

from ..golden.cases import component_cases
from ..golden.run_case import run_case
from ..golden.tolerances import tolerances_of
from .certificate import Row, rows_from_results
from .subject import Subject

NOT_PROVEN = (
    "the meaning of the graphs for TensorRT is compared, in float32, not the plugin's kernels, the "
    "arithmetic in 16 bits or what a parser makes of the graphs"
)


def dialects(subject: Subject, progress: Progress) -> tuple[list[Row], str]:
    """Compare every graph that only TensorRT runs with the golden tensors of its component."""
    bundle = subject.bundle
    components = bundle.manifest.components
    graphs = [(name, kind, graph) for name, spec in components.items() for kind, graph in others(spec)]
    if not graphs:
        return [], "the bundle has no other graphs"
    if not importlib.util.find_spec("onnx_ir"):
        return [], "left out: onnx is not installed here"
    rows: list[Row] = []
    for i, (name, kind, graph) in enumerate(graphs):
        progress(f"{graph} against its golden tensors", i, len(graphs))
        spec = bundle.component(name)
        session = OnnxRuntimeSession(
            bundle, name, exact=True, graph=_runnable(subject, graph), threads=subject.threads
        )
        try:
            for case, recorded in component_cases(bundle.file(spec.golden), spec).items():
                tolerances = tolerances_of(name, subject.compute, recorded.noise_in(subject.compute))
                results = run_case(
                    session, recorded, tolerances=tolerances, own_draws=subject.compute != "fp32"
                )
                rows += rows_from_results(name, f"{kind} graph: case {case}", results)
        finally:
            session.close()
    return rows, NOT_PROVEN


def others(spec: ComponentSpec) -> Iterator[tuple[str, str]]:
    """The graphs of a component that ONNX Runtime's CPU does not run: (kind, name in the manifest)."""
    if spec.twin:
        yield "16-bit", spec.graph
    if spec.classic:
        yield "classic", spec.classic


def _runnable(subject: Subject, graph: str) -> bytes:
    import onnx_ir as ir

    from ..graph.quantize import runnable_from_graph

    return ir.to_proto(runnable_from_graph(ir.load(subject.bundle.file(graph)))).SerializeToString()
