"""Where a checkpoint's files are found: a folder, its JSON,
a clone of the release, the hub's cache, or as told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reference.weights import CheckpointFiles, resolve_checkpoint
from tests.helpers.hub import by_name, cached, take_offline
from tests.helpers.refusals import refused


def test_a_folder_and_its_json_mean_the_same(mini_checkpoint: Path) -> None:
    expected = CheckpointFiles(
        mini_checkpoint / "STAR-mini.json",
        mini_checkpoint / "STAR-mini.pt",
        mini_checkpoint / "Qwen2.5-VL-mini",
        mini_checkpoint / "VQ-Model.pt",
    )
    assert resolve_checkpoint(mini_checkpoint) == expected
    assert resolve_checkpoint(str(mini_checkpoint / "STAR-mini.json")) == expected


def test_the_checkpoint_that_is_shipped_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = resolve_checkpoint("nano")
    assert all(path.exists() for path in (files.config_json, files.star_pt, files.qwen_folder, files.vq_pt))
    (tmp_path / "nano").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_checkpoint("nano") == files
    with refused("nano: expected one STAR*.json, got none", "--checkpoint"):
        resolve_checkpoint("./nano")


def test_parts_can_be_replaced(mini_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "STAR-mini.json").symlink_to(mini_checkpoint / "STAR-mini.json")
    qwen = tmp_path / "elsewhere"
    qwen.mkdir()
    star_pt, vq_pt = mini_checkpoint / "STAR-mini.pt", mini_checkpoint / "VQ-Model.pt"
    files = resolve_checkpoint(tmp_path, checkpoint=star_pt, base=qwen, vq=str(vq_pt))
    assert files == CheckpointFiles(tmp_path / "STAR-mini.json", star_pt, qwen, vq_pt)
    in_folders = resolve_checkpoint(tmp_path, checkpoint=mini_checkpoint, base=qwen, vq=mini_checkpoint)
    assert in_folders == files


def test_a_clone_of_the_release_with_its_checkpoints_folder(tmp_path: Path) -> None:
    configs, weights = tmp_path / "star" / "configs", tmp_path / "checkpoints"
    configs.mkdir(parents=True)
    (weights / "Qwen2.5-VL-3B-Instruct").mkdir(parents=True)
    for name in ("STAR-3B.pt", "VQ-Model.pt"):
        (weights / name).touch()
    source = configs / "STAR_Qwen2.5-VL-3B.json"
    source.write_text(
        json.dumps(
            {
                "language_model": {"model_path": "checkpoints/Qwen2.5-VL-3B-Instruct"},
                "pixel_encoder": {"model_path": "checkpoints/VQ-Model.pt"},
            }
        )
    )
    files = resolve_checkpoint(source, checkpoint=weights / "STAR-3B.pt")
    assert files == CheckpointFiles(
        source, weights / "STAR-3B.pt", weights / "Qwen2.5-VL-3B-Instruct", weights / "VQ-Model.pt"
    )


def test_what_is_absent_is_named(mini_checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    with refused("no such file or folder", str(tmp_path / "absent")):
        resolve_checkpoint(tmp_path / "absent")
    with refused("no such file or folder", "absent.pt"):
        resolve_checkpoint(mini_checkpoint, vq="absent.pt")
    with refused(f"{tmp_path}: expected one STAR*.json, got none", "--checkpoint"):
        resolve_checkpoint(tmp_path)
    (folder / "VQ-Model.pt").unlink()
    with refused("pixel_encoder.model_path does not exist", str(folder / "VQ-Model.pt"), "--vq"):
        resolve_checkpoint(folder)
    (folder / "STAR-other.pt").symlink_to(mini_checkpoint / "STAR-mini.pt")
    with refused("expected one STAR*.pt, got STAR-mini.pt, STAR-other.pt", "--checkpoint"):
        resolve_checkpoint(folder)


@pytest.mark.parametrize("stated", ["../outside/VQ-Model2.pt", "/etc/hostname2"])
def test_stated_paths_do_not_leave_the_release(folder: Path, stated: str) -> None:
    document = json.loads((folder / "STAR-mini.json").read_text())
    document["pixel_encoder"]["model_path"] = stated
    (folder / "STAR-mini.json").unlink()
    (folder / "STAR-mini.json").write_text(json.dumps(document))
    (folder.parent / "outside").mkdir()
    (folder.parent / "outside" / "VQ-Model2.pt").touch()
    with refused("pixel_encoder.model_path does not exist"):
        resolve_checkpoint(folder)


@pytest.fixture
def offline_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache and no network."""
    return take_offline(tmp_path / "hub", monkeypatch)


def test_hub_ids_are_read_from_the_cache(mini_checkpoint: Path, offline_hub: Path) -> None:
    star = cached(
        offline_hub,
        "MM-MVR/STAR-mini",
        {name: mini_checkpoint / name for name in ("STAR-mini.json", "STAR-mini.pt")},
    )
    qwen = cached(offline_hub, "Qwen/Qwen2.5-VL-mini", by_name(mini_checkpoint / "Qwen2.5-VL-mini"))
    vq = cached(offline_hub, "MM-MVR/STAR-VQ", {"VQ-Model.pt": mini_checkpoint / "VQ-Model.pt"})
    files = resolve_checkpoint("MM-MVR/STAR-mini", base="Qwen/Qwen2.5-VL-mini", vq="MM-MVR/STAR-VQ")
    assert files == CheckpointFiles(star / "STAR-mini.json", star / "STAR-mini.pt", qwen, vq / "VQ-Model.pt")
    with refused("language_model.model_path does not exist", "hub id with --base"):
        resolve_checkpoint("MM-MVR/STAR-mini")


def test_an_unknown_hub_id_is_refused(offline_hub: Path) -> None:
    with refused("neither a local path nor a repository that could be downloaded", "MM-MVR/STAR-9B"):
        resolve_checkpoint("MM-MVR/STAR-9B")


def test_a_revision_is_that_of_the_hub_id_and_its_commit_is_known(
    mini_checkpoint: Path, offline_hub: Path, capsys: pytest.CaptureFixture
) -> None:
    base, vq = mini_checkpoint / "Qwen2.5-VL-mini", mini_checkpoint / "VQ-Model.pt"
    names = ("STAR-mini.json", "STAR-mini.pt")
    star = cached(offline_hub, "MM-MVR/STAR-mini", {name: mini_checkpoint / name for name in names})
    (star.parent.parent / "refs" / "v2").write_text("1" * 40)
    star.with_name("1" * 40).symlink_to(star)
    for revision, commit in (("main", "0" * 40), ("v2", "1" * 40), ("1" * 40, "1" * 40), (None, "0" * 40)):
        files = resolve_checkpoint("MM-MVR/STAR-mini", base=base, vq=vq, revision=revision)
        assert files.commits == {"MM-MVR/STAR-mini": commit}
        told = capsys.readouterr().err
        assert "MM-MVR/STAR-mini is no path here: taken as a repository of the hub" in told
        assert (f", revision {revision}" in told) == bool(revision)
    with refused("neither a local path nor", "MM-MVR/STAR-mini, revision v3"):
        resolve_checkpoint("MM-MVR/STAR-mini", base=base, vq=vq, revision="v3")
    assert resolve_checkpoint(mini_checkpoint).commits == {}


@pytest.mark.parametrize(
    "source, parts, told",
    [
        ("nano", {}, "got none"),
        ("star-3b", {}, "got none"),
        ("MM-MVR/STAR-mini", {"base": "Qwen/Qwen2.5-VL-mini"}, "got MM-MVR/STAR-mini, Qwen/Qwen2.5-VL-mini"),
    ],
)
def test_a_revision_is_for_one_hub_id(offline_hub: Path, source: str, parts: dict, told: str) -> None:
    with refused("--revision is for one hub id", "--revision v2", told):
        resolve_checkpoint(source, revision="v2", **parts)


@pytest.mark.parametrize(
    "path", ["checkpoints/STAR-mni", "elsewhere/STAR-mini.pt", "a/b/c", "-x/y", "a/", "/a/b", "a b/c"]
)
def test_a_mistyped_path_does_not_become_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, capsys: pytest.CaptureFixture
) -> None:
    """A folder `checkpoints` is here, so `checkpoints/...` means a file in it."""
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.chdir(tmp_path)
    with refused("no such file or folder", path):
        resolve_checkpoint(path)
    assert capsys.readouterr().err == ""
