"""Locks: one process at a time, told at once, and none for a process that was killed."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from engines.bundle.files import atomic_file, write_atomic
from engines.bundle.lock import is_held, locked
from engines.errors import InputError

HOLD = """
import sys, time
from pathlib import Path
from engines.bundle.lock import locked
from engines.bundle.files import atomic_file
with locked(Path(sys.argv[1]), what="export"), atomic_file(Path(sys.argv[2])) as file:
    file.write(b"half")
    file.flush()
    print("held", flush=True)
    time.sleep(60)
"""


def test_another_process_is_told_who_holds_it_and_what_it_does(tmp_path: Path) -> None:
    lock, other = tmp_path / "lock", tmp_path / "file"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, lock, other], stdout=subprocess.PIPE)
    assert holder.stdout and holder.stdout.readline() == b"held\n"
    assert is_held(lock)
    with (
        pytest.raises(InputError, match=rf"Another export.*\n.*by process {holder.pid}\b"),
        locked(lock, what="export"),
    ):
        pytest.fail("it is held")
    write_atomic(other, b"whole")
    assert len(list(tmp_path.glob(".file.*.tmp"))) == 1, "that of a process that lives stays"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert not is_held(lock) and lock.exists()
    with locked(lock, what="export"):
        assert lock.read_text() == f"{os.getpid()}\n"
    write_atomic(other, b"anew")
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "what the killed process left is gone"


def test_a_lock_in_one_process_is_one_lock(tmp_path: Path) -> None:
    with locked(tmp_path / "lock", what="build"):
        with pytest.raises(InputError, match="Another build"), locked(tmp_path / "lock", what="build"):
            pytest.fail("it is held")
        assert is_held(tmp_path / "lock")
    assert not list(tmp_path.iterdir())


def test_a_folder_without_room_for_a_lock_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be locked"), locked(tmp_path / "no" / "lock", what="build"):
        pytest.fail("there is no folder")


def test_two_files_with_names_that_begin_alike_do_not_clear_each_others(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "a.b") as first:
        write_atomic(tmp_path / "a", b"x")
        first.write(b"y")
    assert (tmp_path / "a.b").read_bytes() == b"y"


def test_a_full_disk_takes_the_number_and_not_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def full(descriptor: int, data: bytes) -> int:
        tried.append(data)
        assert len(tried) < 3, "the lock is tried again and again"
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with locked(tmp_path / "lock", what="export"):
        assert is_held(tmp_path / "lock") and len(tried) == 1
