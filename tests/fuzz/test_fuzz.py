"""The fuzzers of what people hand over run with every test; `python -m tests.fuzz` runs all of them, longer.

`FUZZ_SECONDS` is for each of the four groups.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from .__main__ import fuzz
from .targets import Target, targets

GROUPS = {
    "records": ("manifest", "plan record"),
    "weights": ("safetensors", "pt"),
    "settings and templates": ("preprocessor", "template"),
    "images": ("picture",),
}
SECONDS = float(os.environ.get("FUZZ_SECONDS", "20" if os.environ.get("CI") else "4"))


@pytest.fixture(scope="module")
def every(mini_bundle: Path, mini_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory):
    return targets(mini_bundle, mini_checkpoint, tmp_path_factory.mktemp("scratch"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where what is found would be kept


@pytest.mark.parametrize("group", GROUPS)
def test_no_mutation_costs_more_than_an_error_of_ours(every: dict[str, Target], group: str) -> None:
    names = GROUPS[group]
    found = [fuzz(name, every[name], runs=None, seconds=SECONDS / len(names)) for name in names]
    assert not sum(found), "each is printed above"


def test_a_reader_that_fails_is_found(every: dict[str, Target], tmp_path: Path) -> None:
    def read(data: bytes) -> None:
        raise KeyError("means")

    broken = Target((b"{}",), every["template"].mutate, read)
    assert fuzz("broken", broken, runs=3, seconds=None) == 3
    assert len(list((tmp_path / "fuzz-crashes").iterdir())) >= 1
