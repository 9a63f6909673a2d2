"""Each of the twelve faults, planted at a random layer of STAR-Nano, is found at the right node."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines.bundle.reader import Bundle
from star_export.validator.reference import Reference, reference_star
from tests.helpers.planted_in_graph import FAULTS, check_found, some_of

pytest.importorskip("polygraphy")
PLACES = [(decoder, layer) for decoder in ("base_ar", "stacked_ar") for layer in range(4)]


@pytest.fixture(scope="module")
def references(shipped_nano: Path) -> dict[str, Reference]:
    """The reference of each decoder, which keeps what it computed."""
    bundle = Bundle.open(shipped_nano)
    names = ["base_ar", "stacked_ar"]
    star = reference_star(bundle, names, "nano")
    return {name: Reference(bundle, name, star) for name in names}


def test_there_are_twelve_faults_and_they_reach_both_decoders() -> None:
    assert len(FAULTS) == 12
    assert {some_of(fault, PLACES)[0] for fault in FAULTS} == {"base_ar", "stacked_ar"}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_at_the_right_node(
    references: dict[str, Reference], tmp_path: Path, fault: str
) -> None:
    decoder, layer = some_of(fault, PLACES)
    check_found(references[decoder], fault, layer, tmp_path)
