"""The benchmark on a bundle: the runtime's images are the reference's,
both are in the table, and faults cost points."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from random import Random

import numpy as np
import pytest

from engines.bundle.reader import Bundle
from engines.errors import InputError
from engines.progress import silent
from reference.nano.benchmark import score as benchmark
from reference.nano.benchmark import sweep
from reference.nano.benchmark.painter import Painter
from reference.nano.world.draw import images_from_scenes
from reference.nano.world.edits import random_edit
from reference.nano.world.prompts import scene_of
from reference.nano.world.world import random_scene
from star_export.cli.parser import main
from star_export.validator import score as scoring
from star_export.validator.ladder import Subject, score_of_tasks
from tests.helpers.untrained_nano import SAMPLING

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
        return list(prompts), [
            self.known[prompt] if self.wrong != "reason" else blank() for prompt in prompts
        ]

    def edit(self, images, texts, *, seed):
        return [self.known[text] if self.wrong != "edit" else image for image, text in zip(images, texts)]

    def ask(self, images, questions):
        return [self.known[question] if self.wrong != "ask" else "maybe" for question in questions]

    def rebuild(self, images):
        return [np.clip(image.astype(int) + 8, 0, 255).astype(np.uint8) for image in images]


def blank() -> np.ndarray:
    return np.full((64, 64, 3), 245, np.uint8)


def answers(task: str) -> dict[str, object]:
    """Text -> a right result, by making the same items with the makers' own words kept."""
    from reference.nano.world import edits, prompts, questions, riddles

    random, known = Random(f"benchmark {benchmark.SEED} {task}"), {}
    kinds = {
        "generate": prompts.CATEGORIES,
        "edit": edits.KINDS,
        "ask": questions.KINDS,
        "reason": riddles.KINDS,
    }[task]
    for kind in kinds:
        if task == "edit":
            edit = random_edit(random, kind, test=True)
            known[edit.text] = images_from_scenes([edit.after], seed=1)[0]
        elif task == "ask":
            while not (found := questions.random_question(random, random_scene(random), kind, test=True)):
                pass
            known[found[0]] = found[1]
        else:
            make = prompts.random_prompt if task == "generate" else riddles.random_riddle
            text, request = make(random, kind, test=True)
            known[text] = images_from_scenes([scene_of(Random(0), request)], seed=1)[0]
    return known


def test_a_perfect_painter_gets_every_point() -> None:
    score = benchmark.measure(Perfect(), COUNTS)
    overall = {task: score.overall(task) for task in benchmark.GOALS}
    assert overall == {"generate": (6, 6), "edit": (5, 5), "ask": (5, 5), "reason": (4, 4)}
    assert all(result.right for result in score.results) and 29 < score.psnr < 31


@pytest.mark.parametrize("task", benchmark.GOALS)
def test_a_painter_that_fails_one_task_loses_its_points_alone(task: str) -> None:
    score = benchmark.measure(Perfect(task), COUNTS)
    assert score.overall(task)[0] == 0
    assert all(
        score.overall(other)[0] == score.overall(other)[1] for other in benchmark.GOALS if other != task
    )
    assert (
        sum(not result.right for result in score.results if result.task != "reason off")
        == score.overall(task)[1]
    )


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


def test_the_runtime_paints_what_the_reference_paints(nano: tuple[Path, Path]) -> None:
    checkpoint, bundle = nano
    random = Random(3)
    images = list(images_from_scenes([random_scene(random) for _ in range(2)], seed=3))
    reference = Painter.from_checkpoint(checkpoint)
    with scoring.Star(bundle) as star:
        shipped = dataclasses.asdict(star.model.sampling)
        assert shipped == {task: dataclasses.asdict(s) for task, s in reference.sampling.items()} == SAMPLING
        runtime = scoring.RuntimePainter(star)
        for made in (
            lambda p: p.draw(["a red circle", "zwei Igel"], seed=5),
            lambda p: p.rebuild(images),
            lambda p: p.edit(images, ["remove the star", "make it blue"], seed=6),
            lambda p: p.reason(["a big box"], seed=7)[1],
        ):
            for expected, got in zip(made(reference), made(runtime), strict=True):
                assert (
                    np.mean(np.abs(expected.astype(int) - got) > 2) < 0.02
                )  # a tie may turn one of 64 tokens
        assert runtime.ask(images, ["what color is the star?"] * 2) == reference.ask(
            images, ["what color is the star?"] * 2
        )


def test_bad_inputs_of_people(nano: tuple[Path, Path]) -> None:
    """Words of no grammar and images of any size are taken; what cannot fit is refused with both numbers."""
    with scoring.Star(nano[1]) as star:
        image = np.random.default_rng(1).integers(0, 256, (37, 200, 3)).astype(np.uint8)
        assert star.generate("Ein Mops kam in die Küche 🐶", seed=1).images.shape == (1, 64, 64, 3)
        assert star.edit(image, "sort the books by colour", seed=1).images.shape == (1, 64, 64, 3)
        assert len(star.ask(image, "who is this?", max_new_tokens=4).ids) <= 4
        with pytest.raises(InputError, match="at most 512 tokens, got [0-9]+"):
            star.generate("circle " * 600)


def test_a_bundle_of_weights_that_were_not_measured_is_scored_alone(
    nano: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(scoring.SETS, "small", {"generate": 1, "rebuild": 2})
    steps = []
    outcome = scoring.score(nano[1], progress=lambda what, done, total: steps.append((done, total)))
    assert outcome.reference is None and "reference" not in outcome.text and steps[-1] == (8, 8)


@pytest.fixture(scope="module")
def measured(nano: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint with its score recorded, and its bundle. Nothing that an untrained model does is right."""
    from star_export.exporter.export import export

    checkpoint = shutil.copytree(nano[0], tmp_path_factory.mktemp("measured") / "checkpoint")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "SMALL", COUNTS)
        patch.setattr(benchmark, "FULL", COUNTS)
        sweep.record(Painter.from_checkpoint(checkpoint), checkpoint)
    return checkpoint, export(str(checkpoint), out=checkpoint.parent / "bundle")


def test_a_bundle_carries_the_references_score_and_is_scored_beside_it(
    measured: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(scoring.SETS, "small", COUNTS)
    outcome = scoring.score(measured[1], images=tmp_path)
    assert outcome.reference.right == outcome.score.right and outcome.reference.psnr == pytest.approx(
        outcome.score.psnr, abs=0.01
    )
    assert "reference" in outcome.text
    assert {path.name for path in tmp_path.iterdir()} == {
        "generated.png",
        "edited.png",
        "answered.png",
        "reasoned.png",
    }


def test_the_last_rung_of_validate_is_the_score(
    measured: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(scoring.SETS, "small", COUNTS)
    subject = Subject(Bundle.open(measured[1]), "onnxruntime", "fp32")
    rows, _ = score_of_tasks(subject, silent)
    tasks = [row.check.split(":")[0] for row in rows[:-1]]
    assert tasks == ["rebuild", "generate", "edit", "ask", "reason"]
    assert rows[-1].check == "24 of 24 images are fp32's id for id"
    assert all(row.worst.passed for row in rows)
    better = benchmark.Score({task: {"any": (9, 10)} for task in benchmark.GOALS}, psnr=40.0)
    monkeypatch.setattr(scoring, "recorded_score", lambda bundle, kind: better)
    rows, _ = score_of_tasks(subject, silent)
    assert not any(row.worst.passed for row in rows[:-1]) and "the reference 40.00 dB" in rows[0].check


def test_a_score_may_fall_short_as_far_as_chance_goes() -> None:
    reference = benchmark.Score({task: {"any": (90, 100)} for task in benchmark.GOALS}, psnr=32.0)
    ours = benchmark.Score(
        {task: {"any": (82, 100)} for task in benchmark.GOALS} | {"edit": {"any": (79, 100)}}, psnr=33.0
    )
    found = scoring.shortfalls(ours, reference)
    assert found["rebuild"][0] == 0 and {
        task: value <= tolerance for task, (value, tolerance) in found.items()
    } == {"rebuild": True, "generate": True, "edit": False, "ask": True, "reason": True}
    assert found["ask"][1] == pytest.approx(0.098, abs=1e-3) and found["edit"][1] == pytest.approx(
        0.101, abs=1e-3
    )
    ours.right["edit"] = {"any": (9, 10)}  # fewer items of the same share
    assert scoring.shortfalls(ours, reference)["edit"][0] == 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[1]",
        '{"small": {"right": 3, "psnr": 1}}',
        '{"small": null}',
        '{"small": {"right": {}, "psnr": 30}}',
        json.dumps({"small": {"psnr": 30, "right": {task: {"any": [2, 1]} for task in benchmark.GOALS}}}),
    ],
)
def test_a_recorded_score_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="score.json"):
        scoring.score_from_bytes(text.encode(), "small", where="score.json")


def test_the_command_prints_json_and_wants_a_folder(
    nano: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(scoring.SETS, "small", {"generate": 1, "rebuild": 2})
    assert main(["score", str(nano[1]), "--json", "--no-progress"]) == 0
    assert set(json.loads(capsys.readouterr().out)["score"]) == {"right", "psnr"}
    assert main(["score", str(nano[1]), "--pictures", str(tmp_path / "none")]) == 3
    assert "expected an existing folder" in capsys.readouterr().err


def test_another_models_bundle_is_refused(nano: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "NAME", "STAR-Pico")
    with pytest.raises(InputError, match="Only STAR-Nano's bundles can be scored") as caught:
        scoring.score(nano[1])
    assert "expected STAR-Pico, got STAR-Nano" in str(caught.value)
