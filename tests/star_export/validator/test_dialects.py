"""Every graph that only TensorRT runs gives the golden tensors, and its own rows catch a fault of one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from engines.bundle.reader import Bundle
from engines.progress import silent
from star_export.golden.tolerances import compute_of
from star_export.validator.dialects import NOT_PROVEN, dialects
from star_export.validator.subject import Subject
from tests.helpers.spoilt_bundle import copied, rehash

BACKEND = "onnxruntime-exact"


def rows_of(root: Path):
    bundle = Bundle.open(root)
    return dialects(Subject(bundle, BACKEND, compute_of(BACKEND, bundle.manifest.precision)), silent)


@pytest.mark.parametrize(
    "precision, kinds",
    [("fp32", {"classic"}), ("bf16", {"classic", "16-bit"}), ("int4", {"classic", "16-bit"})]
    + [("fp8", {"classic", "16-bit"}), ("nvfp4", {"16-bit"})],
)
def test_every_graph_of_a_clean_bundle_gives_the_golden_tensors(
    bundle_of: Callable[[str], Path], precision: str, kinds: set[str]
) -> None:
    rows, note = rows_of(bundle_of(precision))
    components = set(Bundle.open(bundle_of(precision)).manifest.components)
    assert {(row.component, row.check.split(" graph")[0]) for row in rows} == {
        (name, kind) for name in components for kind in kinds
    }
    assert all(row.worst.passed for row in rows) and note == NOT_PROVEN


def other_mask(graph: onnx.GraphProto) -> None:
    """Query i sees one slot more."""
    (compare,) = [node for node in graph.node if node.op_type in ("LessOrEqual", "Less", "GreaterOrEqual")]
    compare.op_type = {"LessOrEqual": "Less", "GreaterOrEqual": "Greater"}[compare.op_type]


def keys_and_values_swapped(graph: onnx.GraphProto) -> None:
    node = next(node for node in graph.node if node.op_type == "KVCacheAttention")
    node.input[1], node.input[2] = node.input[2], node.input[1]


@pytest.mark.parametrize("fault", [other_mask, keys_and_values_swapped])
@pytest.mark.parametrize("kind, file", [("classic", "classic.onnx"), ("16-bit", "model.onnx")])
def test_a_fault_of_one_dialect_is_caught_by_its_rows_alone(
    bundle_of: Callable[[str], Path], tmp_path: Path, kind: str, file: str, fault: Callable
) -> None:
    root = copied(bundle_of("bf16"), tmp_path)
    path = root / "stacked_ar" / file
    model = onnx.load(path, load_external_data=False)
    fault(model.graph)
    path.write_bytes(model.SerializeToString())
    rehash(root)
    rows, _ = rows_of(root)
    failing = {(row.component, row.check.split(" graph")[0]) for row in rows if not row.worst.passed}
    assert failing == {("stacked_ar", kind)}
