"""What the tests of the validator share: STAR-Nano, as shipped and untrained."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.untrained_nano import write_untrained


@pytest.fixture(scope="session")
def nano(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An untrained STAR-Nano and its bundle: read them, never write into them."""
    from star_export.exporter.export import export

    root = tmp_path_factory.mktemp("score")
    checkpoint = write_untrained(root / "checkpoint")
    return checkpoint, export(str(checkpoint), out=root / "bundle")


@pytest.fixture(scope="session")
def shipped_nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of STAR-Nano in bf16: read it, never write into it."""
    from star_export.exporter.export import export

    return export("nano", out=tmp_path_factory.mktemp("nano") / "bundle", precision="bf16")
