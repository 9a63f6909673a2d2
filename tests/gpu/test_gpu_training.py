"""The training's step, on the CPU with a much smaller model: the log's ends are compared, and the checkpoint
goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import time
from pathlib import Path

import pytest
import torch

from reference.nano import recipe
from reference.nano.training import train
from tests.gpu import training
from tests.gpu.report import Report
from tests.reference.nano.conftest import SMALL


@pytest.fixture
def in_process(monkeypatch):
    """The training's command runs here, so that its recipe can be small."""
    for name, value in SMALL.items():
        monkeypatch.setattr(recipe, name, value)
    stage = dataclasses.replace(recipe.STAGES[training.STAGE], steps=400, batch=8, warmup=1)
    monkeypatch.setitem(recipe.STAGES, stage.name, stage)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def lines_of(command: list[str], *, seconds: float):
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            status = train.main(command[3:])
        for line in said.getvalue().splitlines():
            time.sleep(1e-4)  # lines have different times
            yield line
        yield status

    monkeypatch.setattr(training, "lines_of", lines_of)
    yield
    torch.set_num_threads(threads)


def observed(tmp_path: Path, name: str) -> dict:
    report, folder = Report(tmp_path / f"{name}.json"), tmp_path / name
    train.begin(folder)  # takes a while, which is not the training's
    training.observe(folder, report, device="cpu", seconds=5.0, cpu_seconds=1.5, workers=0, scale=1.0)
    return report.record


def test_the_loss_falls_and_the_checkpoint_goes_on(in_process, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(training, "FALLEN", 0.98)
    record = observed(tmp_path, "run")
    assert {name: check["passed"] for name, check in record["checks"].items()} == {
        "the loss falls": True,
        "the checkpoint goes on on the CPU": True,
        "it goes on where it was": True,
    }, record
    figures = record["figures"]
    assert (
        figures["loss, last tenth"]["median"] < figures["loss, first tenth"]["median"]
        and figures["samples per second on cpu"]["min"] > 0
    )
    assert "loss on the CPU, resumed" in figures


def test_a_loss_that_stays_and_a_training_that_fails_are_seen(monkeypatch, tmp_path) -> None:
    work = tmp_path / "flat" / "training"
    monkeypatch.setattr(training, "trained", lambda *arguments: [1.0])
    monkeypatch.setattr(training, "step_of", lambda folder: 40)
    monkeypatch.setattr(training, "losses_of", lambda folder: [(step, 5.0) for step in range(1, 41)])
    report = Report(tmp_path / "flat.json")
    training.observe(work, report, device="cuda", seconds=1, cpu_seconds=1, workers=0, scale=1)
    assert {name: check["passed"] for name, check in report.record["checks"].items()} == {
        "the loss falls": False,
        "the checkpoint goes on on the CPU": False,
    }
    monkeypatch.undo()
    for lines, words in (([1], "exit status 1"), ([], "killed")):
        monkeypatch.setattr(training, "lines_of", lambda command, seconds: iter(lines))
        report = Report(tmp_path / "broken.json")
        assert training.trained(work, report, "cuda", 1, 0, 1) is None
        assert words in report.record["checks"]["training on cuda"]["detail"]
