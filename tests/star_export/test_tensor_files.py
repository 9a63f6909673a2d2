"""Safetensors files are whole or absent, and a full disk is a user's error (docs/bad_inputs.md 12)."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from engines.errors import InputError
from star_export.tensor_files import save_tensors


@pytest.fixture
def full_disk() -> Iterator[None]:
    """Files above 64 KiB cannot be written."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("tensors", [{"x": np.ones(1 << 20)}, {"x": torch.ones(1 << 20)}])
def test_what_does_not_fit_is_told_and_leaves_the_old_file(tmp_path: Path, full_disk: None, tensors) -> None:
    path = tmp_path / "t.safetensors"
    save_tensors({"x": np.ones(3, np.float32)}, path)
    with pytest.raises(InputError, match="File too large") as error:
        save_tensors(tensors, path)
    assert str(path) in error.value.where and isinstance(error.value.__cause__, OSError)
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and load_file(path)["x"].tolist() == [1, 1, 1]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        save_tensors({"x": np.ones(3)}, tmp_path / "no" / "t.safetensors")
