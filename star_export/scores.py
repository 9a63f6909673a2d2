"""The file of a recorded score: how many tasks the reference did right, by kind of set. It travels in a bundle.

Only a model whose tasks can be judged has one. What the tasks are is known to whoever measures, not here.
"""

from __future__ import annotations

from engines.bundle.manifest import value_from_json
from engines.errors import InputError

SCORE = "score.json"  # beside a checkpoint's configuration, and in its bundle
KINDS = ("small", "full")
TASKS = (
    "generate",
    "edit",
    "ask",
    "reason",
)  # each has categories; the PSNR of reconstruction stands beside them
_FIX = "record it again: python -m reference.nano.benchmark.sweep CHECKPOINT --record"


def score_of_kind(data: bytes, kind: str, *, where: str) -> dict:
    """The entry `kind` of a score file's bytes, checked: `right` (task -> category -> [right, asked]) and `psnr` in dB.

    Raises InputError for anything else.
    """
    try:
        found = value_from_json(data.decode(), where=where)[kind]
        pairs = [tuple(map(sum, zip(*found["right"][task].values()))) for task in TASKS]
        if not all(0 <= right <= asked and asked for right, asked in pairs) or not found["psnr"] > 0:
            raise ValueError(
                f"expected 0 <= right <= asked of each task and a PSNR above 0, got {pairs} and {found['psnr']}"
            )
        return found
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            "The recorded score cannot be read",
            where=f"{where}: {kind}: {type(error).__name__}: {error}",
            fix=_FIX,
        ) from None
