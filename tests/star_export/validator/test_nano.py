"""The whole line on weights that mean something:
STAR-Nano as shipped, exported in 16 bits, passes every rung."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from engines.bundle.reader import Bundle
from engines.fit.sizes import sizes_from_bundle
from star_export.planner.source import find_source, sizes_from_source
from star_export.validator.ladder import validate
from star_export.validator.score import SCORE


@pytest.fixture
def bundle(shipped_nano: Path, tmp_path: Path) -> Path:
    return shutil.copytree(shipped_nano, tmp_path / "bundle")  # a certificate is written into it


def test_the_bundle_holds_what_the_reference_reached_and_how_it_draws(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    assert SCORE in manifest.files and manifest.model.name == "STAR-Nano" and manifest.precision == "bf16"


def test_the_bundle_has_the_sizes_that_its_plan_predicts(bundle: Path) -> None:
    wanted, got = sizes_from_bundle(Bundle.open(bundle)), sizes_from_source(find_source("nano"), "bf16")
    assert (got.graphs, got.tables, got.model) == (wanted.graphs, wanted.tables, wanted.model)
    assert got.bundle_bytes == pytest.approx(wanted.bundle_bytes, rel=0.02)


@pytest.mark.slow
def test_every_rung_passes(bundle: Path) -> None:
    certificate = validate(bundle)
    assert certificate.passed
    assert [rung.name for rung in certificate.rungs] == [
        "files and graphs",
        "prepared inputs",
        "golden tensors",
        "dialects",
        "decoder steps",
        "whole runs",
        "other ways",
        "fast path",
        "score",
    ]
    *tasks, same = certificate.rungs[-1].rows
    assert " of 24 images are fp32's id for id" in same.check and same.worst.value < 0.5
    assert {row.check.split(":")[0] for row in tasks} == {
        "generate",
        "edit",
        "ask",
        "reason",
        "rebuild",
    }
