"""The shipped weights are complete for the stages marked done, small enough, and as good as the card says."""

from __future__ import annotations

import shutil
from pathlib import Path
from random import Random

import pytest
import torch

import reference.nano
from reference.nano.benchmark import score as benchmark
from reference.nano.benchmark.painter import Painter
from reference.nano.checkpoint import layout
from reference.nano.training import train
from reference.nano.world import prompts, riddles
from star_export.validator.score import SCORE, score_from_bytes, shortfalls

WEIGHTS = Path(reference.nano.__file__).parent / "weights"
WEIGHTS_LIMIT = 20_000_000


@pytest.fixture(scope="module")
def painter(tmp_path_factory: pytest.TempPathFactory) -> Painter:
    """Of a copy, as training goes on from it: parts that are not trained yet are made new."""
    out = shutil.copytree(WEIGHTS, tmp_path_factory.mktemp("shipped") / "checkpoint")
    done = [path.stem for path in (out / "training").glob("*.done")]
    assert {"vq", "eyes", "base", "generate"} <= set(done)
    assert train.train(out, names=done, device=torch.device("cpu"), workers=0, scale=1.0, seconds=None)
    kept = [part for part, path in layout.weight_files(WEIGHTS).items() if path.exists()]
    assert {"vq", "base", "trained"} == set(kept)
    assert all(
        layout.weight_files(out)[part].read_bytes() == layout.weight_files(WEIGHTS)[part].read_bytes()
        for part in kept
    )
    assert sum(path.stat().st_size for path in layout.weight_files(out).values()) <= WEIGHTS_LIMIT
    return Painter.from_checkpoint(out)


@pytest.mark.slow
def test_what_was_recorded_is_reached(painter: Painter) -> None:
    """On the small set, up to what chance does to a reference's own share."""
    recorded = score_from_bytes((WEIGHTS / SCORE).read_bytes(), "small", where=SCORE)
    found = shortfalls(benchmark.measure(painter, benchmark.SMALL), recorded)
    assert all(value <= limit for value, limit in found.values()), found


def test_images_are_rebuilt(painter: Painter) -> None:
    assert benchmark.reconstruction(painter, 60, seed=benchmark.SEED) > benchmark.GOAL_PSNR


def test_held_out_questions_are_answered(painter: Painter) -> None:
    right, asked = benchmark.measure(painter, {"ask": 30}).overall("ask")
    assert benchmark.interval(right, asked)[1] >= benchmark.GOALS["ask"] and right / asked > 0.9


def test_held_out_prompts_and_riddles_are_put_in_plain_words(painter: Painter) -> None:
    random = Random("held out")
    asked = [prompts.random_prompt(random, category, test=True) for category in prompts.CATEGORIES * 3]
    asked += [riddles.random_riddle(random, kind, test=True) for kind in riddles.KINDS * 5]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(painter, "_drawn", lambda rows, seed: [])  # the answers alone are judged
        answers, _ = painter.reason([text for text, _ in asked], seed=1)
    right = sum(
        answer.strip() == prompts.caption(request)
        for answer, (_, request) in zip(answers, asked, strict=True)
    )
    assert right >= len(asked) - 1
