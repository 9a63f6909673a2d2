"""The miniature model in memory, and folders like its checkpoint in which a test may put something else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from reference.model import Star
from reference.weights import CheckpointFiles, load_star, resolve_checkpoint


@pytest.fixture(scope="session")
def mini_files(mini_checkpoint: Path) -> CheckpointFiles:
    return resolve_checkpoint(mini_checkpoint)


@pytest.fixture(scope="session")
def stars(mini_files: CheckpointFiles) -> dict[bool, Star]:
    """rope_bf16 -> the miniature model."""
    return {rope_bf16: load_star(mini_files, rope_bf16=rope_bf16) for rope_bf16 in (False, True)}


@pytest.fixture(scope="session")
def star(stars: dict[bool, Star]) -> Star:
    return stars[False]


@pytest.fixture
def folder(mini_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint folder of links to the miniature's files:
    replace a file by `put`, never write through a link."""
    for path in mini_checkpoint.rglob("*"):
        if path.is_file():
            link = tmp_path / "checkpoint" / path.relative_to(mini_checkpoint)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    return tmp_path / "checkpoint"


@pytest.fixture
def put(folder: Path) -> Callable[[str, bytes | str], Path]:
    """Replace one file of `folder`."""

    def replace(name: str, content: bytes | str) -> Path:
        path = folder / name
        path.unlink(missing_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return replace
