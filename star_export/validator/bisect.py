"""Where inside a component a candidate leaves the reference: the first tensor beyond its tolerance.

The reference is the model in PyTorch with the checkpoint's weights rounded as the bundle stores them, as it
was when the golden tensors were recorded; it must reproduce them, or it proves nothing. Each tensor that one
of its modules returns or takes is compared with the value of that name in the graph, which ONNX Runtime runs,
or in the network that TensorRT parsed, which the interpreter runs; both in float32. The checkpoint is needed,
because a bundle has neither the reference's configuration nor weights that can be trusted when it fails.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from engines.bundle.manifest import TensorSpec, component_of
from engines.bundle.reader import Bundle
from engines.bundle.tensors import PAST, PRESENT, present_name
from engines.errors import InputError
from engines.progress import Progress, silent
from reference.config import config_from_files
from reference.weights import named_tensors, resolve_checkpoint

from ..components import COMPONENTS, Part, boundary
from ..golden.cases import Case, Tensors, component_cases
from ..golden.compare import Comparison, compare, excess, verdict
from ..golden.run_case import extended, written_slots
from ..golden.tolerances import tolerances_of
from ..graph.precisions import PRECISIONS
from ..graph.repeat import layer_of
from ..graph.wrappers import TABLE
from .candidates import Candidate, Node, candidate_from_graph, candidate_from_network, modules_from_graph

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
    the first case. Raises InputError for a checkpoint that does not reproduce the golden tensors, for a
    bundle whose weights are not in the checkpoint, and for one of an older export; UsageError for an unknown
    component, and MissingError without Polygraphy or the target's TensorRT.
    """
    from ..golden.oracle import lazy_image_table, streamed_star
    from ..golden.polygraphy_files import check_polygraphy

    check_polygraphy()
    names = [component] if component in bundle.manifest.components else bundle.parts(component)
    check_rounded_to_nearest(bundle)
    files = resolve_checkpoint(source)
    config = config_from_files(files.config_json, files.qwen_folder)
    tensors = named_tensors(files, config)
    star = streamed_star(
        config,
        tensors | {TABLE: lazy_image_table(config, tensors)},
        PRECISIONS[bundle.manifest.precision],
        rope_bf16=bundle.manifest.model.rope_bf16,
    )
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


def check_rounded_to_nearest(bundle: Bundle) -> None:
    """Raise InputError for a bundle whose weights are not the checkpoint's rounded to nearest."""
    manifest = bundle.manifest
    got = (
        "calibrated weights"
        if manifest.calibration
        else f"weights in {manifest.precision}"
        if manifest.precision in ("mixed", "nvfp4")
        else ""
    )
    if got:
        raise InputError(
            "The reference of this bundle cannot be made again",
            where=f"{bundle.path}: expected weights that follow from the checkpoint by rounding, got {got}",
            fix="export the checkpoint in another precision without --calibrate, and bisect that bundle",
        )


class Reference:
    """The reference's tensors for each case of one graph, computed once and checked with the golden ones."""

    def __init__(self, bundle: Bundle, name: str, star):
        self.name, self.star = name, star
        spec = bundle.component(name)
        component = component_of(name)
        layers = [layer for t in spec.inputs if (layer := layer_of(t.name)) is not None]
        decoder = COMPONENTS[component].decoder
        held = range(min(layers), max(layers) + 1) if decoder else None
        self.part = Part(name, component, held)
        wanted = _signature(spec.inputs, spec.outputs)
        got = _signature(*boundary(self.part, star.config, "float32"))
        layers_of = bundle.manifest.model.cache.get(component)
        if decoder and layers_of and layers_of.layers != decoder(star.config).num_layers:
            wanted["layers"], got["layers"] = layers_of.layers, decoder(star.config).num_layers
        if differing := [key for key in wanted.keys() | got.keys() if wanted.get(key) != got.get(key)]:
            key = min(differing)
            raise _other_checkpoint(name, f"{key}: expected {wanted.get(key)}, got {got.get(key)}")
        self.cases = component_cases(bundle.file(spec.golden), spec)
        self._made: dict[str, Tensors] = {}

    def tensors(self, case: str) -> Tensors:
        """By the names of `graph/modules.py`. Raises InputError if the golden tensors are not reproduced."""
        if case not in self._made:
            from ..golden.intermediate import intermediate_tensors

            recorded = self.cases[case]
            outputs, found = intermediate_tensors(self.part, self.star, recorded.inputs)
            results = compare(
                {name: _seen(name, array, recorded) for name, array in outputs.items()},
                {name: _seen(name, array, recorded) for name, array in recorded.outputs.items()},
                tolerances=tolerances_of(self.name, "fp32", {}),
            )
            if failing := [result for result in results if not result.passed]:
                raise _other_checkpoint(self.name, f"case {case}: {verdict(max(failing, key=excess))}")
            self._made[case] = found
        return self._made[case]


def _signature(*sides: tuple[TensorSpec, ...]) -> dict[str, object]:
    """Input or output -> its shape."""
    return {tensor.name: tensor.shape for side in sides for tensor in side}


def _other_checkpoint(name: str, difference: str) -> InputError:
    return InputError(
        "The checkpoint does not give the golden tensors of this bundle",
        where=f"{name}: {difference}",
        fix="name the checkpoint that the bundle was exported from",
    )


def first_wrong_case(candidate: Candidate, modules: Mapping[str, str], reference: Reference) -> Bisection:
    """The first case in which a tensor of `candidate` is beyond its tolerance, or else the first case."""
    found: list[Bisection] = []
    for case, recorded in reference.cases.items():
        feeds = {
            key: extended(array, candidate.capacity_tokens) if present_name(key) else array
            for key, array in recorded.inputs.items()
        }
        got = candidate.run({key: array.copy() for key, array in feeds.items()})
        rows = depths(candidate, modules, got, reference.tensors(case), recorded)
        found.append(Bisection(reference.name, candidate.backend, case, tuple(rows)))
        if found[-1].first is not None:
            return found[-1]
    return found[0]


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
        seen = _seen(name, array, case)
        if seen.size == 0 or seen.min() == seen.max() or (array.dtype != np.float32 and name in modules):
            continue
        made = {name: _laid_out(_seen(name, got[name], case), seen)} if name in got else {}
        (results[name],) = compare(
            made, {name: seen}, tolerances={name: TOLERANCE * (seen.dtype.kind == "f")}
        )
    rows = []
    for name, result in results.items():
        at = maker.get(name, _reader(candidate.nodes, _past(name)))
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


def _past(name: str) -> str:
    """The input that output `name` updates, `past_key_values.0.key` of `present.0.key`; "" of any other."""
    return f"{PAST}{name.removeprefix(PRESENT)}" if name.startswith(PRESENT) else ""


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


def _seen(name: str, array: np.ndarray, case: Case) -> np.ndarray:
    """Of a cache the slots that the case writes; all of any other tensor."""
    if _past(name) in case.inputs:
        return written_slots(array, case.inputs["write_indices"], case.inputs["inputs_embeds"].shape[1])
    return array


def _laid_out(array: np.ndarray, like: np.ndarray) -> np.ndarray:
    """The same numbers in the reference's shape, where a graph has another one for them."""
    return array.reshape(like.shape) if array.size == like.size else array


def text_from_bisections(found: Iterable[Bisection]) -> str:
    """For people: what the first wrong tensor is, and the error along the depth as a table."""
    return "\n\n".join(_text(one) for one in found)


def _text(found: Bisection) -> str:
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
