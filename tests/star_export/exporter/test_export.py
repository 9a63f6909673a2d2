"""Export of the miniature checkpoint: the table's boundaries,
the same bytes again, nothing of this machine, errors."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load_file

from engines.bundle.reader import Bundle
from engines.errors import InputError, UsageError
from engines.runtime.star import Star
from engines.sessions import open_session, run
from reference.config import config_from_files
from reference.weights import named_tensors, resolve_checkpoint
from star_export.components import COMPONENTS, DIFFUSION
from star_export.exporter import export as exporter
from star_export.exporter import publish
from star_export.exporter.export import export
from star_export.golden.oracle import KEPT, resident, streamed_star
from star_export.graph import wrappers
from star_export.graph.precisions import DENSE, PRECISIONS, TORCH_DTYPES, Precision
from star_export.validator.ladder import validate

AUTOREGRESSIVE = [name for name in COMPONENTS if name not in DIFFUSION]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int4"])
def test_the_graphs_boundary_is_the_manifests(bundle_of, precision: str) -> None:
    bundle = Bundle.open(bundle_of(precision))
    bundle.verify()
    tables = [name for name in AUTOREGRESSIVE if COMPONENTS[name].table]
    assert list(bundle.manifest.tables) == tables
    assert list(bundle.manifest.components) == [name for name in AUTOREGRESSIVE if name not in tables]
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


def test_only_the_base_decoder_is_nvfp4_and_such_a_bundle_has_no_classic_graphs(bundle_of) -> None:
    root = bundle_of("nvfp4")
    for name, spec in Bundle.open(root).manifest.components.items():
        graph = onnx.load(root / spec.graph, load_external_data=False).graph
        codes = [t.name for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT4E2M1]
        decoder = name == "base_ar"
        assert bool(codes) == ("nvfp4" in spec.weights) == decoder, name
        assert {node.op_type for node in graph.node} >= {"TRT_FP4DynamicQuantize"} or not decoder
        assert spec.classic is None and spec.plugin_abi is None
    with pytest.raises(InputError, match="This bundle has no classic graphs"):
        Bundle.open(root).graph("base_ar", dialect="classic")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8", "nvfp4"])
def test_every_graph_passes_onnxs_checker(bundle_of, precision: str) -> None:
    for file in sorted(bundle_of(precision).glob("*/*.onnx")):
        onnx.checker.check_model(file, full_check=precision == "fp32")


def test_int4_weights_are_stored_as_int4_in_the_base_decoder_and_as_int8_elsewhere(bundle_of) -> None:
    for file in sorted(bundle_of("int4").glob("*/model.onnx")):
        graph = onnx.load(file, load_external_data=False).graph
        int4 = [t.name for t in graph.initializer if t.data_type == onnx.TensorProto.INT4]
        assert len(int4) == (7 * 4 if file.parent.name == "base_ar" else 0), file.parent.name
        wide = {t.name for t in graph.initializer if t.data_type == onnx.TensorProto.BFLOAT16}
        large = {t.name for t in graph.initializer if t.name in wide and np.prod(t.dims) > 4096}
        scales = {name for name in wide if name.endswith(".scales")}
        assert large <= {"codebook.weight", "image_table.weight", *DENSE, *scales}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int4"])
def test_the_manifest_says_what_is_stored_in_which_format(bundle_of, precision: str) -> None:
    bundle = Bundle.open(bundle_of(precision))
    for name, spec in bundle.manifest.components.items():
        stored = sum(bundle.manifest.files[file].size for file in bundle.weights(name))
        assert stored <= sum(spec.weights.values()) < 1.25 * stored, "small tensors lie in the graph"
        wanted = {"int4": {"int4" if name == "base_ar" else "int8"}}
        assert spec.weights.keys() - {"bf16"} == wanted.get(precision, {precision} - {"bf16"}), name
    for name, table in bundle.manifest.tables.items():
        shared = Path(table.file).parent.name in bundle.manifest.components
        expected = {} if shared else {table.dtype: bundle.manifest.files[table.file].size}
        names = {"float32": "fp32", "bfloat16": "bf16", "int8": "int8"}
        assert table.weights == {names[kind]: size for kind, size in expected.items()}, name


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
            assert file.stat().st_mode & 0o777 == 0o644, f"{file.name} cannot be read by others"


def test_the_table_is_the_adapter_of_the_codebook(mini_checkpoint: Path, mini_bundle: Path) -> None:
    from reference.weights import load_star

    star = load_star(resolve_checkpoint(str(mini_checkpoint)))
    session = open_session(Bundle.open(mini_bundle), "image_embedding")
    ids = torch.arange(star.config.vq.codebook_size)[None]
    table = run(session, {"image_ids": ids.numpy()})["inputs_embeds"]
    with torch.inference_mode():
        expected = star.image_embedding(ids)
    torch.testing.assert_close(torch.from_numpy(table), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int4"])
def test_tables_give_the_rows_that_the_checkpoint_has(bundle_of, mini_checkpoint, precision: str) -> None:
    files = resolve_checkpoint(str(mini_checkpoint))
    tensors = named_tensors(files, config_from_files(files.config_json, files.qwen_folder))
    weight = tensors["token_embedding.weight"].load()
    expected = PRECISIONS[precision].rounded("token_embedding.weight", weight)
    with closing(open_session(Bundle.open(bundle_of(precision)), "token_embedding")) as session:
        ids = np.array([[0, 5, len(weight) - 1], [7, 7, 1]])
        rows = run(session, {"input_ids": ids})["inputs_embeds"]
        np.testing.assert_array_equal(rows, expected.numpy()[ids])
        for wrong in (-1, len(weight)):
            with pytest.raises(InputError, match="not a row of the table"):
                run(session, {"input_ids": np.array([[wrong]])})


@pytest.mark.parametrize(("precision", "row_bytes"), [("bf16", 2 * 256), ("int8", 256 + 2)])
def test_a_tied_text_head_and_its_embeddings_are_stored_once(
    tmp_path: Path, precision: str, row_bytes: int
) -> None:
    """STAR-Nano's are tied, like STAR-3B's; those of the miniature are not, like STAR-7B's."""
    names = ["token_embedding", "text_head"]
    bundle = export("nano", out=tmp_path / "tied", precision=precision, components=names)
    table = Bundle.open(bundle).manifest.tables["token_embedding"]
    assert table.file == "text_head/model.onnx.data" and not (bundle / "token_embedding/table.data").exists()
    assert (bundle / table.file).stat().st_size < 1.01 * row_bytes * table.shape[0]
    checked = {row.component for rung in validate(bundle).rungs for row in rung.rows}
    assert checked == {*names, "runtime"}  # the runtime's are what the host prepares


def test_a_decoder_in_parts_computes_what_it_computes_whole(
    mini_checkpoint: Path, mini_bundle: Path, tmp_path: Path
) -> None:
    """Also: sessions chain the parts, and each part has golden tensors of its own."""
    parts = export(str(mini_checkpoint), out=tmp_path / "parts", part_bytes=300_000)
    bundle, whole = Bundle.open(parts), Bundle.open(mini_bundle)
    assert len(bundle.parts("base_ar")) > 1 and whole.parts("base_ar") == ["base_ar"]
    assert (
        max(bundle.manifest.files[w].size for p in bundle.parts("base_ar") for w in bundle.weights(p))
        < 310_000
    )
    certificate = validate(parts)
    checked = {row.component for rung in certificate.rungs for row in rung.rows}
    assert {*bundle.parts("base_ar"), *bundle.parts("stacked_ar"), "token_embedding"} <= checked
    prompt = np.arange(8).reshape(2, 4)
    settings = {"guidance": 2.0, "top_k": 20, "top_p": 0.9, "seed": 3, "tokens": 6}
    drawn = []
    for opened in (bundle, whole):
        with Star(opened) as star:
            drawn.append(star.generate_ids(prompt, **settings))
    np.testing.assert_array_equal(*drawn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_streamed_oracle_is_the_reference_with_rounded_weights(mini_checkpoint: Path, dtype) -> None:
    from reference.weights import load_star

    files = resolve_checkpoint(str(mini_checkpoint))
    star = load_star(files)
    tensors = named_tensors(files, star.config)
    precision = next(Precision(compute) for compute, found in TORCH_DTYPES.items() if found == dtype)
    streamed = streamed_star(star.config, tensors, precision, rope_bf16=True, narrow=True)
    weight = "base_ar.layers.0.mlp.up_proj.weight"
    assert streamed.get_parameter(weight).is_meta
    with resident(streamed.base_ar.layers[0]):
        torch.testing.assert_close(streamed.get_parameter(weight), star.get_parameter(weight).to(dtype))
    assert streamed.get_parameter(weight).is_meta, "weights are dropped after the block"
    image = torch.rand(1, 3, star.config.vq.image_size, star.config.vq.image_size) * 2 - 1
    ids = torch.arange(star.config.vq.image_tokens)[None]
    star = star.to(dtype)
    with torch.inference_mode():
        assert torch.equal(streamed.vq_encoder(image.to(dtype)), star.vq_encoder(image.to(dtype)))
        assert torch.equal(streamed.vq_decoder(ids), star.vq_decoder(ids))
        assert torch.equal(
            streamed.text_head(star.token_embedding(ids)), star.text_head(star.token_embedding(ids))
        )
    assert all(p.numel() <= KEPT for p in streamed.parameters() if not p.is_meta)


def test_rounded_weights_are_rounded_and_float32_ones_are_not(mini_checkpoint: Path) -> None:
    files = resolve_checkpoint(str(mini_checkpoint))
    config = config_from_files(files.config_json, files.qwen_folder)
    tensors = named_tensors(files, config)
    name = "base_ar.layers.0.mlp.up_proj.weight"
    exact = tensors[name].load()
    for precision, differs in (("fp32", False), ("bf16", True), ("int4", True)):
        star = streamed_star(config, tensors, PRECISIONS[precision], rope_bf16=True)
        with resident(star.base_ar):
            assert torch.equal(star.get_parameter(name), exact) != differs


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int4"])
def test_golden_tensors_can_prove_something(bundle_of, precision: str) -> None:
    for name in AUTOREGRESSIVE:
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
        ({"precision": "fp6"}, "int4"),
        ({"precision": "fp16", "calibrate": 2}, "quantised weights, got fp16"),
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


STOPPED = [
    "export base_ar",
    "golden tensors of stacked_ar",
    "golden tensors of whole runs",
    "files of the host",
    "what the host prepares",
]


@pytest.mark.parametrize("step", STOPPED)
def test_an_export_that_was_stopped_goes_on_and_gives_the_same_bytes(
    mini_checkpoint: Path, mini_bundle: Path, tmp_path: Path, monkeypatch, step: str
) -> None:
    """A killed process writes nothing more: what it leaves is a stage with half-written files in it."""
    done: list[str] = []
    original = publish.Stage.step

    def stopping(stage: publish.Stage, name: str, write) -> None:
        if name == step and not done:
            write()
            raise KeyboardInterrupt
        original(stage, name, write)

    out = tmp_path / "out"
    monkeypatch.setattr(publish.Stage, "step", stopping)
    with pytest.raises(KeyboardInterrupt):
        export(str(mini_checkpoint), out=out)
    assert [path.name for path in tmp_path.iterdir()] == [".out.stage"]
    with pytest.raises(InputError, match="unfinished export of something else") as error:
        export(str(mini_checkpoint), out=out, precision="bf16", components=["text_head"])
    assert "components, precision" in error.value.where and "rm -r" in error.value.fix
    with monkeypatch.context() as patch:
        patch.setattr(exporter, "code_hash", lambda: "the sources, changed")
        with pytest.raises(InputError, match="got another: code"):
            export(str(mini_checkpoint), out=out)
    done.append(step)
    written: list[str] = []
    monkeypatch.setattr(exporter, "write_component", recorded(exporter.write_component, written))
    told: dict[str, tuple[int, int]] = {}
    export(str(mini_checkpoint), out=out, progress=lambda what, *counts: told.update({what: counts}))
    checked, in_all = told["check what is done already, in bytes"]
    assert 0 < checked <= in_all
    assert not written or told["write weights, in bytes"][0] == told["write weights, in bytes"][1]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "manifest.json").read_text() == (mini_bundle / "manifest.json").read_text()
    assert ("base_ar" in written) == (step == "export base_ar"), "only what was not done is done again"


def recorded(function, names: list[str]):
    def called(model, *arguments, progress):
        names.append(model.graph.name)
        return function(model, *arguments, progress=progress)

    return called
