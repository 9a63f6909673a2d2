"""All cases, by what is wrong."""

from __future__ import annotations

from . import bundles, checkpoints, images, lines, paths, prompts, streams
from .harness import Case

CASES: list[Case] = [
    *lines.CASES,
    *paths.CASES,
    *images.CASES,
    *prompts.CASES,
    *bundles.CASES,
    *checkpoints.CASES,
    *streams.CASES,
]
