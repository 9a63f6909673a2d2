"""What all tests share: the miniature checkpoint, written once per session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def mini_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the miniature checkpoint in release layout,
    shared by the session: read it, never write into it."""
    from reference.mini import write_checkpoint

    root = tmp_path_factory.mktemp("checkpoint") / "mini"
    write_checkpoint(root)
    return root


@pytest.fixture(scope="session")
def bundle_of(mini_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """precision -> bundle of the miniature checkpoint,
    exported once per session: read it, never write into it."""
    from star_export.exporter.export import export

    made: dict[str, Path] = {}

    def bundle(precision: str) -> Path:
        if precision not in made:
            made[precision] = export(
                str(mini_checkpoint), out=tmp_path_factory.mktemp("bundle") / precision, precision=precision
            )
        return made[precision]

    return bundle


@pytest.fixture(scope="session")
def mini_bundle(bundle_of: Callable[[str], Path]) -> Path:
    """The miniature bundle in float32."""
    return bundle_of("fp32")
