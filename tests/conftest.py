"""What all tests share: the miniature checkpoint, written once per session."""
from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def mini_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the miniature checkpoint in release layout. Shared by the session: read it, do not write into it."""
    from reference.mini import write_checkpoint
    root = tmp_path_factory.mktemp("checkpoint") / "mini"
    write_checkpoint(root)
    return root
