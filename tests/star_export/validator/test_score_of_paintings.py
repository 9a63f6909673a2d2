"""`score --decoder diffusion`: what the diffusion decoder paints is judged, at the scorer's own side.

STAR-Nano has no diffusion decoder, so the miniature stands in for it: its scores are bad.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engines.errors import InputError
from engines.runtime.painting import Painting
from engines.runtime.star import Star
from reference.nano.world.world import SIDE_PIXELS
from star_export.cli.parser import main
from star_export.validator import score as scoring
from star_export.validator.score import RuntimePainter, judged, score


@pytest.fixture
def miniature_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "check_model", lambda bundle: None)
    counts = {"generate": 1, "edit": 1, "reason": 1, "rebuild": 1}
    monkeypatch.setattr(scoring, "SETS", {"small": counts, "full": counts})


def test_what_is_judged_was_painted(diffusion_bundle: Path) -> None:
    painting, given = Painting(64, steps=2), np.full((SIDE_PIXELS, SIDE_PIXELS, 3), 90, np.uint8)
    with Star(diffusion_bundle) as star:
        painter, plain = RuntimePainter(star, painting=painting), RuntimePainter(star)
        for found, other, wanted in (
            (
                painter.draw(["a cat", "a dog"], seed=3)[1],
                plain.draw(["a dog"], seed=4)[0],
                star.generate("a dog", seed=4, painting=painting),
            ),
            (
                painter.edit([given], ["blue"], seed=3)[0],
                plain.edit([given], ["blue"], seed=3)[0],
                star.edit(given, "blue", seed=3, painting=painting),
            ),
        ):
            np.testing.assert_array_equal(found, wanted.images[0])
            assert not np.array_equal(found, other)
        (answer,), (image,) = painter.reason(["a cat"], seed=3)
        wanted = star.generate(
            "a cat",
            seed=3,
            reason=True,
            max_new_tokens=scoring.benchmark.ANSWER_TOKENS,
            painting=painting,
        )
        assert answer == wanted.answer
        np.testing.assert_array_equal(image, wanted.images[0])


def test_a_larger_painting_is_shrunk_as_the_source_of_an_edit_is() -> None:
    image = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    small = Image.fromarray(image).resize((64, 64), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(judged(image), np.asarray(small))
    assert judged(image[:64, :64]) is not image and np.array_equal(judged(image[:64, :64]), image[:64, :64])


def test_the_verb_scores_paintings_and_says_so(
    diffusion_bundle: Path, miniature_is_scored: None, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    words = ["score", str(diffusion_bundle), "--decoder", "diffusion", "--resolution", "80", "--steps", "1"]
    assert main([*words, "--pictures", str(tmp_path), "--no-progress"]) == 0
    text = capsys.readouterr().out
    assert "was painted by the diffusion decoder, at 80 pixels, and judged at 64" in text
    assert {path.name for path in tmp_path.iterdir()} >= {"generated.png", "edited.png", "reasoned.png"}


def test_what_cannot_be_scored_is_told_before_the_work(
    diffusion_bundle: Path,
    mini_bundle: Path,
    miniature_is_scored: None,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(InputError, match="no diffusion decoder"):
        score(mini_bundle, painting=Painting(64, steps=1))
    for more, told in (
        (["--decoder", "diffusion", "--compare", "b"], "one bundle at a time"),
        (["--steps", "2"], "diffusion decoder"),
        (["--decoder", "diffusion", "--resolution", "50"], "resolution"),
    ):
        assert main(["score", str(diffusion_bundle), *more, "--no-progress"]) == 2
        assert told in capsys.readouterr().err
    monkeypatch.undo()
    with pytest.raises(InputError, match="STAR-Nano"):
        score(diffusion_bundle, painting=Painting(64))
