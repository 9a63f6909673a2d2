"""Bundle: nothing in it is used before it is what the manifest says (docs/bad_inputs.md rows 19 to 22)."""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from engines.bundle.held import PREFIX
from engines.bundle.manifest import manifest_from_json
from engines.bundle.reader import Bundle
from engines.errors import InputError, UsageError
from tests.helpers.sealed import edit_sealed
from tests.helpers.tiny_bundle import write_tiny_bundle


@pytest.fixture
def root(tmp_path):
    return write_tiny_bundle(tmp_path / "b")


def edit_manifest(root, change):
    edit_sealed(root / "manifest.json", change)


def refused(root, match):
    with pytest.raises(InputError, match=match) as caught:
        Bundle.open(root)
    assert len(str(caught.value).splitlines()) == 3
    return str(caught.value)


def test_a_good_bundle_opens_and_gives_verified_paths(root):
    bundle = Bundle.open(root)
    assert bundle.manifest.model.name == "tiny"
    assert bundle.file("tokenizer.json") == root / "tokenizer.json"
    assert bundle.graph("token_embedding") == root / "token_embedding/model.onnx"
    assert bundle.weights("token_embedding") == ["token_embedding/model.onnx.data"]
    bundle.verify()


def test_a_file_is_hashed_once_and_again_only_when_it_changed(root, monkeypatch):
    import engines.bundle.reader as module

    bundle, hashed = Bundle.open(root), []
    real = module.sha256_from_file
    monkeypatch.setattr(
        module,
        "sha256_from_file",
        lambda file, **options: hashed.append(Path(file.name).name) or real(file, **options),
    )
    for _ in range(3):
        bundle.file("tokenizer.json")
    assert hashed == ["tokenizer.json"]
    (root / "tokenizer.json").write_text("[]")
    with pytest.raises(InputError, match="sha256"):
        bundle.file("tokenizer.json")


# Row 19
def test_manifest_missing(root):
    (root / "manifest.json").unlink()
    refused(root, "manifest.json")


def test_not_a_folder(root, tmp_path):
    refused(tmp_path / "nowhere", "got nothing")
    refused(root / "manifest.json", "got a file")


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda t: t[: len(t) // 2], "strict JSON"),
        (lambda t: t.replace('"schema": 6', '"schema": 1'), "schema: expected 6, got 1"),
        (lambda t: t.replace('"schema": 6', '"schema": true'), "expected int"),
        (lambda t: t.replace('"schema": 6', '"schema": 6, "extra": 0'), "no such key"),
        (lambda t: t.replace('"schema": 6', '"schema": 6, "schema": 6'), "duplicate key"),
        (lambda t: t.replace("1.05", "NaN"), "NaN is not a number"),
        (lambda t: t.replace("1.05", "1e999"), "a finite number"),
        (lambda t: "[]", "expected an object"),
        (lambda t: "[" * 200_000, "strict JSON"),
        (lambda t: "", "strict JSON"),
        (lambda t: "\ufeff" + t, "strict JSON"),
    ],
)
def test_a_bad_manifest_is_refused(root, change, match):
    text = (root / "manifest.json").read_text()
    (root / "manifest.json").write_text(change(text))
    refused(root, match)


def test_no_flipped_bit_changes_what_a_manifest_says(root):
    """Flips that are read at all leave its meaning as it is, such as the case of the E of a number."""
    data = (root / "manifest.json").read_bytes()
    right, kept = manifest_from_json(data.decode(), where=""), 0
    for bit in range(0, 8 * len(data), 5):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with contextlib.suppress(InputError, UnicodeDecodeError):
            assert manifest_from_json(flipped.decode(), where="") == right, bit
            kept += 1
    assert kept < 10


def test_a_manifest_without_its_hash_or_of_an_older_schema_is_refused(root):
    path = root / "manifest.json"
    text = path.read_text()
    path.write_text(text.replace("content_sha256", "content_sha25"))
    refused(root, "expected no such key")
    path.write_text(text.replace('"image_size": ', '"image_size": 1'))
    assert "restore the file" in refused(root, "was changed after it was written")
    edit_manifest(root, lambda v: v.update(schema=5))
    assert "export the bundle again" in refused(root, "schema: expected 6, got 5")


CALIBRATION = {"prompts": 2, "edits": 1, "questions": 1, "images": 0, "sha256": "0" * 64}


def test_what_a_bundle_was_calibrated_on_is_read(root):
    assert Bundle.open(root).manifest.calibration is None
    edit_manifest(root, lambda v: v.__setitem__("calibration", CALIBRATION))
    assert Bundle.open(root).manifest.calibration.prompts == 2


@pytest.mark.parametrize(
    "found, match",
    [
        ([], "calibration: expected CalibrationSpec or NoneType, got"),
        (CALIBRATION | {"extra": 0}, "calibration: extra: expected no such key"),
        (CALIBRATION | {"prompts": "2"}, "calibration: prompts: expected int"),
        ({"prompts": 2}, "calibration: edits: expected this key"),
    ],
)
def test_a_calibration_that_is_not_one_is_refused(root, found, match):
    edit_manifest(root, lambda v: v.__setitem__("calibration", found))
    refused(root, match)


def test_a_manifest_that_is_not_utf8_or_huge_is_refused(root, monkeypatch):
    (root / "manifest.json").write_bytes(b"\xff\xfe{}")
    refused(root, "UTF-8")
    monkeypatch.setattr("engines.bundle.reader.MANIFEST_LIMIT_BYTES", 3)
    refused(root, "at most 3 bytes")


@pytest.mark.parametrize("field", ["graph", "golden"])
def test_a_component_whose_file_is_not_listed_is_refused(root, field):
    edit_manifest(root, lambda v: v["components"]["token_embedding"].__setitem__(field, "../model.onnx"))
    refused(root, f"token_embedding: {field}: expected a key of files")


# Row 20
@pytest.mark.parametrize(
    "relative", ["../x", "/dev/zero", "a/../../b", "C:\\x", "x\0y", "", ".", "manifest.json", "plans/x"]
)
def test_a_listed_path_that_is_not_plain_is_refused_unopened(root, relative, monkeypatch):
    edit_manifest(root, lambda v: v["files"].__setitem__(relative, v["files"]["tokenizer.json"]))
    opened, real = [], os.open
    monkeypatch.setattr(os, "open", lambda path, *a, **k: opened.append(str(path)) or real(path, *a, **k))
    refused(root, "not (allowed|be listed)")
    assert opened == [str(root / "manifest.json")]


@pytest.mark.parametrize("kind", ["fifo", "folder", "zero"])
@pytest.mark.parametrize("name", ["tokenizer.json", "manifest.json", "token_embedding/model.onnx.data"])
def test_a_listed_file_that_is_not_regular_is_refused_unopened(root, tmp_path, kind, name, monkeypatch):
    path, outside = root / name, tmp_path / "outside"
    path.rename(outside)
    {
        "fifo": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "zero": lambda: path.symlink_to("/dev/zero"),
    }[kind]()
    real = os.open
    monkeypatch.setattr(
        os, "open", lambda p, *a, **k: pytest.fail("opened") if str(p) == str(path) else real(p, *a, **k)
    )
    refused(root, "expected a regular file, got a ")


def test_a_parent_folder_that_is_a_link_is_refused(root, tmp_path):
    (root / "token_embedding").rename(tmp_path / "elsewhere")
    (root / "token_embedding").symlink_to(tmp_path / "elsewhere")
    refused(root, "symbolic link")


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_links_to_the_files_are_read_as_the_files_and_hashed(root, tmp_path, link):
    """A hub's cache and `cp -al` make such folders: only the bytes count."""
    (tmp_path / "store").mkdir()
    for i, path in enumerate([path for path in root.rglob("*") if path.is_file()]):
        path.rename(tmp_path / "store" / str(i))
        link(tmp_path / "store" / str(i), path)
    bundle = Bundle.open(root)
    bundle.verify()
    with bundle.loading("token_embedding") as path:
        assert path.read_bytes() == (root / "token_embedding/model.onnx").read_bytes()
    real = (root / "tokenizer.json").resolve()
    real.write_bytes(b" " + real.read_bytes()[1:])
    with pytest.raises(InputError, match="sha256"):
        bundle.read("tokenizer.json")


def test_what_other_programs_leave_is_ignored_by_name(root):
    for name in (
        ".DS_Store",
        "desktop.ini",
        ".gitattributes",
        "README.md",
        "._model",
        ".cache/huggingface/x",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    Bundle.open(root).verify()
    (root / "model.bin").write_text("x")
    refused(root, "not listed: model.bin")


# Row 26
def exchange(folder, other):
    """Put `other` in the place of `folder`, and the reverse: no file in them notices."""
    aside = folder.with_name("aside")
    folder.rename(aside)
    other.rename(folder)
    aside.rename(other)


@pytest.mark.parametrize("of", ["token_embedding", "."])
def test_a_folder_that_is_exchanged_and_put_back_while_it_is_loaded_changes_nothing(root, tmp_path, of):
    folder, other = (root / of).resolve(), tmp_path / "other"
    right = (root / "token_embedding/model.onnx.data").read_bytes()
    shutil.copytree(folder, other)
    (other / "token_embedding/model.onnx.data" if of == "." else other / "model.onnx.data").write_bytes(b"no")
    bundle = Bundle.open(root)
    with bundle.loading("token_embedding") as path:
        exchange(folder, other)
        assert (path.parent / "model.onnx.data").read_bytes() == right
        exchange(folder, other)
    assert not path.exists() and not path.parent.exists()


def test_a_file_that_is_written_to_while_it_is_loaded_is_refused(root):
    data = root / "token_embedding/model.onnx.data"
    with (
        pytest.raises(InputError, match=r"model\.onnx\.data"),
        Bundle.open(root).loading("token_embedding"),
        data.open("r+b") as file,
    ):
        first = file.read(1)
        file.seek(0)
        file.write(bytes([first[0] ^ 1]))
        file.flush()


def test_links_that_a_killed_process_left_are_removed(root, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left, ours = tmp_path / f"{PREFIX}4194305-x", tmp_path / f"{PREFIX}{os.getpid()}-x"
    left.mkdir()
    ours.mkdir()
    with Bundle.open(root).loading("token_embedding"):
        assert not left.exists() and ours.exists()


# Row 21
@pytest.mark.parametrize(
    "name",
    [
        "token_embedding/model.onnx",
        "token_embedding/model.onnx.data",
        "token_embedding/golden.safetensors",
        "tokenizer.json",
    ],
)
def test_one_flipped_bit_anywhere_is_refused_with_both_hashes(root, name):
    data = bytearray((root / name).read_bytes())
    data[len(data) // 2] ^= 1
    (root / name).write_bytes(data)
    bundle = Bundle.open(root)
    expected = bundle.manifest.files[name].sha256[:16]
    with pytest.raises(InputError, match=f"expected sha256 {expected}..., got [0-9a-f]{{16}}"):
        bundle.file(name)
    with pytest.raises(InputError, match="sha256"):
        bundle.verify()


def test_flipped_weights_stop_the_graph(root):
    data = root / "token_embedding/model.onnx.data"
    data.write_bytes(b"\1" + data.read_bytes()[1:])
    with pytest.raises(InputError, match="model.onnx.data: expected sha256"):
        Bundle.open(root).graph("token_embedding")


# Row 22
def test_absent_and_unlisted_files_are_both_named(root):
    (root / "tokenizer.json").unlink()
    (root / "token_embedding/stray.bin").write_bytes(b"x")
    refused(root, "absent: tokenizer.json; not listed: token_embedding/stray.bin")


def test_an_unlisted_link_or_fifo_is_named(root):
    os.mkfifo(root / "pipe")
    (root / "link").symlink_to("/etc")
    refused(root, "absent: none; not listed: link, pipe")


def test_plans_and_certificates_need_not_be_listed(root):
    for name in ("plans/sm_86", "certificates"):
        (root / name).mkdir(parents=True)
        (root / name / "x").write_bytes(b"x")
    Bundle.open(root)


def test_a_truncated_file_is_refused_by_size_at_open(root):
    data = root / "token_embedding/model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1])
    refused(root, "expected 128 bytes, got 127")


def test_unknown_names_are_answered_with_the_valid_ones(root):
    bundle = Bundle.open(root)
    with pytest.raises(UsageError, match="one of token_embedding, got 'token_embeding'"):
        bundle.component("token_embeding")
    with pytest.raises(InputError, match="no such file"):
        bundle.file("../x")


def test_verifying_tells_how_far_it_is(root):
    bundle, told = Bundle.open(root), []
    bundle.file("tokenizer.json")  # hashed already, and counted all the same
    bundle.verify(lambda *call: told.append(call))
    total = sum(file.size for file in bundle.manifest.files.values())
    assert told[-1] == ("hash every file, in bytes", total, total)
