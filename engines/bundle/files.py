"""Files on disk: safe paths, hashes of what was opened, and writes that are whole or absent.

Knows nothing of what is in a file. A file under its final name is complete: temporary file in the same folder, fsync, rename,
fsync of the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ..errors import InputError

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
    """Refuse a name that is not a plain relative path with `/`: InputError."""
    parts = relative.split("/")
    plain = all(part not in ("", ".", "..") for part in parts)
    if not plain or any(c in "\\:" or ord(c) < 32 for c in relative):
        raise InputError(
            "This path may not be used",
            fix="restore the file that names it; it is not edited by hand",
            where=f"{where}: expected a relative path of plain names inside the folder, got {relative!r:.80}",
        )


def resolve_inside(root: Path, relative: str, *, where: str) -> Path:
    """`root/relative`, which is a regular file with one name, reached through no symbolic link. Opens nothing.

    Raises InputError for anything else (`..`, absolute, link, hard link, FIFO, folder, device, absent).
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
    """lstat of `path`, which must be a regular file with one hard link. Opens nothing. Raises InputError."""
    try:
        status = os.lstat(path)
    except (OSError, ValueError) as error:
        raise InputError(
            "This file cannot be read",
            where=f"{where}: {path}: expected a file, got {reason(error)}",
            fix="restore it, or check the path",
        ) from None
    _check_kind(status, path, where)
    return status


@contextlib.contextmanager
def open_regular(path: Path, *, where: str) -> Iterator[BinaryIO]:
    """`path` opened for reading, with the same conditions checked on what was opened. Never blocks on a FIFO."""
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
    """The bytes of a regular file of at most `limit_bytes`. Raises InputError."""
    with open_regular(path, where=where) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit_bytes:
            raise InputError(
                "This file is too large",
                where=f"{where}: {path}: expected at most {limit_bytes} bytes, got {size}",
                fix="give the right file",
            )
        return file.read(limit_bytes)


def sha256_of(path: Path, *, where: str = "hash") -> str:
    """SHA-256 (hex) of a regular file."""
    with open_regular(path, where=where) as file:
        return sha256_from_file(file)


def sha256_from_file(file: BinaryIO) -> str:
    """SHA-256 (hex) of what is left of an open file; hashlib.file_digest is not in Python 3.10, which JetPack 6 has."""
    digest = hashlib.sha256()
    while piece := file.read(_PIECE_BYTES):
        digest.update(piece)
    return digest.hexdigest()


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes the name `path` when the block ends without an error; until then the old file stays.

    Raises InputError when the folder cannot be written. What the block raises is passed on and leaves nothing behind.
    """
    path = Path(path)
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.", suffix=".tmp")
    except (OSError, ValueError) as error:
        raise _not_written(path, error) from None
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # mkstemp gives 0600
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise _not_written(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` under `path`, whole or not at all. Raises InputError."""
    with atomic_file(path) as file:
        file.write(data)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` last through a power cut (a no-op where folders cannot be opened)."""
    with contextlib.suppress(PermissionError):  # Windows
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def reason(error: Exception) -> str:
    """The operating system's words for `error`, without its path."""
    return getattr(error, "strerror", None) or str(error)


def _check_kind(status: os.stat_result, path: Path, where: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise _refusal(path, _KINDS.get(stat.S_IFMT(status.st_mode), "a special file"), where)
    if status.st_nlink > 1:
        raise _refusal(path, f"a hard link ({status.st_nlink} names)", where)


def _refusal(path: Path, got: str, where: str) -> InputError:
    return InputError(
        "This file may not be read",
        where=f"{where}: {path}: expected a regular file with one name, got {got}",
        fix="put a plain copy of the file there",
    )


def _not_written(path: Path, error: Exception) -> InputError:
    return InputError(
        "This file cannot be written",
        where=f"{path}: {reason(error)}",
        fix="check the folder, its permissions and the free space, or give another path",
    )
