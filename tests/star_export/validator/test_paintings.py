"""The rung of paintings: a clean bundle passes far within its tolerance, and the runtime's faults fail."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engines.bundle.reader import Bundle
from engines.errors import InputError
from engines.inputs.latents import Schedule
from engines.progress import silent
from engines.runtime import painter
from engines.runtime.star import Star
from star_export.golden.compare import excess
from star_export.golden.paintings import PAINTINGS, paintings_of
from star_export.validator.certificate import Row
from star_export.validator.evidence import Evidence
from star_export.validator.exhibits import html_from_images
from star_export.validator.paintings import compared, painted, paintings
from star_export.validator.subject import Subject
from tests.helpers.sealed import edit_sealed


def subject_of(bundle: Path, evidence: Evidence | None = None) -> Subject:
    return Subject(Bundle.open(bundle), "onnxruntime-exact", "fp32", evidence)


def failing(bundle: Path) -> list[Row]:
    return [row for row in paintings(subject_of(bundle), silent)[0] if not row.worst.passed]


def test_a_clean_bundle_passes_and_its_page_shows_both_sides(diffusion_bundle: Path) -> None:
    evidence = Evidence()
    rows, note = paintings(subject_of(diffusion_bundle, evidence), silent)
    assert note == "" and {row.check.partition(":")[0] for row in rows} == {"paint", "repaint"}
    assert {row.worst.tensor for row in rows} == {"image_ids", "latents", "image"}
    assert all(row.worst.passed and excess(row.worst) < 0.2 for row in rows)
    painting, edit = evidence.images
    for shown in evidence.images:
        assert shown.reference is not None and shown.candidate.shape == (64, 64, 3)
        assert np.abs(shown.candidate.astype(int) - shown.reference.astype(int)).max() <= 1
    assert painting.given is None and edit.given is not None
    page = html_from_images(evidence)
    assert page.count("<img") == 7 and "Painted edit" in page and page.count("difference") >= 2
    assert [*evidence.steps] == ["runtime, paint", "runtime, repaint"]
    assert len(evidence.steps["runtime, paint"]) == 4


def guidance_at_the_last_step(patch: pytest.MonkeyPatch) -> None:
    right = painter.followed

    def wrong(noise, groups, steps, brush) -> Iterator:
        *before, _ = right(noise, groups, steps, brush)
        yield from before
        features, latents = painter.time_features(float(steps.times[-1])), before[-1][0]
        found = {name: v for group in groups for name, v in group.velocities(latents, features).items()}
        v = painter.guided(found, brush, last=False)
        yield (latents + steps.sigmas[-2] * v,) * 2

    patch.setattr(painter, "followed", wrong)


def other_schedule(change: Callable[[Schedule, Schedule], Schedule]) -> Callable[[pytest.MonkeyPatch], None]:
    """Change the schedule, given it and the one without rounding."""
    right = painter.schedule

    def wrong(steps: int, *, shift: float, sigmas_bf16: bool) -> Schedule:
        return change(*(right(steps, shift=shift, sigmas_bf16=rounded) for rounded in (sigmas_bf16, False)))

    return lambda patch: patch.setattr(painter, "schedule", wrong)


def rows_swapped(patch: pytest.MonkeyPatch) -> None:
    right = painter.guided
    swapped = {"u": "i", "i": "u"}
    patch.setattr(
        painter,
        "guided",
        lambda found, brush, last: right({swapped.get(k, k): v for k, v in found.items()}, brush, last=last),
    )


def noise_of_the_source(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(painter, "PAINT", painter.SOURCE)


def a_map_that_is_moved(patch: pytest.MonkeyPatch) -> None:
    right = painter.vq_map
    patch.setattr(painter, "vq_map", lambda rows, side: np.roll(right(rows, side=side), 1, axis=-1))


def a_caption_without_its_sentence(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("engines.inputs.caption.BEFORE", "")


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "guidance at the last step": guidance_at_the_last_step,
    "time from rounded sigmas": other_schedule(
        lambda found, exact: replace(found, times=1 - found.sigmas[:-1])
    ),
    "sigmas not rounded": other_schedule(lambda found, exact: exact),
    "rows u and i swapped": rows_swapped,
    "noise of the source": noise_of_the_source,
    "a map that is moved": a_map_that_is_moved,
    "a caption without its sentence": a_caption_without_its_sentence,
}


@pytest.fixture(scope="module")
def star(diffusion_bundle: Path) -> Iterator[Star]:
    with subject_of(diffusion_bundle).star() as opened:
        yield opened


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_fails_by_far(star: Star, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    subject = Subject(star.bundle, star.backend, "fp32")
    FAULTS[name](monkeypatch)
    for case, one in paintings_of(star.bundle).items():
        results = compared(subject, case, one, painted(star, one))
        for tensor in ("latents", "image"):
            assert max(excess(result) for result in results if result.tensor == tensor) > 2, (case, tensor)


def test_in_16_bits_the_recorded_noise_decides(star: Star) -> None:
    one = paintings_of(star.bundle)["paint"]
    got = painted(star, one)
    got["latents"] = got["latents"] * np.float32(1.01)
    with pytest.raises(InputError, match="noise in bf16 of image, latents"):
        compared(Subject(star.bundle, star.backend, "bf16"), "paint", one, got)
    one.case.noise |= {name: np.array(0.02, np.float32) for name in ("image", "latents")}
    for compute, passes in (("fp32", False), ("bf16", True)):
        results = compared(Subject(star.bundle, star.backend, compute), "paint", one, got)
        assert all(result.passed for result in results) == passes


def test_a_painting_of_fewer_steps_fails(star: Star) -> None:
    one = paintings_of(star.bundle)["paint"]
    got = painted(star, one)
    got["latents"] = got["latents"][:-1]
    *_, last, _ = compared(Subject(star.bundle, star.backend, "fp32"), "paint", one, got)
    assert (last.place, last.tensor, last.passed) == ("step 4", "latents", False)


def test_other_image_tokens_fail_by_name(diffusion_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Star.generate
    monkeypatch.setattr(Star, "generate", lambda self, prompt, seed: right(self, prompt, seed=seed + 1))
    (row,) = failing(diffusion_bundle)
    assert (row.check, row.worst.tensor) == ("paint: image tokens", "image_ids")


def test_a_bundle_without_recorded_paintings_says_how_to_get_them(
    diffusion_bundle: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(diffusion_bundle, tmp_path / "bundle")
    (copy / PAINTINGS).unlink()
    edit_sealed(copy / "manifest.json", lambda value: value["files"].pop(PAINTINGS))
    rows, note = paintings(subject_of(copy), silent)
    assert rows == [] and note.startswith("left out:") and "export it again" in note


def test_a_record_of_other_cases_is_refused(diffusion_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("star_export.golden.paintings.CASES", {"paint": {"prompt"}})
    with pytest.raises(InputError, match="cannot prove anything"):
        paintings(subject_of(diffusion_bundle), silent)
