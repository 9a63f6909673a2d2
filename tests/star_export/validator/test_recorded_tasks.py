"""The recorded tasks: a bundle draws, edits and answers as the reference did at the export.

A report shows both sides; a bundle without recorded tasks shows nothing of them.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest

from engines.bundle.reader import Bundle
from engines.errors import InputError
from engines.inputs.image_io import read_image
from engines.runtime.star import Star
from star_export.golden import tasks
from star_export.validator.evidence import Evidence
from star_export.validator.exhibits import html_from_images
from star_export.validator.recorded_tasks import show_recorded_tasks


@pytest.fixture(scope="module")
def shown(mini_bundle: Path) -> Evidence:
    evidence = Evidence()
    with Star(mini_bundle, backend="onnxruntime-exact") as star:
        show_recorded_tasks(evidence, star)
    return evidence


def test_the_bundle_draws_edits_and_answers_as_the_reference_did(shown: Evidence, mini_bundle: Path) -> None:
    recorded = tasks.tasks_of(Bundle.open(mini_bundle))
    assert recorded is not None and not shown.notes
    assert [run.name for run in shown.ids] == ["draw", "edit"]
    assert all(run.identical == len(run.wanted) == 16 for run in shown.ids)
    assert not np.array_equal(shown.ids[0].wanted, shown.ids[1].wanted)
    for image, file in zip(shown.images, (tasks.DRAWN_FILE, tasks.EDITED_FILE), strict=True):
        assert image.reference is not None
        assert np.array_equal(image.reference, read_image(mini_bundle / file))
        assert np.abs(image.candidate.astype(int) - image.reference).max() <= 1
    assert shown.images[1].given is not None and shown.images[0].seed == recorded.seed
    (answer,) = shown.answers
    assert answer.question == recorded.question and answer.answer == answer.reference == recorded.answer


def test_the_page_shows_both_sides(shown: Evidence) -> None:
    page = html_from_images(shown)
    for name in ("given", "reference", "candidate", "difference"):
        assert f'alt="{name}: {shown.images[1].title}"' in page
    assert "The answers are equal." in page and "Absent" not in page
    other = dataclasses.replace(shown.answers[0], answer="<no>")
    page = html_from_images(Evidence(answers=[other], notes=["left <out>"]))
    assert "The answers differ." in page and "&lt;no&gt;" in page and "<p>left &lt;out&gt;</p>" in page


def test_a_task_without_room_is_left_out_with_a_note(mini_bundle: Path) -> None:
    evidence = Evidence()
    with Star(mini_bundle, backend="onnxruntime-exact", memory=1) as star:
        show_recorded_tasks(evidence, star)
    assert not evidence.images and len(evidence.notes) == 1 and "left out" in evidence.notes[0]


def test_a_bundle_without_them_shows_none_and_a_damaged_one_is_refused(
    mini_bundle: Path, tmp_path: Path
) -> None:
    bundle = Bundle.open(mini_bundle)
    files = {name: spec for name, spec in bundle.manifest.files.items() if not name.startswith("tasks/")}
    assert tasks.tasks_of(Bundle(mini_bundle, dataclasses.replace(bundle.manifest, files=files))) is None
    page = html_from_images(Evidence())
    assert "Absent: a drawn image of a prompt, an edited image, an answer about an image" in page
    copy = shutil.copytree(mini_bundle, tmp_path / "bundle")
    text = (copy / tasks.TASKS_FILE).read_text()
    (copy / tasks.TASKS_FILE).write_text(text.replace('"seed": 7', '"seed": 8'))
    with pytest.raises(InputError, match="has changed"):
        tasks.tasks_of(Bundle.open(copy))
