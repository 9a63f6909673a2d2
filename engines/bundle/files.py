"""Files on disk: safe paths, hashes of opened files, and atomic writes.

This module does not interpret contents. A file under its final name is always complete: it is written to a
temporary file in the same folder, synced, renamed, and then the folder is synced.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ..errors import InputError
from ..progress import Tick, uncounted

MANIFEST = "manifest.json"  # in a bundle's folder
MANIFEST_LIMIT_BYTES = 16 << 20
_OPEN_FLAGS = (
    os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
)
_PIECE_BYTES = 1 << 20
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFLNK: "a symbolic link",
}


def check_relative(relative: str, *, where: str) -> None:
    """Raise InputError unless `relative` is a plain relative path with `/` as its separator."""
    parts = relative.split("/")
    plain = all(part not in ("", ".", "..") for part in parts)
    if not plain or any(c in "\\:" or ord(c) < 32 for c in relative):
        raise InputError(
            "This path is not allowed",
            fix="restore the file that lists this path; it must not be edited by hand",
            where=f"{where}: expected a relative path of plain names inside the folder, got {relative!r:.80}",
        )


def resolve_inside(root: Path, relative: str, *, where: str) -> Path:
    """Return `root/relative` if it is a regular file with one hard link, reached through no symbolic link.

    Opens nothing. Raises InputError for anything else: `..`, an absolute path, a symbolic or hard link, a
    FIFO, a folder, a device, or a missing file.
    """
    check_relative(relative, where=where)
    path = Path(root)
    for part in PurePosixPath(relative).parts:
        path = path / part
        if path.is_symlink():
            raise _refusal(path, "a symbolic link", where)
    check_regular(path, where=where)
    return path


def check_regular(path: Path, *, where: str) -> os.stat_result:
    """Return the `lstat` of a regular file with one hard link; raises InputError for any other path.

    Opens nothing.
    """
    try:
        status = os.lstat(path)
    except (OSError, ValueError) as error:
        raise InputError(
            "This file cannot be read",
            where=f"{where}: {path}: expected a file, got {reason(error)}",
            fix="check the path, or restore the file",
        ) from None
    _check_kind(status, path, where)
    return status


@contextlib.contextmanager
def open_regular(path: Path, *, where: str) -> Iterator[BinaryIO]:
    """Open `path` for reading, and apply `check_regular` to the opened file too. Never blocks on a FIFO."""
    check_regular(path, where=where)
    try:
        file = os.fdopen(os.open(path, _OPEN_FLAGS), "rb")
    except OSError as error:
        raise InputError(
            "This file cannot be opened",
            where=f"{where}: {path}: {reason(error)}",
            fix="check the file and its permissions",
        ) from None
    with file:
        _check_kind(os.fstat(file.fileno()), path, where)
        yield file


def read_regular(path: Path, *, limit_bytes: int, where: str) -> bytes:
    """Read a regular file of at most `limit_bytes`. Raises InputError."""
    with open_regular(path, where=where) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit_bytes:
            raise InputError(
                "This file is too large",
                where=f"{where}: {path}: expected at most {limit_bytes} bytes, got {size}",
                fix="check that this is the right file",
            )
        return file.read(size)  # not the limit, which Python would allocate


def read_text(path: Path, *, limit_bytes: int, where: str) -> str:
    """Read a regular file of at most `limit_bytes` as UTF-8. Raises InputError."""
    try:
        return read_regular(path, limit_bytes=limit_bytes, where=where).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            "This file is not text in UTF-8",
            where=f"{where}: {path}: byte {error.start} is not valid UTF-8",
            fix="restore the file",
        ) from None


def sha256_of(path: Path, *, where: str = "hash", tick: Tick = uncounted) -> str:
    """Return the SHA-256 (hex) of a regular file, ticking in bytes. Raises InputError."""
    with open_regular(path, where=where) as file:
        return sha256_from_file(file, tick=tick)


def sha256_from_file(file: BinaryIO, *, tick: Tick = uncounted) -> str:
    """Return the SHA-256 (hex) of the rest of an open file, ticking in bytes."""
    digest = hashlib.sha256()  # hashlib.file_digest needs Python 3.11, and JetPack 6 has 3.10
    while piece := file.read(_PIECE_BYTES):
        digest.update(piece)
        tick(len(piece))
    return digest.hexdigest()


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a binary file that replaces `path` when the block ends without an error.

    Until then the old file stays. An exception in the block is passed on and leaves no temporary file behind.
    The file's mode follows the process's umask. Raises InputError when the folder cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(temporary, flags, 0o666)
    except (OSError, ValueError) as error:
        raise _not_written(path, error) from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise _not_written(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically. Raises InputError."""
    with atomic_file(path) as file:
        file.write(data)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut. Does nothing on Windows."""
    with contextlib.suppress(PermissionError):  # Windows cannot open folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def reason(error: Exception) -> str:
    """The operating system's message for `error`, without the path."""
    return getattr(error, "strerror", None) or str(error)


def _check_kind(status: os.stat_result, path: Path, where: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise _refusal(path, _KINDS.get(stat.S_IFMT(status.st_mode), "a special file"), where)
    if status.st_nlink > 1:
        raise _refusal(path, f"a hard link ({status.st_nlink} names)", where)


def _refusal(path: Path, got: str, where: str) -> InputError:
    return InputError(
        "This is not a plain regular file",
        where=f"{where}: {path}: expected a regular file with one hard link, got {got}",
        fix="replace it with a copy of the file",
    )


def _not_written(path: Path, error: Exception) -> InputError:
    return InputError(
        "This file cannot be written",
        where=f"{path}: {reason(error)}",
        fix="check the folder, its permissions and the free space, or choose another path",
    )
