"""Files that a library opens by path, held so that it opens the very file whose bytes are hashed.

Between a hash and a library's own opening of the same path, another process may exchange the file, or a
folder above it, and put it back. So on Linux a library gets links to open descriptors, in a private folder
that only this user can write. Other systems have no such paths, and open the file by its own
(SECURITY.md).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

DESCRIPTORS = Path("/proc/self/fd")
PREFIX = "star-export-held-"  # then the process's number, so that what a killed one left is known


def stamp_of(file: BinaryIO) -> tuple[int, ...]:
    """What changes when an open file is written to: device, inode, size and times."""
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def path_of(file: BinaryIO, path: Path) -> Path:
    """A path of the open `file` that nobody can exchange; `path`, by which it was opened, without such."""
    own = DESCRIPTORS / str(file.fileno())
    return own if own.exists() else path


def real_path(path: Path) -> Path:
    """The place of a file that was reached through links, for messages."""
    return Path(os.path.realpath(path))


@contextlib.contextmanager
def linked(files: Mapping[str, BinaryIO]) -> Iterator[Path | None]:
    """Yield a private folder that has a link to each open file by its name; None where there can be none."""
    clear_abandoned()
    folder = None
    try:
        if DESCRIPTORS.exists():
            with contextlib.suppress(OSError):  # no folder for temporary files
                folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
                for name, file in files.items():
                    (folder / name).symlink_to(DESCRIPTORS / str(file.fileno()))
        yield folder
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


def clear_abandoned() -> None:
    """Remove the folders of links that killed processes left."""
    with contextlib.suppress(OSError):
        for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
            number = folder.name.removeprefix(PREFIX).partition("-")[0]
            if number.isdecimal() and DESCRIPTORS.exists() and not Path("/proc", number).exists():
                shutil.rmtree(folder, ignore_errors=True)
