"""The benchmark on a bundle: the runtime's pictures are the reference's, the table tells both, and faults cost points."""
from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from random import Random

import numpy as np
import pytest

from engines.errors import InputError
from reference.nano import benchmark, layout
from reference.nano.draw import pictures_from_scenes
from reference.nano.edits import random_edit
from reference.nano.painter import Painter
from reference.nano.prompts import scene_of
from reference.nano.world import random_scene
from star_export import score as scoring

SAMPLING = {"guidance": 2.0, "top_k": 100, "top_p": 0.9}
COUNTS = {"generate": 1, "edit": 1, "ask": 1, "reason": 1, "rebuild": 3}


class Perfect:
    """Answers with what is asked for, found out from the items themselves; `wrong` spoils one task."""

    batch = 3

    def __init__(self, wrong: str = ""):
        self.wrong, self.known = wrong, {}
        for task in ("generate", "edit", "ask", "reason"):
            self.known |= answers(task)

    def draw(self, prompts, *, seed):
        return [self.known[prompt] if self.wrong != "generate" else blank() for prompt in prompts]

    def reason(self, prompts, *, seed):
        return list(prompts), [self.known[prompt] if self.wrong != "reason" else blank() for prompt in prompts]

    def edit(self, pictures, texts, *, seed):
        return [self.known[text] if self.wrong != "edit" else picture for picture, text in zip(pictures, texts)]

    def ask(self, pictures, questions):
        return [self.known[question] if self.wrong != "ask" else "maybe" for question in questions]

    def rebuild(self, pictures):
        return [np.clip(picture.astype(int) + 8, 0, 255).astype(np.uint8) for picture in pictures]


def blank() -> np.ndarray:
    return np.full((64, 64, 3), 245, np.uint8)


def answers(task: str) -> dict[str, object]:
    """Text -> a right result, by making the same items with the makers' own words kept."""
    from reference.nano import edits, prompts, questions, riddles
    random, known = Random(f"benchmark {benchmark.SEED} {task}"), {}
    kinds = {"generate": prompts.CATEGORIES, "edit": edits.KINDS, "ask": questions.KINDS, "reason": riddles.KINDS}[task]
    for kind in kinds:
        if task == "edit":
            edit = random_edit(random, kind, test=True)
            known[edit.text] = pictures_from_scenes([edit.after], seed=1)[0]
        elif task == "ask":
            while not (found := questions.random_question(random, random_scene(random), kind, test=True)):
                pass
            known[found[0]] = found[1]
        else:
            make = prompts.random_prompt if task == "generate" else riddles.random_riddle
            text, request = make(random, kind, test=True)
            known[text] = pictures_from_scenes([scene_of(Random(0), request)], seed=1)[0]
    return known


def test_a_perfect_painter_gets_every_point() -> None:
    score = benchmark.measure(Perfect(), COUNTS)
    overall = {task: score.overall(task) for task in benchmark.GOALS}
    assert overall == {"generate": (6, 6), "edit": (5, 5), "ask": (5, 5), "reason": (4, 4)}
    assert not score.failures and 29 < score.psnr < 31


@pytest.mark.parametrize("task", benchmark.GOALS)
def test_a_painter_that_fails_one_task_loses_its_points_alone(task: str) -> None:
    score = benchmark.measure(Perfect(task), COUNTS)
    assert score.overall(task)[0] == 0
    assert all(score.overall(other)[0] == score.overall(other)[1] for other in benchmark.GOALS if other != task)
    assert len(score.failures) == score.overall(task)[1]


def test_intervals_are_wilsons() -> None:
    low, high = benchmark.interval(90, 100)
    assert (round(low, 3), round(high, 3)) == (0.826, 0.945)
    assert benchmark.interval(10, 10)[1] == pytest.approx(1) and 0.72 < benchmark.interval(10, 10)[0] < 0.73


def test_the_table_shows_both_sides_and_the_goals() -> None:
    ours, reference = benchmark.measure(Perfect("edit"), COUNTS), benchmark.measure(Perfect(), COUNTS)
    stored = json.loads(json.dumps(benchmark.json_from_score(reference)))
    lines = benchmark.table(ours, benchmark.score_from_json(stored)).splitlines()
    edit = next(line for line in lines if line.startswith("edit") and "overall" in line)
    assert "0/5" in edit and "0.000" in edit and "1.000" in edit and edit.endswith("0.90")
    assert lines[-1].startswith("rebuild") and lines[-1].endswith("30.00")


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An untrained STAR-Nano and its bundle."""
    from star_export.export import export
    root = tmp_path_factory.mktemp("score")
    layout.save_star(layout.new_star(layout.write_config(root / "checkpoint")), root / "checkpoint")
    (root / "checkpoint" / "sampling.json").write_text(json.dumps(SAMPLING))
    return root / "checkpoint", export(str(root / "checkpoint"), out=root / "bundle")


def test_the_runtime_paints_what_the_reference_paints(nano: tuple[Path, Path]) -> None:
    checkpoint, bundle = nano
    random = Random(3)
    pictures = list(pictures_from_scenes([random_scene(random) for _ in range(2)], seed=3))
    reference = Painter.from_checkpoint(checkpoint)
    with scoring.Star(bundle) as star:
        shipped = dataclasses.asdict(star.model.sampling)
        assert shipped == dataclasses.asdict(reference.sampling) == SAMPLING
        runtime = scoring.RuntimePainter(star)
        for made in (lambda p: p.draw(["a red circle", "zwei Igel"], seed=5), lambda p: p.rebuild(pictures),
                     lambda p: p.edit(pictures, ["remove the star", "make it blue"], seed=6),
                     lambda p: p.reason(["a big box"], seed=7)[1]):
            for expected, got in zip(made(reference), made(runtime), strict=True):
                assert np.mean(np.abs(expected.astype(int) - got) > 2) < 0.02  # a tie may turn one of 64 tokens
        assert runtime.ask(pictures, ["what color is the star?"] * 2) == reference.ask(pictures, ["what color is the star?"] * 2)


def test_bad_inputs_of_people(nano: tuple[Path, Path]) -> None:
    """Words of no grammar and pictures of any size are taken; what cannot fit is refused with both numbers."""
    with scoring.Star(nano[1]) as star:
        picture = np.random.default_rng(1).integers(0, 256, (37, 200, 3)).astype(np.uint8)
        assert star.generate("Ein Mops kam in die Küche 🐶", seed=1).images.shape == (1, 64, 64, 3)
        assert star.edit(picture, "sort the books by colour", seed=1).images.shape == (1, 64, 64, 3)
        assert len(star.ask(picture, "who is this?", max_new_tokens=4).ids) <= 4
        with pytest.raises(InputError, match="at most 512 tokens, got [0-9]+"):
            star.generate("circle " * 600)


def test_a_bundle_is_scored_beside_the_recorded_reference(nano: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, bundle = nano
    monkeypatch.setattr(benchmark, "SMALL", {"generate": 1, "rebuild": 2})
    alone = scoring.score(bundle, checkpoint=checkpoint)
    assert alone.reference is None and "reference" not in alone.text
    stored = {"small": benchmark.json_from_score(alone.score), "full": None}
    (checkpoint / "score.json").write_text(json.dumps(stored))
    steps = []
    outcome = scoring.score(bundle, checkpoint=checkpoint, progress=lambda what, done, total: steps.append((done, total)))
    assert outcome.reference == alone.reference or outcome.reference.right == alone.score.right == outcome.score.right
    assert "reference" in outcome.text and steps[-1] == (8, 8)


def test_another_models_bundle_is_refused(nano: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "NAME", "STAR-Pico")
    with pytest.raises(InputError, match="This bundle is not STAR-Nano's") as caught:
        scoring.score(nano[1])
    assert "expected STAR-Pico, got STAR-Nano" in str(caught.value)
