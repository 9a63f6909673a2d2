"""A bundle with a diffusion decoder: what it holds, and that every executor computes its golden tensors."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file

from engines.bundle.manifest import DiffusionSpec
from engines.bundle.reader import Bundle
from engines.errors import StarError, UsageError
from engines.sessions import open_session
from reference.diffusion import mini
from star_export.components import COMPONENTS, DIFFUSION
from star_export.exporter.export import export
from star_export.golden.cases import recorded_cases
from star_export.golden.run_case import run_case
from star_export.golden.tolerances import tolerances_of
from star_export.planner.plan import plan
from star_export.planner.source import find_source, sizes_from_source
from star_export.validator.ladder import validate

GRAPHS = [name for name in DIFFUSION if not COMPONENTS[name].table]


def test_it_holds_every_component_and_what_numpy_needs(diffusion_bundle: Path) -> None:
    bundle = Bundle.open(diffusion_bundle)
    bundle.verify()
    manifest = bundle.manifest
    assert {*manifest.components, *manifest.tables} == set(COMPONENTS)
    assert manifest.model.diffusion == DiffusionSpec(
        (4, 6, 6), 16, 16, 0.3611, 0.1159, 6.0, bos=2, hidden_size=64, blocks=5, token_weights=315_392
    )
    assert "caption_tokenizer.json" in manifest.files


def test_the_codebook_lies_in_it_once(diffusion_bundle: Path) -> None:
    table = Bundle.open(diffusion_bundle).manifest.tables["codebook"]
    assert table.file.startswith("vq_") and not table.weights


@pytest.mark.parametrize("name", GRAPHS)
def test_the_graphs_boundary_is_the_manifests(diffusion_bundle: Path, name: str) -> None:
    bundle = Bundle.open(diffusion_bundle)
    spec = bundle.component(name)
    graph = onnx.load(bundle.file(spec.graph), load_external_data=False).graph
    for values, specs in ((graph.input, spec.inputs), (graph.output, spec.outputs)):
        found = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
        assert found == {s.name: list(s.shape) for s in specs}


@pytest.mark.parametrize("backend", ["onnxruntime", "interpreter-fp32:rtx-4090"])
@pytest.mark.parametrize("name", DIFFUSION)
def test_executors_compute_the_golden_tensors(diffusion_bundle: Path, name: str, backend: str) -> None:
    if backend.startswith("interpreter"):
        pytest.importorskip("tensorrt_rtx")
    bundle = Bundle.open(diffusion_bundle)
    session = open_session(bundle, name, backend=backend)
    for case in recorded_cases(bundle, name).values():
        results = run_case(session, case, tolerances=tolerances_of(name, "fp32", {}))
        assert results and all(result.passed for result in results), results


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("dit", "caption_cos"),
        ("dit", "image_sin"),
        ("dit", "time"),
        ("dit", "source"),
        ("dit", "vq_map"),
        ("text_encoder", "position_ids"),
        ("vae_decoder", "latents"),
    ],
)
def test_an_input_that_is_not_the_recorded_one_fails(diffusion_bundle: Path, name: str, given: str) -> None:
    """Each input decides its outputs far beyond their tolerances."""
    bundle = Bundle.open(diffusion_bundle)
    session, cases = open_session(bundle, name), recorded_cases(bundle, name)
    case = max(cases.values(), key=lambda case: case.inputs[given].size)
    case.inputs[given] = np.roll(case.inputs[given], 1, axis=-1).copy()
    results = run_case(session, case, tolerances=tolerances_of(name, "fp32", {}))
    assert not all(result.passed for result in results)


def test_it_passes_the_ladder(diffusion_bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(diffusion_bundle, tmp_path / "bundle")  # validate writes its certificate
    certificate = validate(copy)
    assert certificate.passed
    judged = {row.component for rung in certificate.rungs for row in rung.rows}
    assert judged >= set(DIFFUSION)


def test_a_plan_of_the_checkpoint_knows_the_bundles_sizes(
    diffusion_bundle: Path, diffusion_checkpoint: Path
) -> None:
    bundle = Bundle.open(diffusion_bundle)
    predicted = sizes_from_source(find_source(str(diffusion_checkpoint)), "fp32")
    for name in GRAPHS:
        assert predicted.graphs[name] == bundle.manifest.files[bundle.weights(name)[0]].size
    assert predicted.tables["text_embedding"] == bundle.manifest.files["text_embedding/table.data"].size
    actual = sum(file.size for file in bundle.manifest.files.values())
    assert 0.9 < predicted.bundle_bytes / actual < 1.1
    tasks = [task.task for task in plan(str(diffusion_bundle), targets=["rtx-4090"]).places[0].tasks]
    assert tasks[-2:] == ["paint", "repaint"]


def test_components_of_a_decoder_that_is_not_there_are_refused(mini_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="dit"):
        export(str(mini_checkpoint), out=tmp_path / "bundle", components=["dit"])


def test_a_folder_is_used_only_with_the_tokenizer_of_its_text_encoder(
    diffusion_checkpoint: Path, tmp_path: Path
) -> None:
    lumina = shutil.copytree(diffusion_checkpoint / mini.FOLDER, tmp_path / mini.FOLDER)
    source = diffusion_checkpoint / "Qwen2.5-VL-mini" / "tokenizer.json"
    shutil.copyfile(source, lumina / "tokenizer" / "tokenizer.json")
    with pytest.raises(StarError, match="expected the ids \\[2\\]"):
        export(str(diffusion_checkpoint), out=tmp_path / "bundle", lumina=str(lumina), components=["dit"])


def test_golden_tensors_can_prove_something(diffusion_bundle: Path) -> None:
    for name in DIFFUSION:
        golden = load_file(diffusion_bundle / name / "golden.safetensors")
        assert len({key.partition("/")[0] for key in golden}) >= 3
        assert all(np.isfinite(value).all() for value in golden.values())
