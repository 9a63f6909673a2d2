"""What verbs print and write: their outcome, tables, and the checks made before any work starts."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engines.bundle.files import write_atomic
from engines.errors import InputError, StarError


@dataclass(frozen=True)
class Outcome:
    """The result of a verb: `data` for `--json`, `text` for people.

    `error` is why the verb failed all the same: it is told after the result, and decides the exit code.
    """

    data: dict
    text: str
    error: StarError | None = None


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out `rows` under `head` in left-aligned columns, two spaces apart."""
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines
    )


def text_from_bytes(size: int) -> str:
    """A size in bytes for people, in powers of 1000: `31.3 MB`."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"


def write_ids(path: str | None, ids: np.ndarray) -> None:
    """Write `ids` to the `.npy` file `path`, if one is named."""
    if path is not None:
        buffer = io.BytesIO()
        np.save(buffer, ids)
        write_atomic(Path(path), buffer.getvalue())


def check_files(*paths: str | None) -> None:
    """Check, before any work, that each file can be created in an existing folder. Raises InputError."""
    for path in filter(None, paths):
        if not Path(path).absolute().parent.is_dir() or Path(path).is_dir():
            raise InputError(
                "This file cannot be written",
                where=f"{path}: expected a file name in an existing folder",
                fix="create the folder first, or choose another name",
            )


def check_folder(path: str | None) -> None:
    """Check, before any work, that the output folder exists. Raises InputError."""
    if path is not None and not Path(path).is_dir():
        raise InputError(
            "This folder does not exist", where=f"{path}: expected a folder", fix="create it first"
        )
