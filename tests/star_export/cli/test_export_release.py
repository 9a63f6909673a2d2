"""`star-export export star-3b`, from a cache of the hub to a bundle, without a network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engines.bundle.seal import CONTENT
from star_export.cli.parser import main
from star_export.exporter import export as exporter
from tests.helpers.hub import COMMIT, cache_star_3b, miniature_as_star_3b, take_offline


@pytest.fixture
def hub(tmp_path: Path, mini_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, no network, and `star-3b` with the miniature's weights."""
    miniature_as_star_3b(mini_checkpoint, monkeypatch)
    return take_offline(tmp_path / "hub", monkeypatch)


def lines(capsys: pytest.CaptureFixture) -> list[str]:
    """The three lines of an error, without the one that announces a download."""
    return [line for line in capsys.readouterr().err.splitlines() if not line.startswith("downloading ")]


def test_one_command_gives_the_bundle_of_the_same_files_in_a_folder(
    hub: Path, mini_checkpoint: Path, mini_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    cache_star_3b(hub, mini_checkpoint)
    assert main(["export", "star-3b", "--out", str(tmp_path / "star-3b"), "--no-progress", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["bundle"] == str(tmp_path / "star-3b") and printed.err == ""
    named, folder = (
        json.loads((b / "manifest.json").read_text()) for b in (tmp_path / "star-3b", mini_bundle)
    )
    repositories = ["MM-MVR/STAR-3B", "MM-MVR/STAR-VQ", "Qwen/Qwen2.5-VL-3B-Instruct"]
    assert named.pop(CONTENT) != folder.pop(CONTENT)  # of a manifest that names the hub
    assert named == folder | {"hub": dict.fromkeys(repositories, COMMIT)} and folder["hub"] == {}


def test_a_wrong_file_is_refused_before_tracing(
    hub: Path,
    mini_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    def traced(*_, **__):
        raise AssertionError("a component was traced")

    monkeypatch.setattr(exporter, "graph_from_config", traced)
    places = cache_star_3b(hub, mini_checkpoint)
    places["vq"].unlink()
    places["vq"].write_bytes((mini_checkpoint / "STAR-mini.pt").read_bytes())
    words = ["export", "star-3b", "--precision", "int4", "--out", str(tmp_path / "out"), "--no-progress"]
    assert main(words) == 3
    what, where, fix = lines(capsys)
    assert what == "error: VQ-Model.pt is not the file of the release"
    assert "expected SHA-256 " in where and " got " in where and "--vq" in fix
    assert not (tmp_path / "out").exists()
    with pytest.raises(AssertionError, match="a component was traced"):
        main([*words, "--vq", str(mini_checkpoint / "VQ-Model.pt")])


def test_a_missing_part_is_named_with_the_way_out(
    hub: Path, mini_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["export", "star-3b", "--out", str(tmp_path / "out"), "--no-progress"]
    assert main(words) == 3
    what, where, fix = lines(capsys)
    assert what == "error: STAR-3B.pt is not on this machine and cannot be downloaded"
    assert "MM-MVR/STAR-3B" in where and "--from FOLDER" in fix
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    (downloads / "STAR-3B.pt").symlink_to(mini_checkpoint / "STAR-mini.pt")
    assert main([*words, "--from", str(downloads)]) == 3
    assert "VQ-Model.pt is not on this machine" in lines(capsys)[0]
    (downloads / "VQ-Model.pt").symlink_to(mini_checkpoint / "VQ-Model.pt")
    (downloads / "Qwen2.5-VL-3B-Instruct").symlink_to(mini_checkpoint / "Qwen2.5-VL-mini")
    assert main([*words, "--from", str(downloads), "--components", "text_head"]) == 0
