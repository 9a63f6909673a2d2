"""Images that are sent as addresses: files in the server's own folder, bounded, and gone after a while."""

from __future__ import annotations

import contextlib
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from pathlib import Path

from ..bundle.files import reason
from ..bundle.lock import is_held, locked
from . import settings as limits
from .refusals import Refused

_NAME = re.compile(r"[\w-]{22}\.(png|jpeg|webp)")
PREFIX, LOCK = "star-export-serve-", "lock"  # of a server's folder, and the file in it that the server holds


def clear_abandoned() -> None:
    """Remove the folders of servers that were killed."""
    for lock in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{LOCK}"):
        if not is_held(lock):
            shutil.rmtree(lock.parent, ignore_errors=True)


class KeptFiles:
    """At most so many files, of so many bytes, for so many seconds; the oldest make room.

    A name cannot be guessed, so who has the address may read the file without the server's key.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        limit: int = limits.FILES_LIMIT,
        limit_bytes: int = limits.FILES_LIMIT_BYTES,
        seconds: float = limits.FILES_SECONDS,
    ):
        self._held = contextlib.ExitStack()
        if folder is None:
            clear_abandoned()
            folder = Path(tempfile.mkdtemp(prefix=PREFIX))
            self._held.enter_context(locked(folder / LOCK, what="server"))
        self.folder = folder
        self.limit, self.limit_bytes, self.seconds = limit, limit_bytes, seconds
        self._files: OrderedDict[str, tuple[float, int]] = OrderedDict()  # name -> (written, bytes)
        self._lock = threading.Lock()

    def keep(self, data: bytes, file_format: str) -> str:
        """Write a file and return its name. Raises Refused where the disk does not take it."""
        name = f"{secrets.token_urlsafe(16)}.{file_format}"
        path = self.folder / name
        with self._lock:
            self._make_room(len(data))
            try:
                path.write_bytes(data)
            except OSError as error:
                path.unlink(missing_ok=True)
                raise Refused(
                    507,
                    "The image cannot be kept as a file",
                    where=f"response_format: url: {reason(error)}",
                    fix="ask for response_format b64_json, or let the server's disk have more room",
                    param="response_format",
                    code="disk_full",
                ) from None
            self._files[name] = time.monotonic(), len(data)
        return name

    def read(self, name: str) -> bytes | None:
        """The bytes of a file that is still there."""
        with self._lock:
            self._make_room(0)
            if not _NAME.fullmatch(name) or name not in self._files:
                return None
            try:
                return (self.folder / name).read_bytes()
            except OSError:
                return None

    def close(self) -> None:
        """Remove all files."""
        self._held.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _make_room(self, size: int) -> None:
        while self._files:
            name, (written, _) = next(iter(self._files.items()))
            held = sum(size for _, size in self._files.values())
            full = size and (len(self._files) >= self.limit or held + size > self.limit_bytes)
            if not full and time.monotonic() - written <= self.seconds:
                return
            del self._files[name]
            (self.folder / name).unlink(missing_ok=True)
