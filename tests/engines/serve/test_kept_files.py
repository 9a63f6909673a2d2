"""Files that are sent as addresses: bounded in number, bytes and time, and refused on a full disk."""

from __future__ import annotations

import errno
import tempfile
import time
from pathlib import Path

import pytest

from engines.serve.kept_files import LOCK, PREFIX, KeptFiles
from engines.serve.refusals import Refused
from tests.helpers.served import ask, serving


def test_the_oldest_make_room(tmp_path):
    files = KeptFiles(tmp_path, limit=3, limit_bytes=100)
    names = [files.keep(b"a" * 10, "png") for _ in range(5)]
    assert [files.read(name) is not None for name in names] == [False, False, True, True, True]
    large = files.keep(b"b" * 90, "webp")
    assert files.read(names[-1]) is not None and files.read(names[-2]) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([names[-1], large])


def test_they_are_gone_after_a_while(tmp_path):
    files = KeptFiles(tmp_path, seconds=0.05)
    name = files.keep(b"a", "png")
    time.sleep(0.1)
    assert files.read(name) is None and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["../secret", "", "x.png", "a" * 22 + ".gif"])
def test_only_names_that_were_given_out_are_read(tmp_path, name):
    assert KeptFiles(tmp_path).read(name) is None


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, monkeypatch):
    files, write = KeptFiles(tmp_path), Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        write(path, data[:1])
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(Refused) as caught:
        files.keep(b"abc", "png")
    assert caught.value.status == 507 and "No space left" in caught.value.where
    assert not list(tmp_path.iterdir())
    with serving() as server:
        reply = ask(server, "/v1/images/generations", {"prompt": "a", "response_format": "url"})
        assert reply.status == 507 and reply.error["param"] == "response_format"
        assert ask(server, "/v1/images/generations", {"prompt": "a"}).status == 200


def test_closing_removes_them():
    files = KeptFiles()
    files.keep(b"a", "png")
    files.close()
    assert not files.folder.exists()


def test_the_next_server_removes_what_a_killed_one_left(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left = tmp_path / f"{PREFIX}killed"
    left.mkdir()
    (left / LOCK).touch()
    (left / "image.png").touch()
    (tmp_path / f"{PREFIX}of-something-else").mkdir()
    running = KeptFiles()
    name = running.keep(b"a", "png")
    later = KeptFiles()
    assert not left.exists() and (tmp_path / f"{PREFIX}of-something-else").is_dir()
    assert running.read(name) == b"a"
    for files in (running, later):
        files.close()
        assert not files.folder.exists()
