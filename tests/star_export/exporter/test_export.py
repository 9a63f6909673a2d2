"""Export of the miniature checkpoint: the table's boundaries,
the same bytes again, nothing of this machine, errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file

from engines.bundle.reader import Bundle
from engines.errors import InputError, UsageError
from reference.config import config_from_files
from reference.weights import named_tensors, resolve_checkpoint
from star_export.components import COMPONENTS
from star_export.exporter.export import export, image_table, rounded_star
from star_export.graph import wrappers
from star_export.graph.quantize import PRECISIONS


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int4"])
def test_the_graphs_boundary_is_the_manifests(bundle_of, precision: str) -> None:
    bundle = Bundle.open(bundle_of(precision))
    bundle.verify()
    assert list(bundle.manifest.components) == list(COMPONENTS)
    for name, spec in bundle.manifest.components.items():
        for file in filter(None, (spec.graph, spec.twin)):
            graph = onnx.load(bundle.file(file), load_external_data=False).graph
            for values, specs in ((graph.input, spec.inputs), (graph.output, spec.outputs)):
                assert [v.name for v in values] == [s.name for s in specs], f"{name}: {file}"
                shapes = [
                    tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim) for v in values
                ]
                assert shapes == [s.shape for s in specs], f"{name}: {file}"
            wide = {i.type.tensor_type.elem_type for i in graph.input}
            assert onnx.TensorProto.BFLOAT16 not in wide or file == spec.graph


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_graph_passes_onnxs_checker(bundle_of, precision: str) -> None:
    for file in sorted(bundle_of(precision).glob("*/*.onnx")):
        onnx.checker.check_model(file, full_check=precision == "fp32")


def test_int4_weights_are_stored_as_int4_and_only_in_the_decoders(bundle_of) -> None:
    for file in sorted(bundle_of("int4").glob("*/model.onnx")):
        graph = onnx.load(file, load_external_data=False).graph
        int4 = [t.name for t in graph.initializer if t.data_type == onnx.TensorProto.INT4]
        layers = {"base_ar": 4, "stacked_ar": 2}.get(file.parent.name, 0)
        assert len(int4) == 7 * layers, file.parent.name


def test_the_same_checkpoint_gives_the_same_bytes(
    mini_checkpoint: Path, mini_bundle: Path, tmp_path: Path
) -> None:
    torch.manual_seed(12345)  # the caller's random state must not matter
    again = export(str(mini_checkpoint), out=tmp_path / "again", components=["base_ar", "image_head"])
    files, others = (json.loads((b / "manifest.json").read_text())["files"] for b in (again, mini_bundle))
    assert len(files) >= 8 and all(others[name] == spec for name, spec in files.items())


def test_nothing_of_this_machine_is_in_a_bundle(mini_checkpoint: Path, mini_bundle: Path) -> None:
    paths = (
        str(mini_checkpoint).encode(),
        str(Path(wrappers.__file__).parent).encode(),
        str(Path(torch.__file__).parent).encode(),
    )
    for file in mini_bundle.rglob("*"):
        if file.is_file():
            data = file.read_bytes()
            assert not any(path in data for path in paths), file.name


def test_the_table_is_the_adapter_of_the_codebook(mini_checkpoint: Path) -> None:
    from reference.weights import load_star

    files = resolve_checkpoint(str(mini_checkpoint))
    star = load_star(files)
    table = image_table(named_tensors(files, star.config), star.config, files.star_pt).load()
    ids = torch.arange(star.config.vq.codebook_size)
    with torch.inference_mode():
        torch.testing.assert_close(table, star.image_embedding(ids), rtol=0, atol=1e-6)


def test_rounded_weights_are_rounded_and_float32_ones_are_not(mini_checkpoint: Path) -> None:
    files = resolve_checkpoint(str(mini_checkpoint))
    config = config_from_files(files.config_json, files.qwen_folder)
    tensors = named_tensors(files, config)
    tensors |= {wrappers.TABLE: image_table(tensors, config, files.star_pt)}
    name = "base_ar.layers.0.mlp.up_proj.weight"
    exact = tensors[name].load()
    for precision, differs in (("fp32", False), ("bf16", True), ("int4", True)):
        star = rounded_star(config, tensors, PRECISIONS[precision], rope_bf16=True)
        assert torch.equal(star.get_parameter(name), exact) != differs


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int4"])
def test_golden_tensors_can_prove_something(bundle_of, precision: str) -> None:
    for name in COMPONENTS:
        golden = load_file(bundle_of(precision) / name / "golden.safetensors")
        assert len({key.partition("/")[0] for key in golden}) >= 3
        for key, value in golden.items():
            assert np.isfinite(value).all(), f"{name}: {key}"
            if "/out/" in key and value.size > 4:
                assert len(np.unique(value)) > 1, f"{name}: {key} is constant"


@pytest.mark.parametrize(
    "options,listed",
    [
        ({"components": ["basear"]}, "base_ar"),
        ({"components": []}, "vision_encoder"),
        ({"precision": "fp8"}, "int4"),
    ],
)
def test_unknown_names_are_refused_with_the_valid_ones(mini_checkpoint, tmp_path, options, listed) -> None:
    with pytest.raises(UsageError) as error:
        export(str(mini_checkpoint), out=tmp_path / "out", **options)
    assert listed in error.value.where and not (tmp_path / "out").exists()


def test_a_taken_folder_is_refused_before_the_checkpoint_is_read(tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("keep")
    with pytest.raises(InputError, match="already in use"):
        export("/no/such/checkpoint", out=tmp_path / "out")
    assert (tmp_path / "out" / "precious").read_text() == "keep"


def test_a_damaged_checkpoint_leaves_nothing(mini_checkpoint, tmp_path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(mini_checkpoint, broken)
    with open(broken / "STAR-mini.pt", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(Exception) as error:
        export(str(broken), out=tmp_path / "out")
    assert getattr(error.value, "exit_code", None) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken"]
