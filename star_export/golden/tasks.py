"""One image, an edit of it and an answer about it as the reference made them, recorded for a report to show.

They lie in a bundle's folder `tasks`. This module reads them without torch; `record_tasks.py` makes them.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from engines.bundle.reader import Bundle
from engines.bundle.records import strict, value_from_json

FOLDER = "tasks"
TASKS_FILE, DRAWN_FILE, EDITED_FILE = (
    f"{FOLDER}/{name}" for name in ("tasks.json", "drawn.png", "edited.png")
)


@dataclass(frozen=True)
class RecordedTasks:
    """What was asked for and what came of it: the ids [T] of the image drawn from `prompt` and of its edit,
    both with `seed`, and the text of the answer, of at most `answer_tokens`."""

    seed: int
    prompt: str
    instruction: str
    question: str
    answer_tokens: int
    drawn_ids: tuple[int, ...]
    edited_ids: tuple[int, ...]
    answer: str


def json_from_tasks(tasks: RecordedTasks) -> str:
    """Serialise `tasks` as JSON text."""
    return json.dumps(dataclasses.asdict(tasks), indent=1) + "\n"


def tasks_of(bundle: Bundle) -> RecordedTasks | None:
    """The recorded tasks; None in a bundle of a large model or an older export.

    Raises InputError for a file that is not as in the manifest.
    """
    if TASKS_FILE not in bundle.manifest.files:
        return None
    return _tasks_from_json(bundle.read(TASKS_FILE), where=f"{bundle.path}: {TASKS_FILE}")


def tasks_in(folder: Path) -> RecordedTasks:
    """Those of a bundle that is being exported."""
    return _tasks_from_json((folder / TASKS_FILE).read_bytes(), where=f"{folder}: {TASKS_FILE}")


def _tasks_from_json(data: bytes, *, where: str) -> RecordedTasks:
    text = data.decode("utf-8", errors="replace")
    return strict(RecordedTasks, value_from_json(text, where=where), where)
