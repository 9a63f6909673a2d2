"""What a report shows beside the recorded tasks of the reference: the same ones, done by the candidate."""

from __future__ import annotations

import numpy as np

from engines.errors import InputError, MissingError
from engines.inputs.image_io import image_from_bytes
from engines.runtime.star import Star

from ..golden.tasks import DRAWN_FILE, EDITED_FILE, tasks_of
from .evidence import Evidence, RunIds, ShownAnswer, ShownImage

NOTE = "Seed {}. The reference drew it at the export, with this bundle's rounded weights."


def show_recorded_tasks(evidence: Evidence, star: Star) -> None:
    """Let `star` do what the reference was recorded to do, from the same given image.

    A task that its plans or the memory have no room for is left out with a note. Raises InputError for a
    damaged file of the bundle.
    """
    recorded = tasks_of(star.bundle)
    if recorded is None:
        return
    drawn, edited = (
        image_from_bytes(star.bundle.read(name), where=name) for name in (DRAWN_FILE, EDITED_FILE)
    )
    note = NOTE.format(recorded.seed)
    try:
        got = star.generate(recorded.prompt, seed=recorded.seed)
        evidence.ids.append(RunIds("draw", got.image_ids[0], np.array(recorded.drawn_ids)))
        evidence.images.append(ShownImage(recorded.prompt, note, got.images[0], drawn, seed=recorded.seed))
        got = star.edit(drawn, recorded.instruction, seed=recorded.seed)
        evidence.ids.append(RunIds("edit", got.image_ids[0], np.array(recorded.edited_ids)))
        title = f"Edit: {recorded.instruction}"
        evidence.images.append(ShownImage(title, note, got.images[0], edited, given=drawn))
        answer = star.ask(drawn, recorded.question, max_new_tokens=recorded.answer_tokens)
        shown = ShownAnswer(recorded.question, answer.text, given=drawn, reference=recorded.answer)
        evidence.answers.append(shown)
    except (InputError, MissingError) as error:
        evidence.notes.append(f"A recorded task was left out: {error}")
