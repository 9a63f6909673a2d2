"""What verbs print and write: their outcome, tables, and the checks made before any work starts."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engines.bundle.files import write_atomic
from engines.errors import StarError


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


def write_ids(path: Path | None, ids: np.ndarray) -> None:
    """Write `ids` to the `.npy` file `path`, if one is named."""
    if path is not None:
        buffer = io.BytesIO()
        np.save(buffer, ids)
        write_atomic(path, buffer.getvalue())
