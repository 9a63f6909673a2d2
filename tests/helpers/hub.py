"""A cache of the hub in its own layout, without a network; a release with the weights of the miniature."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path

import pytest

from reference import releases
from reference.releases import Release

COMMIT = "0" * 40


def take_offline(hub: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make `hub` the cache, and cut the network off, as HF_HUB_CACHE and HF_HUB_OFFLINE=1 do at the start."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return hub


def cached(hub: Path, repository: str, files: Mapping[str, Path]) -> Path:
    """A snapshot in the hub's cache, made of links."""
    home = hub / ("models--" + repository.replace("/", "--"))
    snapshot = home / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(COMMIT)
    for name, file in files.items():
        (snapshot / name).symlink_to(file)
    return snapshot


def by_name(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in sorted(folder.iterdir())}


def miniature_as_star_3b(mini_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Release:
    """Let `star-3b` have the configuration and the hashes of the miniature; names and places stay."""

    def sha256(name: str) -> str:
        return hashlib.sha256((mini_checkpoint / name).read_bytes()).hexdigest()

    real = releases.RELEASES["star-3b"]
    mini = dataclasses.replace(
        real,
        config_json=mini_checkpoint / "STAR-mini.json",
        star=dataclasses.replace(real.star, sha256=sha256("STAR-mini.pt")),
        vq=dataclasses.replace(real.vq, sha256=sha256("VQ-Model.pt")),
    )
    monkeypatch.setitem(releases.RELEASES, "star-3b", mini)
    return mini


def cache_star_3b(hub: Path, mini_checkpoint: Path) -> dict[str, Path]:
    """Fill the cache with the release's files; part -> its place."""
    (hub.parent / "page.md").write_text("the repository's page")
    page = {"README.md": hub.parent / "page.md"}
    star = cached(hub, "MM-MVR/STAR-3B", page | {"STAR-3B.pt": mini_checkpoint / "STAR-mini.pt"})
    vq = cached(hub, "MM-MVR/STAR-VQ", page | {"VQ-Model.pt": mini_checkpoint / "VQ-Model.pt"})
    base = cached(hub, "Qwen/Qwen2.5-VL-3B-Instruct", page | by_name(mini_checkpoint / "Qwen2.5-VL-mini"))
    return {"star": star / "STAR-3B.pt", "vq": vq / "VQ-Model.pt", "base": base}
