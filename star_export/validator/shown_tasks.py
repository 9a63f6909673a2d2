"""What a report shows of STAR-Nano: images of the fixed set beside the reference's, an edit and answers.

The reference's images were recorded as ids by the fp32 checkpoint. Both sides' ids pass the same VQ decoder,
so the difference of two images is that of their ids.
"""

from __future__ import annotations

import numpy as np

from engines.bundle.reader import Bundle
from engines.inputs.preprocess import images_from_decoded
from engines.sessions import open_session, run
from reference.nano.benchmark import identity
from reference.nano.benchmark.score import SEED

from .evidence import Evidence, RunIds, ShownAnswer, ShownImage
from .score import ScoreReport, recorded_ids

SHOWN = 2  # images, and answers


def show_tasks(
    evidence: Evidence, bundle: Bundle, found: ScoreReport, *, backend: str, threads: int | None = None
) -> None:
    """Add to `evidence` the ids of the fixed set, some of its images, an edit and some answers."""
    if found.image_ids is not None:
        wanted, texts = recorded_ids(bundle), identity.prompts()
        for text, ours, other in zip(texts, found.image_ids, wanted, strict=True):
            evidence.fixed_set.append(RunIds(text, ours, other))
        differing = [i for i, token in enumerate(found.first_differences) if token is not None]
        equal = [i for i, token in enumerate(found.first_differences) if token is None]
        chosen = [*equal[:1], *differing[:1], *equal[1:], *differing[1:]][:SHOWN]
        both = np.concatenate([found.image_ids[chosen], wanted[chosen]])
        images = _decoded(bundle, both, backend=backend, threads=threads)
        for k, i in enumerate(chosen):
            note = (
                f"Seed {SEED + i}. The reference's ids were drawn by the fp32 checkpoint, without this "
                "bundle's rounding; this backend decoded both."
            )
            pair = images[k], images[k + len(chosen)]
            evidence.images.append(ShownImage(texts[i], note, *pair, seed=SEED + i))
    for task in ("edit", "ask"):
        results = [result for result in found.score.results if result.task == task]
        for result in results[: SHOWN if task == "ask" else 1]:
            assert result.given is not None  # both tasks start from an image
            if task == "ask":
                shown = ShownAnswer(result.item.text, result.answer or "", result.given, right=result.right)
                evidence.answers.append(shown)
            elif result.image is not None:
                judged = "right" if result.right else "wrong"
                note = f"Judged {judged}. The benchmark has no edit of the reference."
                edit = ShownImage(f"Edit: {result.item.text}", note, result.image, given=result.given)
                evidence.images.append(edit)


def _decoded(bundle: Bundle, ids: np.ndarray, *, backend: str, threads: int | None) -> np.ndarray:
    """Images uint8 [n, R, R, 3] of ids int64 [n, T], one by one, since a plan may hold one at a time."""
    session = open_session(bundle, "vq_decoder", backend=backend, threads=threads)
    try:
        decoded = [run(session, {"image_ids": one[None]})["image"] for one in ids]
        return images_from_decoded(np.concatenate(decoded))
    finally:
        session.close()
