"""A bisection of quantised weights: faults are found in bundles that were calibrated, that are mixed or round
activations, and in one of several parts; and a bundle is no witness of its own weights."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from engines.bundle.reader import Bundle
from engines.errors import InputError
from star_export.exporter.export import export
from star_export.golden import intermediate
from star_export.graph import nvfp4
from star_export.validator import bisect as bisecting
from star_export.validator.bisect import bisect
from star_export.validator.reference import Reference, reference_star
from tests.helpers.planted_in_graph import FAULTS, bisected, check_found, some_of
from tests.star_export.validator.test_ladder import rehash

pytest.importorskip("polygraphy")
KINDS = {
    "int4 calibrated": {"precision": "int4", "calibrate": 1},
    "int8 calibrated in parts": {"precision": "int8", "calibrate": 1, "part_bytes": 60_000},
    "nvfp4 calibrated": {"precision": "nvfp4", "calibrate": 1},
    "mixed": {"precision": "mixed", "bits": 6.0},
    "int8": {"precision": "int8"},
    "nvfp4": {"precision": "nvfp4"},
}
SHARE = 3  # of the faults, one after the other, that each kind gets


@pytest.fixture(scope="module")
def bundle(mini_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """Kind -> the base decoder of the miniature."""
    made: dict[str, Bundle] = {}

    def bundle(kind: str) -> Bundle:
        if kind not in made:
            out = tmp_path_factory.mktemp("bundle") / "bundle"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("star_export.calibration.effects.TOKENS", 64)
                export(str(mini_checkpoint), out=out, components=["base_ar"], **KINDS[kind])
            made[kind] = Bundle.open(out)
        return made[kind]

    return bundle


@pytest.fixture(scope="module")
def reference(bundle: Callable[[str], Bundle], mini_checkpoint: Path) -> Callable[[str, str], Reference]:
    """Kind and graph -> its reference, which keeps what it computed."""
    made: dict[tuple[str, str], Reference] = {}

    def reference(kind: str, name: str = "base_ar") -> Reference:
        if (kind, name) not in made:
            star = reference_star(bundle(kind), [name], str(mini_checkpoint))
            made[kind, name] = Reference(bundle(kind), name, star)
        return made[kind, name]

    return reference


@pytest.mark.parametrize(
    "kind,fault",
    [(kind, [*FAULTS, *FAULTS][SHARE * i + k]) for i, kind in enumerate(KINDS) for k in range(SHARE)],
)
def test_a_planted_fault_is_found_at_the_right_node(
    bundle: Callable, reference: Callable, tmp_path: Path, kind: str, fault: str
) -> None:
    layer = some_of(fault, range(4))
    parts = bundle(kind).parts("base_ar")
    assert len(parts) == (4 if "parts" in kind else 1)
    check_found(reference(kind, parts[layer * len(parts) // 4]), fault, layer, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_found_in_a_right_bundle(bundle: Callable, mini_checkpoint: Path, kind: str) -> None:
    for found in bisect(bundle(kind), "base_ar", source=str(mini_checkpoint)):
        assert found.first is None and len(found.rows) > 20
        assert max(row.result.value for row in found.rows) < bisecting.TOLERANCE / 3


def test_an_activation_that_is_not_rounded_to_nvfp4_is_found(reference: Callable, tmp_path: Path) -> None:
    right = reference("nvfp4")
    model = onnx.load(right.bundle.graph("base_ar", twin=True), load_external_data=False)
    rounding = [node for node in model.graph.node if node.op_type == nvfp4.NAME][5]
    rounding.CopyFrom(helper.make_node("Identity", rounding.input, rounding.output, name=rounding.name))
    first = bisected(right, model, tmp_path).first
    assert first is not None and rounding.name in first.between and not first.wrong


def test_a_rounding_that_falls_the_other_way_is_no_fault(
    reference: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inputs that are a little off give some activations the next number; the reference follows."""
    right = reference("nvfp4")
    graph = right.bundle.graph("base_ar", twin=True)
    candidate, modules = bisecting.candidate_from_graph(graph), bisecting.modules_from_graph(graph)

    def run(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        x = feeds["inputs_embeds"]
        off = 1 + 1e-5 * np.random.default_rng(0).standard_normal(x.shape)
        return candidate.run(feeds | {"inputs_embeds": (x * off).astype(np.float32)})

    noisy = dataclasses.replace(candidate, run=run)
    assert bisecting.first_wrong_case(noisy, modules, right).first is None
    monkeypatch.setattr(intermediate, "_taken", lambda own, x, others: own)
    assert bisecting.first_wrong_case(noisy, modules, right).first is not None


def spoilt(bundle: Bundle, folder: Path) -> Path:
    """A copy whose first layer has other codes, which no hash finds."""
    path = shutil.copytree(bundle.path, folder / "bundle")
    graph = onnx.load(path / "base_ar/model.onnx", load_external_data=False).graph
    (codes,) = [t for t in graph.initializer if t.name == "base_ar.layers.0.self_attn.q_proj.weight.codes"]
    place = {entry.key: entry.value for entry in codes.external_data}
    with (path / "base_ar/model.onnx.data").open("r+b") as file:
        file.seek(int(place["offset"]))
        file.write(b"\x11" * (int(place["length"]) // 2))
    rehash(path)
    return path


def test_other_weights_are_found_where_they_follow_from_the_checkpoint(
    bundle: Callable, mini_checkpoint: Path, tmp_path: Path
) -> None:
    found = bisect(Bundle.open(spoilt(bundle("int8"), tmp_path)), "base_ar", source=str(mini_checkpoint))
    assert found[0].first is not None and found[0].first.module == "base_ar.layers.0.self_attn.q_proj"


def test_calibrated_weights_must_give_the_golden_tensors(
    bundle: Callable, mini_checkpoint: Path, tmp_path: Path
) -> None:
    path = spoilt(bundle("int4 calibrated"), tmp_path)
    with pytest.raises(InputError, match="calibrated weights of this bundle do not give") as caught:
        bisect(Bundle.open(path), "base_ar", source=str(mini_checkpoint))
    assert "base_ar/model.onnx.data" in str(caught.value)


def test_another_checkpoint_of_a_calibrated_bundle_is_refused(
    bundle: Callable, mini_checkpoint: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    other = shutil.copytree(mini_checkpoint, tmp_path / "other")
    for path in other.rglob("*.safetensors"):
        tensors = load_file(path)
        biases = {name: -tensor for name, tensor in tensors.items() if name.endswith("q_proj.bias")}
        save_file(tensors | biases, path)
    with pytest.raises(InputError, match="checkpoint does not give the golden tensors"):
        bisect(bundle("int4 calibrated"), "base_ar", source=str(other))
