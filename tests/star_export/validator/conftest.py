"""What the tests of the validator share: an untrained STAR-Nano."""

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
