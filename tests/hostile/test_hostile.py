"""Every hostile case holds: within this process where it can, and else with the installed program."""

from __future__ import annotations

import io
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from star_export.cli.parser import main

from .cases import CASES
from .harness import BUNDLE, CHECKPOINT, Case, Ended, faults_of, installed, run_case


def test_there_are_enough_of_them_and_each_has_a_name() -> None:
    assert len(CASES) >= 250 and len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_hostile_input_is_told_and_loses_nothing(
    case: Case,
    mini_bundle: Path,
    mini_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    def here(case: Case, words: list[str], folder: Path) -> Ended:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(case.stdin)))
        capfd.readouterr()
        return Ended(main(words), *capfd.readouterr())

    def outside(case: Case, words: list[str], folder: Path) -> Ended:
        # What a process has before it becomes another program, a copy of this one, counts as its peak.
        return replace(installed(str(program))(case, words, folder), peak_bytes=0)

    program = Path(sys.executable).with_name("star-export")
    alone = case.stdout or case.stderr or case.environment
    place = tmp_path / "case"
    place.mkdir()
    originals = {BUNDLE: mini_bundle, CHECKPOINT: mini_checkpoint}
    result = run_case(case, place, outside if alone else here, originals=originals)
    monkeypatch.chdir(tmp_path)  # back from the folder that goes away
    shutil.rmtree(place)
    assert result.faults == ()


def test_each_promise_can_be_broken() -> None:
    case, good = Case("x", (), 3, said="wrong"), "error: wrong\n  where: w\n  fix: f\n"
    assert faults_of(case, Ended(3, "", good), []) == []
    for ended, changed in (
        (Ended(0, "", good), []),
        (Ended(3, "", "Traceback\n" + good), []),
        (Ended(3, "", "wrong"), []),
        (Ended(3, "", good.replace("wrong", "bad")), []),
        (Ended(3, "", good.replace("w\n", "\x07\n")), []),
        (Ended(3, "", good), ["out.png"]),
        (Ended(3, "", good, peak_bytes=2 << 30), []),
    ):
        assert len(faults_of(case, ended, changed)) == 1
