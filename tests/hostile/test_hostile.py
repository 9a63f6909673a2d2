"""Every hostile case holds, with the program that is installed in this environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from .cases import CASES
from .harness import BUNDLE, CHECKPOINT, Case, faults_of, program_of, run_case


def test_there_are_enough_of_them_and_each_has_a_name() -> None:
    assert len(CASES) >= 250 and len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_hostile_input_is_told_and_loses_nothing(
    case: Case, mini_bundle: Path, mini_checkpoint: Path, tmp_path: Path
) -> None:
    place = tmp_path / "case"
    place.mkdir()
    originals = {BUNDLE: mini_bundle, CHECKPOINT: mini_checkpoint}
    assert run_case(case, place, originals=originals, program=program_of()).faults == ()


def test_each_promise_can_be_broken() -> None:
    case, good = Case("x", (), 3, said="wrong"), "error: wrong\n  where: w\n  fix: f\n"
    assert faults_of(case, 3, "", good, [], 0) == []
    for broken in (
        (0, "", good, [], 0),
        (3, "", "Traceback\n" + good, [], 0),
        (3, "", "wrong", [], 0),
        (3, "", good.replace("wrong", "bad"), [], 0),
        (3, "", good.replace("w\n", "\x07\n"), [], 0),
        (3, "", good, ["out.png"], 0),
        (3, "", good, [], 2 << 30),
    ):
        assert len(faults_of(case, *broken)) == 1
