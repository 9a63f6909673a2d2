"""An untrained STAR-Nano in full size, and a much smaller one of the same layout that trains in seconds."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from reference.nano import recipe
from reference.nano.checkpoint import layout
from reference.nano.checkpoint.tokens import Rows
from reference.nano.recipe import STAGES

SMALL = {
    "HIDDEN": 128,
    "HEADS": 2,
    "KV_HEADS": 1,
    "INTERMEDIATE": 256,
    "BASE_LAYERS": 2,
    "STACKED_LAYERS": 2,
    "CODEBOOK_SIZE": 64,
    "VQ": recipe.VQ | {"ch": 32, "ch_mult": [1, 1, 1, 1], "z_channels": 16, "num_heads": 1},
    "VISION": recipe.VISION
    | {
        "depth": 2,
        "hidden_size": 64,
        "num_heads": 1,
        "intermediate_size": 64,
        "out_hidden_size": 128,
        "fullatt_block_indexes": [1],
    },
}


@pytest.fixture(scope="session")
def nano_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an untrained STAR-Nano. Read it, do not write into it."""
    root = tmp_path_factory.mktemp("nano") / "checkpoint"
    layout.save_star(layout.new_star(layout.write_config(root)), root)
    return root


@pytest.fixture(scope="session")
def nano_rows(nano_root: Path) -> Rows:
    return Rows.from_file(
        nano_root / recipe.BASE_FOLDER / "tokenizer.json", layout.read_config(nano_root).special
    )


@pytest.fixture
def small_root(nano_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder that holds only Nano's tokenizer;
    during the test the recipe is that of a small model and short stages."""
    for name, value in SMALL.items():
        monkeypatch.setattr(recipe, name, value)
    for name, stage in STAGES.items():
        monkeypatch.setitem(STAGES, name, dataclasses.replace(stage, steps=2, batch=8, warmup=1))
    base = tmp_path / "small" / recipe.BASE_FOLDER
    base.mkdir(parents=True)
    shutil.copy(nano_root / recipe.BASE_FOLDER / "tokenizer.json", base)
    return tmp_path / "small"
