"""What all tests share: the miniature checkpoint and its bundles, and the cores of the machine."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

# Set before numpy and torch are imported, and inherited by the workers and by what tests start: models this
# small are fastest on one thread, by far where workers fill the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The first trace of a checkpoint takes longer than most files. Files that trace the same one run in one
# process, which traces it once.
TRACES_MINIATURE = re.compile(
    r"\b(mini_bundle|diffusion_bundle|bundle_of|graph_from_config|traced_graph|export\(str\(mini)"
)
TRACES_NANO = (
    "validator/test_bisect_nano.py",
    "validator/test_nano.py",
    "validator/test_score.py",
    "validator/test_side_by_side.py",
    "plugins/test_tensorrt.py",
)
LONG = "hostile/test_hostile.py"  # takes so long that another worker traces the miniature for it


@pytest.hookimpl(optionalhook=True)  # pytest runs without xdist too
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """Keep together on one worker the tests of a file, and the files that trace the same checkpoint."""
    from xdist.scheduler import LoadScopeScheduling

    class ByCheckpoint(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(config.rootpath / nodeid.partition("::")[0])

    return ByCheckpoint(config, log)


@functools.cache
def group_of(file: Path) -> str:
    """The name of the group that `file` runs with, its own where it shares nothing."""
    if file.as_posix().endswith(TRACES_NANO):
        return "STAR-Nano"
    if file.as_posix().endswith(LONG):
        return str(file)
    return "miniature" if TRACES_MINIATURE.search(file.read_text()) else str(file)


@pytest.fixture(scope="session")
def mini_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the miniature checkpoint in release layout,
    shared by the session: read it, never write into it."""
    from reference.mini import write_checkpoint

    root = tmp_path_factory.mktemp("checkpoint") / "mini"
    write_checkpoint(root)
    return root


@pytest.fixture(scope="session")
def diffusion_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the miniature checkpoint with its diffusion decoder: read it, never write into it."""
    from reference.mini import write_checkpoint

    root = tmp_path_factory.mktemp("checkpoint") / "diffusion"
    write_checkpoint(root, diffusion=True)
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
def diffusion_bundle(diffusion_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of the miniature with its diffusion decoder, in float32: read it, never write into it."""
    from star_export.exporter.export import export

    return export(str(diffusion_checkpoint), out=tmp_path_factory.mktemp("bundle") / "diffusion")


@pytest.fixture(scope="session")
def mini_bundle(bundle_of: Callable[[str], Path]) -> Path:
    """The miniature bundle in float32."""
    return bundle_of("fp32")
