"""What all tests share: the miniature checkpoint and its bundles, and the cores of the machine."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
# set before torch is imported, here and in the processes that tests start: workers share the cores
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // WORKERS)))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep together on one worker what shares expensive fixtures.

    These are the tests of a file, and all that need a bundle of the miniature checkpoint: tracing it for the
    first time takes longer than most files. Files that trace STAR-Nano say so by a mark.
    """
    for item in items:
        if not item.get_closest_marker("xdist_group"):
            group = "bundles" if "bundle_of" in getattr(item, "fixturenames", ()) else item.path.stem
            item.add_marker(pytest.mark.xdist_group(group))


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
