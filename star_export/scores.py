"""The recorded score, a file that travels in a bundle: how many tasks the reference got right, by kind of
set.

Only a model whose tasks can be judged has one. This module does not know what the tasks are.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from engines.bundle.records import value_from_json
from engines.errors import InputError

SCORE = "score.json"  # beside a checkpoint's configuration, and in its bundle
KINDS = ("small", "full")
IMAGE_IDS = "image_ids"  # of the images that a bundle draws again, to count those that are the same
TASKS = (
    "generate",
    "edit",
    "ask",
    "reason",
)  # each has categories; the PSNR of reconstruction stands beside them
_FIX = "record it again: python -m reference.nano.benchmark.sweep CHECKPOINT --record"


def score_of_kind(data: bytes, kind: str, *, where: str) -> dict:
    """Read the entry `kind` of a score file: `right` (task -> category -> [right, asked]) and `psnr` in dB.

    Raises InputError for a file that does not have this form.
    """
    try:
        file: Any = value_from_json(data.decode(), where=where)
        found = file[kind]
        pairs = [tuple(map(sum, zip(*found["right"][task].values()))) for task in TASKS]
        if not all(0 <= right <= asked and asked for right, asked in pairs) or not found["psnr"] > 0:
            raise ValueError(
                "expected 0 <= right <= asked and asked > 0 for each task, and a PSNR above 0; "
                f"got {pairs} and {found['psnr']}"
            )
        return found
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            "The recorded score cannot be read",
            where=f"{where}: {kind}: {type(error).__name__}: {error}",
            fix=_FIX,
        ) from None


def ids_from_score(data: bytes, *, where: str) -> np.ndarray:
    """Read the ids int64 [n, T] of the reference's images from a score file. Raises InputError."""
    try:
        file: Any = value_from_json(data.decode(), where=where)
        ids = np.array(file[IMAGE_IDS])
        if ids.ndim != 2 or ids.dtype != np.int64 or not ids.size:
            raise ValueError(f"expected rows of ids of one length, got {ids.dtype} {list(ids.shape)}")
        return ids
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            "The recorded images cannot be read",
            where=f"{where}: {IMAGE_IDS}: {type(error).__name__}: {error}",
            fix=_FIX,
        ) from None
