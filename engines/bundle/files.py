"""Files on disk: safe paths, hashes of opened files, and atomic writes.

This module does not interpret contents. A file under its final name is always complete: it is written to a
temporary file in the same folder, synced, renamed, and then the folder is synced.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ..errors import InputError
from ..progress import Tick, uncounted

MANIFEST = "manifest.json"  # in a bundle's folder
MANIFEST_LIMIT_BYTES = 16 << 20
_OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_RANDOM = re.compile(r"[0-9a-f]{16}\.tmp")
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK)
_LOCKED_BYTE = 1 << 20  # Windows locks bytes, and lets nobody read them
PATIENCE_S = 1.0
_PIECE_BYTES = 1 << 20
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
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
    """Return `root/relative` if it is a regular file or a link to one, in folders that are no links.

    Opens nothing. Raises InputError for anything else: `..`, an absolute path, a linked folder, a FIFO, a
    folder, a device, or a missing file. A link is no danger where the bytes that are read are hashed.
    """
    check_relative(relative, where=where)
    path = Path(root)
    for part in PurePosixPath(relative).parts[:-1]:
        path = path / part
        if path.is_symlink():
            raise _refusal(path, "a symbolic link in place of a folder", where)
    path = path / PurePosixPath(relative).name
    check_regular(path, where=where)
    return path


def check_regular(path: Path, *, where: str) -> os.stat_result:
    """Return the `stat` of a regular file, links followed; raises InputError for any other path.

    Opens nothing.
    """
    try:
        status = os.stat(path)
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
        file = open(path, "rb", opener=lambda name, _: os.open(name, _OPEN_FLAGS))  # noqa: SIM115
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
    return text_from_bytes(read_regular(path, limit_bytes=limit_bytes, where=where), path, where=where)


def text_from_bytes(data: bytes, path: Path, *, where: str) -> str:
    """Decode the contents of `path` as UTF-8. Raises InputError."""
    try:
        return data.decode("utf-8")
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
    temporary = path.with_name(f"{_temporary(path)}{secrets.token_hex(8)}.tmp")
    try:
        try:
            file = open(temporary, "xb")  # noqa: SIM115
        except (OSError, ValueError) as error:
            raise not_written(path, error) from None
        with file:
            try_lock(file.fileno())
            _clear_temporary(path)
            yield file
            file.flush()
            os.fsync(file.fileno())
        replace_file(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise not_written(path, error) from error
    finally:
        with contextlib.suppress(OSError, ValueError):
            temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> str:
    """How the names of the temporary files of `path` begin."""
    return f".{path.name[:40]}."


def _clear_temporary(path: Path) -> None:
    """Remove the temporary files of `path` that killed processes left: nobody holds their lock."""
    begin, names = _temporary(path), list[str]()
    with contextlib.suppress(OSError):  # a folder that may not be listed
        names = os.listdir(path.parent)
    for name in names:
        if name.startswith(begin) and _RANDOM.fullmatch(name[len(begin) :]):
            with contextlib.suppress(OSError):
                with open(path.parent / name, "rb") as file:
                    left = try_lock(file.fileno())
                if left:  # closed, as Windows removes no open file
                    os.unlink(path.parent / name)


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically. Raises InputError."""
    with atomic_file(path) as file:
        file.write(data)


def try_lock(descriptor: int) -> bool:
    """Lock an open file until it is closed. False while another holds it; on a disk without locks, True."""
    try:
        if sys.platform == "win32":
            import msvcrt

            place = os.lseek(descriptor, 0, os.SEEK_CUR)
            os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
            try:
                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            finally:
                os.lseek(descriptor, place, os.SEEK_SET)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in _HELD
    return True


def replace_file(source: Path, target: Path) -> None:
    """Rename a file, in place of an old one. On Windows it waits up to a second for whoever has one of them
    open, such as a virus scanner."""
    waited = 0.0
    while True:
        try:
            return os.replace(source, target)
        except PermissionError:
            if sys.platform != "win32" or waited >= PATIENCE_S or target.is_dir():
                raise
        time.sleep(PATIENCE_S / 20)
        waited += PATIENCE_S / 20


def rename_folder(source: Path, target: Path) -> None:
    """Rename a folder, in place of nothing or of an empty folder. Raises OSError for a filled one."""
    if sys.platform == "win32":  # its own rename replaces no folder
        with contextlib.suppress(OSError):
            os.rmdir(target)
    os.rename(source, target)


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


def _refusal(path: Path, got: str, where: str) -> InputError:
    return InputError(
        "This is not a plain regular file",
        where=f"{where}: {path}: expected a regular file, got {got}",
        fix="replace it with a copy of the file",
    )


def not_written(path: str | Path, why: str | Exception) -> InputError:
    """The error for a file that cannot be written, or that the system did not let be written."""
    return InputError(
        "This file cannot be written",
        where=f"{path}: {why if isinstance(why, str) else reason(why)}",
        fix="check the folder, its permissions and the free space, or choose another path",
    )
