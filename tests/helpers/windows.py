"""What Windows does otherwise with files, as far as this system can play it.

Open and mapped files are neither removed nor replaced, folders are not opened, a rename replaces no folder,
and there are no fcntl, resource, /proc and interval timers. Locks are those of `msvcrt`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from engines.bundle import held


def in_use(path: str | os.PathLike) -> bool:
    """Whether this process has the file open, or mapped."""
    real = os.path.realpath(path)
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}") == real:
                return True
    return any(line.rstrip("\n").endswith(f" {real}") for line in Path("/proc/self/maps").open())


def become_windows(patch: pytest.MonkeyPatch) -> None:
    """Let files behave as on Windows until `patch` is undone."""
    import fcntl

    really = {name: getattr(os, name) for name in ("open", "unlink", "replace", "rename")}

    def refused(path: str | os.PathLike) -> PermissionError:
        return PermissionError(errno.EACCES, "The process cannot access the file", os.fspath(path))

    def open_file(path, flags, mode=0o777, *, dir_fd=None) -> int:
        if os.path.isdir(path):
            raise refused(path)
        return really["open"](path, flags, mode, dir_fd=dir_fd)

    def unlink(path, *, dir_fd=None) -> None:
        if in_use(path):
            raise refused(path)
        really["unlink"](path, dir_fd=dir_fd)

    def replace(source, target, **options) -> None:
        if in_use(source) or in_use(target) or os.path.isdir(target):
            raise refused(target)
        really["replace"](source, target, **options)

    def rename(source, target, **options) -> None:
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, "Cannot create a file when that file already exists", target)
        if any(in_use(path) for path in [Path(source), *Path(source).rglob("*")]):
            raise refused(source)
        really["rename"](source, target, **options)

    def locking(descriptor: int, mode: int, number: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PermissionError(errno.EACCES, "Permission denied") from None

    for name, fake in (("open", open_file), ("unlink", unlink), ("replace", replace), ("rename", rename)):
        patch.setattr(os, name, fake)
    patch.setattr(tempfile, "TemporaryFile", tempfile.NamedTemporaryFile)
    patch.setattr(shutil, "_use_fd_functions", False)
    patch.setitem(sys.modules, "msvcrt", SimpleNamespace(LK_NBLCK=2, locking=locking))
    patch.setitem(sys.modules, "fcntl", None)
    patch.setitem(sys.modules, "resource", None)
    patch.delattr(signal, "setitimer")
    patch.setattr(held, "DESCRIPTORS", Path("/proc/there-is-none"))
    patch.setattr(sys, "platform", "win32")
