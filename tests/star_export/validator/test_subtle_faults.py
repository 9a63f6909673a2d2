"""Twelve subtle faults, each planted and each caught, and by which rung: docs/parity.md has the table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from engines.bundle.reader import Bundle
from engines.progress import silent
from star_export.golden.tolerances import compute_of
from star_export.validator.certificate import Certificate
from star_export.validator.ladder import run_ladder
from star_export.validator.subject import Subject
from tests.helpers.spoilt_bundle import copied
from tests.helpers.subtle_faults import FAULTS

BACKEND = "onnxruntime-exact"


def judged(root: Path) -> Certificate:
    bundle = Bundle.open(root)
    compute = compute_of(BACKEND, bundle.manifest.precision)
    return run_ladder(Subject(bundle, BACKEND, compute), silent)


@pytest.mark.parametrize("precision", sorted({fault.precision for fault in FAULTS.values()}))
def test_the_clean_bundle_passes(bundle_of: Callable[[str], Path], precision: str) -> None:
    assert judged(bundle_of(precision)).passed


def test_the_table_names_each_fault_and_its_rung() -> None:
    text = (Path(__file__).parents[3] / "docs" / "parity.md").read_text()
    assert all(f"\n| {name} | {fault.rung} | " in text for name, fault in FAULTS.items())


@pytest.mark.parametrize("name", FAULTS)
def test_a_subtle_fault_is_caught_by_its_rung(
    bundle_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    fault = FAULTS[name]
    root = copied(bundle_of(fault.precision), tmp_path)
    fault.plant(root, monkeypatch)
    last = judged(root).rungs[-1]
    failing = [f"{row.component}: {row.check}" for row in last.rows if not row.worst.passed]
    assert last.name == fault.rung and failing
    assert all(row.startswith(fault.row) for row in failing)
