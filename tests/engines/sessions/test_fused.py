"""What ONNX Runtime fused is kept for the next start, and only used while its record holds.

docs/bad_inputs.md 59, 60.
"""

import os
import shutil

import numpy as np
import pytest

from engines.bundle.lock import locked
from engines.bundle.reader import Bundle
from engines.errors import InputError
from engines.runtime.kv_cache import cache_buffers
from engines.sessions import fused, open_session
from engines.sessions import onnxruntime as module
from tests.helpers.sealed import edit_sealed

GRAPH = "base_ar"


@pytest.fixture
def root(bundle_of, tmp_path, monkeypatch):
    """A bundle in int4 whose decoders count as large."""
    monkeypatch.setattr(fused, "WORTH_BYTES", 1)
    return shutil.copytree(bundle_of("int4"), tmp_path / "b", ignore=shutil.ignore_patterns("plans"))


@pytest.fixture
def loaded(monkeypatch):
    """The graphs that ONNX Runtime loads, and where it saves what it fuses, in order."""
    found, inner = [], module._inference_session

    def spy(runtime, path, *rest, save_to, **options):
        found.append((path.resolve(), save_to))
        return inner(runtime, path, *rest, save_to=save_to, **options)

    monkeypatch.setattr(module, "_inference_session", spy)
    return found


def opened(root):
    return open_session(Bundle.open(root), GRAPH)


def step_of(session):
    """Hidden states and caches after two positions."""
    rng = np.random.default_rng(0)
    caches = cache_buffers(session, rows=2, capacity_tokens=8)
    size = session.spec.outputs[0].shape[-1]
    feeds = {
        "inputs_embeds": rng.standard_normal((2, 2, size), dtype=np.float32),
        "position_ids": np.tile(np.arange(2), (3, 2, 1)),
        "write_indices": np.zeros(2, np.int64),
    }
    buffers = caches | {"hidden_states": session.buffer((2, 2, size), "float32")}
    for name, value in feeds.items():
        buffers[name] = session.buffer(value.shape, str(value.dtype))
        buffers[name].write(value)
    session.bind(buffers)()
    return {name: buffer.read().copy() for name, buffer in buffers.items()}


def files_of(root):
    return sorted(path.relative_to(root).as_posix() for path in (root / "plans").rglob("*"))


def test_the_second_start_loads_what_the_first_one_kept_and_computes_the_same_bits(root, loaded):
    first, second = (step_of(opened(root)) for _ in range(2))
    place = root / fused.FOLDER / GRAPH
    assert [path for path, _ in loaded] == [root / GRAPH / "twin.onnx", place / fused.GRAPH]
    assert sorted(os.listdir(place)) == sorted((fused.RECORD, fused.GRAPH, fused.WEIGHTS))
    assert place.stat().st_mode & 0o777 == 0o755
    for name, value in first.items():
        np.testing.assert_array_equal(second[name], value, err_msg=name)


def test_the_kept_graph_has_fused_products_and_does_without_the_bundles_weights(root, loaded):
    import onnx

    opened(root)
    kept = onnx.load(root / fused.FOLDER / GRAPH / fused.GRAPH, load_external_data=False)
    operators = [node.op_type for node in kept.graph.node]
    assert "MatMulNBits" in operators and "DequantizeLinear" not in operators
    weights = root / GRAPH / "model.onnx.data"
    weights.write_bytes(bytes(weights.stat().st_size))  # it would be refused if it were read
    step_of(opened(root))


def test_only_quantised_products_are_kept_and_only_on_the_fast_path(root, bundle_of):
    bundle = Bundle.open(root)
    kept = {name for name in bundle.manifest.components if fused.worth_keeping(bundle, name)}
    assert kept == bundle.manifest.components.keys() - {"vq_encoder", "vq_decoder"}  # convolutions
    assert not fused.worth_keeping(Bundle.open(bundle_of("fp32")), GRAPH)
    open_session(bundle, GRAPH, backend="onnxruntime-exact")
    assert not (root / "plans").exists()


def test_a_small_decoder_is_not_kept(root, monkeypatch):
    monkeypatch.setattr(fused, "WORTH_BYTES", 64 << 20)
    opened(root)
    assert not (root / "plans").exists()


@pytest.mark.parametrize("name", [fused.GRAPH, fused.WEIGHTS])
def test_a_changed_file_is_refused_with_what_to_remove(root, name):
    opened(root)
    path = root / fused.FOLDER / GRAPH / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="has changed since it was made") as caught:
        opened(root)
    assert str(path) in str(caught.value) and f"remove the folder {path.parent}" in str(caught.value)


def test_a_link_in_place_of_a_file_is_read_as_the_file_and_hashed(root, tmp_path):
    opened(root)
    path, elsewhere = root / fused.FOLDER / GRAPH / fused.WEIGHTS, tmp_path / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    with pytest.raises(InputError, match="in another folder than their graph"):  # ONNX Runtime refuses it
        opened(root)
    (path.parent / fused.GRAPH).rename(tmp_path / "graph")  # a hub's cache has all files in one folder
    (path.parent / fused.GRAPH).symlink_to(tmp_path / "graph")
    opened(root)
    elsewhere.write_bytes(bytes(len(elsewhere.read_bytes())))
    with pytest.raises(InputError, match="has changed since it was made"):
        opened(root)


def test_a_damaged_record_is_refused(root):
    opened(root)
    (root / fused.FOLDER / GRAPH / fused.RECORD).write_text('{"schema": 2, "onnxruntime"')
    with pytest.raises(InputError, match=fused.RECORD) as caught:
        opened(root)
    assert caught.value.fix == f"remove the folder {root / fused.FOLDER / GRAPH}"


@pytest.mark.parametrize(
    "changed", [{"onnxruntime": "0.1"}, {"options": {}}, {"made_from": {}}, {"files": {}}, {"schema": 0}]
)
def test_what_was_made_by_or_from_something_else_is_made_anew(root, loaded, changed):
    opened(root)
    path = root / fused.FOLDER / GRAPH / fused.RECORD
    right = path.read_text()
    edit_sealed(path, lambda contents: contents.update(changed))
    opened(root)
    assert [path.parent for path, _ in loaded] == [root / GRAPH] * 2
    assert path.read_text() == right


def test_a_folder_that_cannot_be_written_only_costs_time(root, loaded, monkeypatch):
    (root / "plans").mkdir()
    (root / fused.FOLDER).write_text("a file in the way")
    step_of(opened(root))
    assert [save_to for _, save_to in loaded] == [None]


def test_a_full_disk_only_costs_time(root, loaded, monkeypatch):
    monkeypatch.setattr(fused, "free_disk", lambda folder: 1000)
    step_of(opened(root))
    assert [save_to for _, save_to in loaded] == [None]


def test_a_disk_that_fills_up_while_onnxruntime_writes_only_costs_time(root, monkeypatch):
    inner = module._inference_session

    def full(runtime, path, *rest, save_to, **options):
        if save_to:
            save_to.write_bytes(b"half a graph")
            raise InputError("ONNX Runtime cannot load this graph", where="no space left", fix="none")
        return inner(runtime, path, *rest, save_to=save_to, **options)

    monkeypatch.setattr(module, "_inference_session", full)
    step_of(opened(root))
    assert files_of(root) == ["plans/onnxruntime"]


def test_a_graph_that_cannot_be_loaded_is_refused_as_without_keeping(root):
    graph, manifest = root / GRAPH / "twin.onnx", root / "manifest.json"
    graph.write_bytes(bytes(graph.stat().st_size))
    import hashlib

    sha256 = hashlib.sha256(graph.read_bytes()).hexdigest()
    edit_sealed(manifest, lambda value: value["files"][f"{GRAPH}/twin.onnx"].update(sha256=sha256))
    with pytest.raises(InputError, match="cannot load this graph"):
        opened(root)
    assert files_of(root) == ["plans/onnxruntime"]


def test_nothing_is_kept_while_another_process_writes_and_an_abandoned_stage_is_taken_over(root, loaded):
    stage = root / fused.FOLDER / f".{GRAPH}.stage"
    stage.mkdir(parents=True)
    (stage / fused.GRAPH).write_bytes(b"being written")
    with locked(root / fused.FOLDER / f".{GRAPH}.lock", what="process"):
        opened(root)
    assert loaded[-1][1] is None and (stage / fused.GRAPH).read_bytes() == b"being written"
    opened(root)
    assert loaded[-1][1] and not stage.exists() and (root / fused.FOLDER / GRAPH / fused.RECORD).exists()


def test_the_bundles_weights_are_checked_before_anything_is_kept(root):
    weights = root / GRAPH / "model.onnx.data"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    with pytest.raises(InputError, match="changed since the export"):
        opened(root)
    assert files_of(root) == ["plans/onnxruntime"]
