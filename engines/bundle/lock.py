"""One process at a time: a lock file whose holder the system knows, so that a killed process holds nothing.

The file has the number of the process that holds it, for messages, and goes when the lock is given back.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from ..errors import InputError
from .files import reason, try_lock


@contextlib.contextmanager
def locked(path: Path, *, what: str) -> Iterator[None]:
    """Hold the lock file `path`, in an existing folder, for the block.

    Raises InputError at once while another holds it, with `what` it does ("export") and its process, and
    where the file cannot be made.
    """
    descriptor = _taken(path, what)
    try:
        yield
    finally:
        if sys.platform == "win32":  # it removes no open file, nor this one once another process has it
            os.close(descriptor)
        with contextlib.suppress(OSError):
            path.unlink()
        if sys.platform != "win32":
            os.close(descriptor)


def is_held(path: Path) -> bool:
    """Whether a process holds the lock file `path`."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        return not try_lock(descriptor)
    finally:
        os.close(descriptor)


def _taken(path: Path, what: str) -> int:
    """The open, locked file that `path` names. Raises InputError."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise InputError(
                "This place cannot be locked",
                where=f"{path}: {reason(error)}",
                fix="check the folder and its permissions, or choose another one",
            ) from None
        try:
            if not try_lock(descriptor):
                raise _refusal(path, descriptor, what)
            if _is_still(path, descriptor):
                with contextlib.suppress(OSError):  # a full disk; the number is for messages only
                    os.ftruncate(descriptor, 0)
                    os.lseek(descriptor, 0, os.SEEK_SET)
                    os.write(descriptor, f"{os.getpid()}\n".encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether `path` names the open file, and was not given back and removed before it was locked."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


def _refusal(path: Path, descriptor: int, what: str) -> InputError:
    os.lseek(descriptor, 0, os.SEEK_SET)
    holder = os.read(descriptor, 20).decode(errors="replace").strip()
    return InputError(
        f"Another {what} is writing here",
        where=f"{path.parent}: expected a folder that no process writes to, got one in use"
        + (f" by process {holder}" if holder.isdecimal() else ""),
        fix="wait until it ends, or choose another place",
    )
