"""What an export lets the reference do as a whole, for a report to show and for `validate` to repeat."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from engines.bundle.manifest import ModelSpec
from engines.inputs.caption import CAPTIONS_FILE, Captions
from engines.inputs.image_io import read_image
from reference.containers import LazyTensor

from ..golden.feeds import rng_of
from ..golden.paintings import PAINTINGS
from ..golden.record import Oracle
from ..golden.record_paintings import Asked, record_paintings
from ..golden.record_tasks import SEED, record_tasks
from ..golden.runs import HELD
from ..golden.tasks import DRAWN_FILE, tasks_in
from .material import chat_of

IMAGE = (61, 90, 3)  # of random pixels, edited by a model that is too large to draw one at an export


def recordings(
    oracle: Callable[[], Oracle],
    tensors: Mapping[str, LazyTensor],
    texts: Mapping[str, str],
    host_files: Mapping[str, bytes],
    model: ModelSpec,
    bundle: Path,
) -> dict[str, Callable[[], None]]:
    """Name of a step -> what writes its files to the folder `bundle`. `texts` has a prompt, an edit and a
    question.

    A model of few weights draws, edits and answers; one with a diffusion decoder paints. What is painted are
    the images drawn, or else random image tokens.
    """
    steps: dict[str, Callable[[], None]] = {}
    small = sum(math.prod(tensor.shape) for tensor in tensors.values()) <= HELD
    if small:
        chat = chat_of(host_files, model)
        steps["recorded tasks"] = lambda: record_tasks(oracle().star, chat, model, **texts, bundle=bundle)
    if model.diffusion:
        captions = Captions(host_files[CAPTIONS_FILE].decode(), model.diffusion)

        def paint() -> None:
            asked = (_as_drawn if small else _random)(texts, model, bundle)
            path, rope_bf16 = bundle / PAINTINGS, model.rope_bf16
            record_paintings(oracle(), captions, asked, seed=SEED, rope_bf16=rope_bf16, path=path)

        steps["recorded paintings"] = paint
    return steps


def _as_drawn(texts: Mapping[str, str], model: ModelSpec, bundle: Path) -> dict[str, Asked]:
    recorded, image = tasks_in(bundle), read_image(bundle / DRAWN_FILE)
    ids = (np.array([drawn]) for drawn in (recorded.drawn_ids, recorded.edited_ids))
    return {"paint": Asked(texts["prompt"], next(ids)), "repaint": Asked(texts["edit"], next(ids), image)}


def _random(texts: Mapping[str, str], model: ModelSpec, bundle: Path) -> dict[str, Asked]:
    rng = rng_of("paintings")
    drawn, edited = rng.integers(0, model.codebook_size, (2, 1, model.image_tokens))
    image = rng.integers(0, 256, IMAGE, dtype=np.uint8)
    return {"paint": Asked(texts["prompt"], drawn), "repaint": Asked(texts["edit"], edited, image)}
