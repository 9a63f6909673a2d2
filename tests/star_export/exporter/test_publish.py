"""Publishing: the final name is absent, or complete. docs/bad_inputs.md 12."""

from __future__ import annotations

import errno
import os

import pytest

from engines.errors import InputError
from star_export.exporter import publish


def fill(stage, data: bytes = b"x") -> None:
    (stage / "file").write_bytes(data)


@pytest.mark.parametrize(
    "name", ["plain", "with space", "quote'\"s", "semi;colon$(touch pwned)", "ünïcode-模型"]
)
def test_any_name_is_only_a_name(tmp_path, name) -> None:
    with publish.staged(tmp_path / name) as stage:
        fill(stage)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert (tmp_path / name / "file").read_bytes() == b"x"


def test_an_empty_folder_is_taken(tmp_path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with publish.staged(out) as stage:
        fill(stage)
    assert (out / "file").exists()


def taken(tmp_path, kind):
    out = tmp_path / "out"
    if kind == "content":
        out.mkdir()
        (out / "precious").write_text("keep")
    elif kind == "file":
        out.write_text("keep")
    elif kind == "symlink":
        (tmp_path / "target").mkdir()
        out.symlink_to(tmp_path / "target")
    elif kind == "no parent":
        out = tmp_path / "absent" / "out"
    elif kind == "long":
        out = tmp_path / ("n" * 300)
    return out


@pytest.mark.parametrize("kind", ["content", "file", "symlink", "no parent", "long"])
def test_a_taken_or_impossible_place_is_refused_before_any_work(tmp_path, kind) -> None:
    out = taken(tmp_path, kind)
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    with pytest.raises(InputError) as error:
        publish.check_out(out)
    assert str(out.name)[:40] in error.value.where and error.value.fix
    with pytest.raises(InputError), publish.staged(out):
        pytest.fail("the block must not run")
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before


def test_a_read_only_parent_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(
        os, "access", lambda path, mode: False
    )  # root may write anywhere, so the mode bits show nothing here
    with pytest.raises(InputError, match="cannot be written"):
        publish.check_out(tmp_path / "out")


def test_a_full_disk_leaves_nothing(tmp_path) -> None:
    with pytest.raises(InputError) as error, publish.staged(tmp_path / "out") as stage:
        fill(stage)
        raise OSError(errno.ENOSPC, "No space left on device")
    assert "No space left" in error.value.where
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_export_leaves_nothing(tmp_path, kind) -> None:
    with pytest.raises(kind), publish.staged(tmp_path / "out") as stage:
        fill(stage)
        raise kind
    assert list(tmp_path.iterdir()) == []


def test_a_folder_filled_meanwhile_is_kept(tmp_path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError), publish.staged(out) as stage:
        fill(stage)
        out.mkdir()
        (out / "precious").write_text("keep")
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (out / "precious").read_text() == "keep"
