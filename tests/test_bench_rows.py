"""The benchmark of fewer rows runs on the official cases, and counts the rows that a painting has."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines import Star
from tests.bench_rows import ALL, VARIANTS, table
from tests.helpers.official_diffusion import CASES


@pytest.mark.parametrize("case", ["t2i0", "edit0"])
def test_each_variant_has_its_line_and_all_rows_are_those_of_a_painting(
    diffusion_bundle: Path, capsys: pytest.CaptureFixture, case: str
) -> None:
    with Star(diffusion_bundle) as star:
        table(star, case)
    first, *others = [line for line in capsys.readouterr().out.splitlines() if " | " in line][1:]
    rows = {"t2i0": 3 * (CASES[case]["steps"] - 1) + 1, "edit0": 4 * CASES[case]["steps"]}[case]
    assert first == f"| {ALL.name} | {rows} | 1.00 | inf |"
    assert [line.split(" | ")[0].removeprefix("| ") for line in others] == [v.name for v in VARIANTS]
