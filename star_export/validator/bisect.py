"""Where inside a component a candidate leaves the reference: the first tensor beyond its tolerance.

The reference is the model in PyTorch with its weights rounded as the bundle stores them, as it was when the
golden tensors were recorded (`reference.py`). Each tensor that one of its modules returns or takes is
compared with the value of that name in the graph, which ONNX Runtime runs, or in the network that TensorRT
parsed, which the interpreter runs; both in float32. The checkpoint is needed, because a bundle has neither
the reference's configuration nor all of its weights as they were.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from engines.bundle.reader import Bundle
from engines.bundle.tensors import present_name
from engines.progress import Progress, silent

from ..golden.cases import Case, Tensors
from ..golden.compare import Comparison, compare, verdict
from ..golden.run_case import extended
from ..graph.nvfp4 import OF_ROWS, ROUNDED
from .candidates import Candidate, Node, candidate_from_graph, candidate_from_network, modules_from_graph
from .reference import Reference, past, reference_star, seen

TOLERANCE = 2e-4  # of every tensor inside, as of every output in the component table; 4.2e-5 was measured


@dataclass(frozen=True)
class Depth:
    """One tensor along the depth of a component.

    `depth` is the place of the `node` that makes it. `module` is the tensor of the reference, as
    `graph/modules.py` names them. `inputs` are the nearest compared tensors that it depends on, `wrong` those
    of them that were beyond their tolerance, and `between` the nodes that were not compared in between.
    """

    depth: int
    node: str
    op: str
    module: str
    result: Comparison
    inputs: tuple[str, ...]
    wrong: tuple[str, ...]
    between: tuple[str, ...]


@dataclass(frozen=True)
class Bisection:
    """All compared tensors of one `case` of a graph, in the order in which `backend` computes them."""

    component: str
    backend: str
    case: str
    rows: tuple[Depth, ...]

    @property
    def first(self) -> Depth | None:
        """The first tensor beyond its tolerance, or None where all are within."""
        return next((row for row in self.rows if not row.result.passed), None)


def bisect(
    bundle: Bundle, component: str, *, source: str, target: str | None = None, progress: Progress = silent
) -> list[Bisection]:
    """Compare every graph of `component`, or the one graph of that name, tensor by tensor.

    `source` is the checkpoint that was exported. With a target, the network that its TensorRT parses is
    compared too. Of each graph and backend the first case with a tensor beyond its tolerance is returned, or
    the first case. Raises InputError for a checkpoint or calibrated weights that do not give the golden
    tensors, and for a bundle of an older export; UsageError for an unknown component, and MissingError
    without Polygraphy or the target's TensorRT.
    """
    from ..golden.polygraphy_files import check_polygraphy

    check_polygraphy()
    names = [component] if component in bundle.manifest.components else bundle.parts(component)
    star = reference_star(bundle, names, source)
    found = []
    for i, name in enumerate(names):
        progress(f"{name} layer by layer", i, len(names))
        reference = Reference(bundle, name, star)
        with bundle.loading(name, twin=True) as path:
            modules, candidate = modules_from_graph(path), candidate_from_graph(path)
        found.append(first_wrong_case(candidate, modules, reference))
        if target:
            found.append(first_wrong_case(candidate_from_network(bundle, name, target), modules, reference))
    return found


def first_wrong_case(candidate: Candidate, modules: Mapping[str, str], reference: Reference) -> Bisection:
    """The first case in which a tensor of `candidate` is beyond its tolerance, or else the first case."""
    found: list[Bisection] = []
    for case, recorded in reference.cases.items():
        feeds = {
            key: extended(array, candidate.capacity_tokens) if present_name(key) else array
            for key, array in recorded.inputs.items()
        }
        got = candidate.run({key: array.copy() for key, array in feeds.items()})
        outputs, inside = reference.tensors(case, _rounded(modules, got))
        rows = depths(candidate, modules, got, inside, replace(recorded, outputs=outputs))
        found.append(Bisection(reference.name, candidate.backend, case, tuple(rows)))
        if found[-1].first is not None:
            return found[-1]
    return found[0]


def _rounded(modules: Mapping[str, str], got: Tensors) -> Tensors:
    """What a candidate rounded to nvfp4, times the magnitudes of its rows, by the names of the reference."""
    with np.errstate(invalid="ignore"):  # a fault may have made it infinite
        return {
            module: got[f"{name}{ROUNDED}"] * got[f"{name}{OF_ROWS}"]
            for name, module in modules.items()
            if f"{name}{ROUNDED}" in got
        }


def depths(
    candidate: Candidate, modules: Mapping[str, str], got: Tensors, reference: Tensors, case: Case
) -> list[Depth]:
    """Compare the tensors of a candidate with the reference, in the order in which its nodes make them.

    `modules` maps a tensor to its name in the reference; the outputs are compared with the golden tensors of
    `case`. A constant tensor of the reference, which proves nothing, and shapes are left out.
    """
    wanted = {name: reference[module] for name, module in modules.items() if module in reference}
    wanted |= case.outputs
    maker = {name: i for i, node in enumerate(candidate.nodes) for name in node.makes}
    results: dict[str, Comparison] = {}
    for name, array in wanted.items():
        if name not in got and name not in case.outputs:
            continue
        right = seen(name, array, case)
        if right.size == 0 or right.min() == right.max() or (array.dtype != np.float32 and name in modules):
            continue
        made = {name: _laid_out(seen(name, got[name], case), right)} if name in got else {}
        (results[name],) = compare(
            made, {name: right}, tolerances={name: TOLERANCE * (right.dtype.kind == "f")}
        )
    rows = []
    for name, result in results.items():
        at = maker.get(name, _reader(candidate.nodes, past(name)))
        inputs, between = _nearest(candidate.nodes, maker, at, set(results)) if at >= 0 else ((), ())
        rows.append(
            Depth(
                depth=at,
                node=candidate.nodes[at].name if at >= 0 else "",
                op=candidate.nodes[at].op if at >= 0 else "",
                module=modules.get(name, ""),
                result=result,
                inputs=inputs,
                wrong=tuple(i for i in inputs if not results[i].passed),
                between=between,
            )
        )
    return sorted(rows, key=lambda row: (row.depth < 0, row.depth))


def _reader(nodes: tuple[Node, ...], name: str) -> int:
    """The place of the last node that reads `name`, or -1: of a cache whose update is missing, its attention.

    Nodes before it may ask for its shape.
    """
    return max((i for i, node in enumerate(nodes) if name and name in node.reads), default=-1)


def _nearest(
    nodes: tuple[Node, ...], maker: Mapping[str, int], at: int, compared: set[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The nearest compared tensors that node `at` depends on, and the other nodes on the way to them."""
    inputs: dict[str, None] = {}
    between: set[int] = set()
    left = list(nodes[at].reads)
    while left:
        name = left.pop(0)
        if name in compared:
            inputs[name] = None
        elif (source := maker.get(name)) is not None and source not in between:
            between.add(source)
            left += nodes[source].reads
    return tuple(inputs), tuple(nodes[i].name for i in sorted(between))


def _laid_out(array: np.ndarray, like: np.ndarray) -> np.ndarray:
    """The same numbers in the reference's shape, where a graph has another one for them."""
    return array.reshape(like.shape) if array.size == like.size else array


def text_from_bisections(found: Iterable[Bisection]) -> str:
    """For people: what the first wrong tensor is, and the error along the depth as a table."""
    return "\n\n".join(text_of_bisection(one) for one in found)


def text_of_bisection(found: Bisection) -> str:
    """The same of one graph."""
    head = f"{found.component} on {found.backend}, case {found.case}: {len(found.rows)} tensors compared"
    first = found.first
    lines = [head]
    if first is None:
        lines.append("  all are within their tolerance")
    else:
        state = "were right" if not first.wrong else f"were wrong already: {', '.join(first.wrong)}"
        lines += [
            f"  first wrong tensor: {first.result.tensor}: {verdict(first.result).partition(': ')[2]}",
            f"  made by node: {first.node or 'none'} ({first.op or 'nothing makes it'})",
            f"  module of the reference: {first.module or 'an output of the component'}",
            f"  its inputs {state}: {', '.join(first.inputs) or 'none but those of the component'}",
            f"  not compared on the way: {', '.join(first.between) or 'nothing'}",
        ]
    for row in found.rows:
        mark = " " if row.result.passed else "X"
        shown = row.result.fault or f"{row.result.value:9.2e} of {row.result.tolerance:.0e}"
        lines.append(f"{mark} {row.depth:5} {row.op:18} {shown}  {row.module or row.result.tensor}")
    return "\n".join(lines)
