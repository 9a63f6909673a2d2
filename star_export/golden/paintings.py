"""A painting and a painted edit of the reference, recorded for `validate` to repeat.

They are small and have few steps: what a step computes does not depend on how many there are. This module
reads them without torch; `record_paintings.py` makes them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engines.bundle.reader import Bundle
from engines.errors import InputError, listed
from engines.runtime.painting import Painting

from .cases import Case, recorded_runs

PAINTINGS = "paintings.safetensors"  # at the bundle's root
RESOLUTION = 64  # pixels; the smallest that is painted
INPUTS = {"prompt", "seed", "steps", "guidance", "image_ids"}
CASES = {"paint": INPUTS, "repaint": INPUTS | {"image"}}  # the tasks of `engines.fit.memory`
OUTPUTS = {"latents", "image"}


@dataclass(frozen=True)
class RecordedPainting:
    """What was asked for, as the runtime takes it, and the `case` with what came of it.

    `image_ids` int64 [1, T] were painted, as an edit of `image` uint8 [H, W, 3] if there is one.
    """

    prompt: str
    seed: int
    painting: Painting
    image_ids: np.ndarray
    image: np.ndarray | None
    case: Case


def paintings_of(bundle: Bundle) -> dict[str, RecordedPainting]:
    """The recorded paintings by the name of their case; {} in a bundle without them. Raises InputError."""
    if PAINTINGS not in bundle.manifest.files:
        return {}
    path, cases = bundle.path / PAINTINGS, recorded_runs(bundle, PAINTINGS)
    found = {name: (set(case.inputs), set(case.outputs)) for name, case in cases.items()}
    if found != {name: (inputs, OUTPUTS) for name, inputs in CASES.items()}:
        raise InputError(
            "The golden set cannot prove anything",
            where=f"{path}: expected the cases {' and '.join(CASES)}, of a prompt, its settings and image "
            f"tokens, with latents and an image, got {listed([str(one) for one in found.items()])}",
            fix="export the bundle again",
        )
    return {name: _painting(case) for name, case in cases.items()}


def _painting(case: Case) -> RecordedPainting:
    given = case.inputs
    text, image, vq = map(float, given["guidance"])
    edit = "image" in given
    return RecordedPainting(
        prompt=bytes(given["prompt"].astype(np.uint8)).decode(),
        seed=int(given["seed"][0]),
        painting=Painting(
            RESOLUTION,
            steps=int(given["steps"][0]),
            text_guidance=text,
            image_guidance=image,
            vq_guidance=vq if edit else None,
        ),
        image_ids=given["image_ids"],
        image=given["image"].astype(np.uint8) if edit else None,
        case=case,
    )
