"""Files: whole or absent under their name; only regular files inside the folder are read."""

import os
import socket

import pytest

from engines.bundle.files import (
    atomic_file,
    check_relative,
    open_regular,
    read_regular,
    resolve_inside,
    sha256_of,
    write_atomic,
)
from engines.errors import InputError


def test_a_written_file_is_whole_and_nothing_else_stays(tmp_path):
    write_atomic(tmp_path / "a.bin", b"old")
    write_atomic(tmp_path / "a.bin", b"new")
    assert (tmp_path / "a.bin").read_bytes() == b"new" and os.listdir(tmp_path) == ["a.bin"]


def test_a_failed_write_keeps_the_old_file(tmp_path):
    write_atomic(tmp_path / "a.bin", b"old")
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "a.bin") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert (tmp_path / "a.bin").read_bytes() == b"old" and os.listdir(tmp_path) == ["a.bin"]


def test_a_full_disk_is_an_input_error_and_keeps_the_old_file(tmp_path):
    write_atomic(tmp_path / "a.bin", b"old")
    with pytest.raises(InputError, match="No space left"), atomic_file(tmp_path / "a.bin"):
        raise OSError(28, "No space left on device")
    assert (tmp_path / "a.bin").read_bytes() == b"old" and os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("path", ["absent/a.bin", "x" * 300, "nul\0.bin"])
def test_a_place_that_cannot_be_written_is_named(tmp_path, path):
    with pytest.raises(InputError, match="cannot be written"):
        write_atomic(tmp_path / path, b"x")


def test_a_folder_is_not_overwritten_by_a_file(tmp_path):
    (tmp_path / "d").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        write_atomic(tmp_path / "d", b"x")
    assert os.listdir(tmp_path) == ["d"]


@pytest.mark.parametrize(
    "relative",
    [
        "../x",
        "/etc/passwd",
        "a/../../b",
        "C:\\x",
        "C:x",
        "a\\b",
        "x\0y",
        "",
        ".",
        "a//b",
        "./a",
        "a/",
        "a\nb",
    ],
)
def test_paths_that_leave_or_are_not_plain_are_refused(relative):
    with pytest.raises(InputError, match="not allowed"):
        check_relative(relative, where="here")


def make(kind, path):
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(str(path))


@pytest.mark.parametrize(
    "kind, said",
    [
        ("FIFO", "a FIFO"),
        ("folder", "a folder"),
        ("device", "a device"),
        ("socket", "a socket"),
    ],
)
def test_only_regular_files_are_opened(tmp_path, kind, said, monkeypatch):
    make(kind, tmp_path / "f")
    monkeypatch.setattr(os, "open", lambda *a, **k: pytest.fail("opened"))
    with pytest.raises(InputError, match=said):
        resolve_inside(tmp_path, "f", where="here")
    with pytest.raises(InputError, match=said), open_regular(tmp_path / "f", where="here"):
        pass


def test_a_device_is_refused_without_opening(monkeypatch):
    from pathlib import Path

    monkeypatch.setattr(os, "open", lambda *a, **k: pytest.fail("opened"))
    with pytest.raises(InputError, match="a device"), open_regular(Path("/dev/zero"), where="here"):
        pass


def test_a_parent_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real/f").write_bytes(b"x")
    (tmp_path / "link").symlink_to("real")
    assert resolve_inside(tmp_path, "real/f", where="here") == tmp_path / "real/f"
    expected = "link: expected a regular file, got a symbolic link in place of a folder"
    with pytest.raises(InputError, match=expected):
        resolve_inside(tmp_path, "link/f", where="here")


def test_absent_and_large_files_are_named(tmp_path):
    (tmp_path / "f").write_bytes(b"12345")
    with pytest.raises(InputError, match="No such file"):
        resolve_inside(tmp_path, "g", where="here")
    with pytest.raises(InputError, match="at most 4 bytes, got 5"):
        read_regular(tmp_path / "f", limit_bytes=4, where="here")
    assert read_regular(tmp_path / "f", limit_bytes=5, where="here") == b"12345"


def test_sha256_is_that_of_the_bytes(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256_of(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
