"""The released models by name: what the data says of them, where their parts are found, and how they are
checked (docs/bad_inputs.md 49, 50)."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from reference import releases
from reference.config import config_from_files
from reference.names import expected_tensors
from reference.releases import BASE_JSON, RELEASES, Release, absent_from_base
from reference.strict_json import read_object
from reference.weights import CheckpointFiles, resolve_checkpoint
from tests.helpers.hub import by_name, cache_star_3b, cached, miniature_as_star_3b, take_offline
from tests.helpers.refusals import refused
from tests.helpers.released import (
    SIZES,
    listed,
    qwen_json,
    star_json,
    stored_shapes,
    without_set_aside,
    write_configs,
)
from tests.helpers.served_hub import served

ROOT = Path(__file__).parents[2]
SPECIFICATION = (ROOT / "docs" / "star.md").read_text()
BASE = "Qwen2.5-VL-3B-Instruct"


def expected_of(size: str, folder: Path) -> dict:
    """What the loader expects of a release, by the configuration that this package holds."""
    write_configs(folder, star_json(size), qwen_json(size))
    return expected_tensors(config_from_files(RELEASES[f"star-{size.lower()}"].config_json, folder / "qwen"))


@pytest.mark.parametrize("size", SIZES)
def test_the_configuration_is_the_releases(size: str) -> None:
    assert read_object(RELEASES[f"star-{size.lower()}"].config_json) == star_json(size)


@pytest.mark.parametrize("size, layers, stacked, depth", [("3B", 36, 16, 2), ("7B", 28, 14, 4)])
def test_the_configuration_is_read_and_gives_the_known_sizes(
    size: str, layers: int, stacked: int, depth: int, tmp_path: Path
) -> None:
    write_configs(tmp_path, star_json(size), qwen_json(size))
    config = config_from_files(RELEASES[f"star-{size.lower()}"].config_json, tmp_path / "qwen")
    assert (config.base_ar.num_layers, config.stacked_ar.num_layers) == (layers, stacked)
    assert config.adapter_depth == depth
    assert (config.vq.image_tokens, config.vq.codebook_size, config.vq.image_size) == (576, 65536, 384)


@pytest.mark.parametrize("size", SIZES)
def test_the_released_names_and_shapes_fit(size: str, tmp_path: Path) -> None:
    expected = expected_of(size, tmp_path)
    for part, file in (("trained", f"star_keys_STAR-{size}.tsv"), ("vq", "star_keys_VQ-Model.tsv")):
        assert stored_shapes(expected[part]) == without_set_aside(listed(file))


@pytest.mark.parametrize("size", SIZES)
def test_sizes_and_hashes_are_the_documented_ones(size: str, tmp_path: Path) -> None:
    """A release stores 2 bytes a number; the base's size follows from its shapes."""
    release = RELEASES[f"star-{size.lower()}"]
    shapes = {
        release.star: listed(f"star_keys_STAR-{size}.tsv"),
        release.vq: listed("star_keys_VQ-Model.tsv"),
        release.base: stored_shapes(expected_of(size, tmp_path)["base"]),
    }
    for part, of_part in shapes.items():
        assert abs(2e-9 * sum(map(math.prod, of_part.values())) - part.gigabytes) < 0.05
    for part in (release.star, release.vq):
        row = f"| {part.repository}, {part.name} | {part.gigabytes:g} GB | {part.sha256} |"
        assert row in SPECIFICATION and len(str(part.sha256)) == 64


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache and no network."""
    return take_offline(tmp_path / "hub", monkeypatch)


@pytest.fixture
def release(mini_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Release:
    return miniature_as_star_3b(mini_checkpoint, monkeypatch)


@pytest.fixture
def downloads(mini_checkpoint: Path, tmp_path: Path) -> Path:
    """A folder of links as a user has who downloaded the parts."""
    folder = tmp_path / "downloads"
    folder.mkdir()
    (folder / "STAR-3B.pt").symlink_to(mini_checkpoint / "STAR-mini.pt")
    (folder / "VQ-Model.pt").symlink_to(mini_checkpoint / "VQ-Model.pt")
    (folder / BASE).symlink_to(mini_checkpoint / "Qwen2.5-VL-mini")
    return folder


def test_a_name_and_its_hub_id_are_found_in_the_cache(
    mini_checkpoint: Path, hub: Path, release: Release, capsys: pytest.CaptureFixture
) -> None:
    places = cache_star_3b(hub, mini_checkpoint)
    expected = CheckpointFiles(release.config_json, places["star"], places["base"], places["vq"])

    def size(part: str) -> int:
        return places[part].stat().st_size

    told: list[tuple[str, int, int]] = []
    files = resolve_checkpoint("star-3b", progress=lambda *step: told.append(step))
    assert files == expected == resolve_checkpoint("MM-MVR/STAR-3B")
    assert {what: (done, total) for what, done, total in told} == {  # the last call of each
        "check the SHA-256 of STAR-3B.pt, in bytes": (size("star"), size("star")),
        "check the SHA-256 of VQ-Model.pt, in bytes": (size("vq"), size("vq")),
    }
    assert capsys.readouterr().err == ""


def test_a_local_folder_wins_over_the_hub_id_and_not_over_the_name(
    mini_checkpoint: Path, hub: Path, release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = cache_star_3b(hub, mini_checkpoint)
    (tmp_path / "MM-MVR").mkdir()
    for name in ("MM-MVR/STAR-3B", "star-3b"):
        (tmp_path / name).symlink_to(mini_checkpoint)
    monkeypatch.chdir(tmp_path)
    assert resolve_checkpoint("MM-MVR/STAR-3B").star_pt == Path("MM-MVR/STAR-3B/STAR-mini.pt")
    assert resolve_checkpoint("./star-3b").star_pt == Path("star-3b/STAR-mini.pt")
    assert resolve_checkpoint("star-3b").star_pt == places["star"]


@pytest.mark.parametrize(
    "repository, name, flag",
    [
        ("MM-MVR/STAR-3B", "STAR-3B.pt", "star"),
        ("MM-MVR/STAR-VQ", "VQ-Model.pt", "vq"),
        ("Qwen/Qwen2.5-VL-3B-Instruct", BASE, "base"),
    ],
)
def test_without_a_network_the_missing_part_is_named(
    repository: str,
    name: str,
    flag: str,
    mini_checkpoint: Path,
    hub: Path,
    release: Release,
    capsys: pytest.CaptureFixture,
) -> None:
    cache_star_3b(hub, mini_checkpoint)
    (hub / ("models--" + repository.replace("/", "--"))).rename(hub / "gone")
    with refused(
        f"{name} is not on this machine", repository, "offline mode", f"holds {name} with --from FOLDER"
    ):
        resolve_checkpoint("star-3b")
    part = getattr(release, flag)
    line = f"downloading about {part.gigabytes:g} GB to the hub's cache: {name} ({part.gigabytes:g} GB)\n"
    assert capsys.readouterr().err == line


def test_a_base_in_the_layout_of_transformers_5_is_complete(tmp_path: Path) -> None:
    """It keeps the image processor in processor_config.json."""
    for name in (*BASE_JSON, "model.safetensors"):
        (tmp_path / name).touch()
    (tmp_path / "preprocessor_config.json").unlink()
    assert absent_from_base(tmp_path) == ["preprocessor_config.json"]
    (tmp_path / "processor_config.json").touch()
    assert absent_from_base(tmp_path) == []


def test_a_base_of_which_the_cache_has_single_files_is_not_complete(
    mini_checkpoint: Path, hub: Path, release: Release
) -> None:
    base = cache_star_3b(hub, mini_checkpoint)["base"]
    shard = sorted(base.glob("*.safetensors"))[-1].name
    for name in (shard, "tokenizer.json"):
        target = (base / name).readlink()
        (base / name).unlink()
        with refused(f"{BASE} is not on this machine", f"lacks {name}"):
            resolve_checkpoint("star-3b")
        (base / name).symlink_to(target)
    assert resolve_checkpoint("star-3b").qwen_folder == base


@pytest.mark.parametrize("name, flag", [("STAR-3B.pt", "--checkpoint"), ("VQ-Model.pt", "--vq")])
def test_a_file_with_another_hash_is_refused_before_anything_is_downloaded(
    name: str, flag: str, hub: Path, release: Release, downloads: Path
) -> None:
    for part in ("STAR-3B.pt", "VQ-Model.pt"):
        if part != name:
            (downloads / part).unlink()
    data = bytearray((downloads / name).read_bytes())
    data[len(data) // 2] ^= 1
    (downloads / name).unlink()
    (downloads / name).write_bytes(data)
    part = release.star if flag == "--checkpoint" else release.vq
    with refused(
        f"{name} is not the file of the release",
        f"expected SHA-256 {part.sha256} (about {part.gigabytes:g} GB)",
        f"({len(data)} bytes)",
        f"delete {downloads / name} ",
        part.repository,
        flag,
    ):
        resolve_checkpoint("star-3b", from_folder=downloads)


def test_a_folder_of_ones_own_needs_no_network_and_wins_over_the_cache(
    mini_checkpoint: Path, hub: Path, release: Release, downloads: Path
) -> None:
    expected = CheckpointFiles(
        release.config_json, downloads / "STAR-3B.pt", downloads / BASE, downloads / "VQ-Model.pt"
    )
    (downloads / "README.md").write_text("of the repository")
    (downloads / "STAR-7B.pt").touch()  # of the other release
    (downloads / "lumina-image2").mkdir()  # as in the release's own checkpoints folder
    assert resolve_checkpoint("star-3b", from_folder=downloads) == expected
    places = cache_star_3b(hub, mini_checkpoint)
    assert resolve_checkpoint("star-3b", from_folder=str(downloads)) == expected
    (downloads / BASE).unlink()
    assert resolve_checkpoint("star-3b", from_folder=downloads).qwen_folder == places["base"]


def test_a_wrong_folder_of_ones_own_is_refused(
    mini_checkpoint: Path, hub: Path, release: Release, downloads: Path, tmp_path: Path
) -> None:
    with refused("no part of a release", "expected any of STAR-3B.pt", "got chat_template.json"):
        resolve_checkpoint("star-3b", from_folder=downloads / BASE)
    with refused("cannot be read", str(tmp_path / "absent")):
        resolve_checkpoint("star-3b", from_folder=tmp_path / "absent")
    with refused("holds no part of this release", "expected any of STAR-3B.pt"):
        resolve_checkpoint("star-3b", from_folder=mini_checkpoint.parent)
    (downloads / BASE).unlink()
    (downloads / BASE).mkdir()
    for name, file in by_name(mini_checkpoint / "Qwen2.5-VL-mini").items():
        if name != "tokenizer_config.json":
            (downloads / BASE / name).symlink_to(file)
    with refused("the base model is not complete", "expected tokenizer_config.json", release.base.repository):
        resolve_checkpoint("star-3b", from_folder=downloads)
    with refused("--from is only for the releases", "star-3b or star-7b", "got nano"):
        resolve_checkpoint("nano", from_folder=downloads)


def test_given_parts_replace_a_releases_and_are_not_hashed(
    mini_checkpoint: Path, hub: Path, release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    monkeypatch.setattr(releases, "check_hash", lambda part, *_: hashed.append(part.name))
    cached(hub, "MM-MVR/STAR-VQ", {"VQ-Model.pt": mini_checkpoint / "VQ-Model.pt"})
    own = tmp_path / "STAR-own.pt"
    own.touch()
    qwen = mini_checkpoint / "Qwen2.5-VL-mini"
    files = resolve_checkpoint("star-3b", checkpoint=own, base=qwen)
    assert (files.star_pt, files.qwen_folder) == (own, qwen) and hashed == ["VQ-Model.pt"]
    assert resolve_checkpoint("star-3b", checkpoint=own, base=qwen, vq=own).vq_pt == own
    assert hashed == ["VQ-Model.pt"]
    with refused("no such file or folder", "absent.pt"):
        resolve_checkpoint("star-3b", checkpoint="absent.pt")


FETCH = """
import dataclasses, json, sys
from pathlib import Path
from reference import releases
from reference.weights import resolve_checkpoint
config, *hashes = json.loads(sys.argv[1])
real = releases.RELEASES["star-3b"]
star, vq = (dataclasses.replace(part, sha256=sha) for part, sha in zip((real.star, real.vq), hashes))
releases.RELEASES["star-3b"] = dataclasses.replace(real, config_json=Path(config), star=star, vq=vq)
told = {}
files = resolve_checkpoint("star-3b", progress=lambda what, done, total: told.update({what: (done, total)}))
print(*(path.read_bytes() == Path(config).with_name(name).read_bytes() for path, name in (
    (files.star_pt, "STAR-mini.pt"), (files.vq_pt, "VQ-Model.pt"))), files.qwen_folder)
print({what: counts for what, counts in told.items() if what.startswith("download")})
"""


def fetch(release: Release, hub: Path, address: str) -> subprocess.CompletedProcess[str]:
    """Find the parts of `star-3b`, in a process whose hub is at `address` and whose cache is `hub`."""
    ours = {"HF_ENDPOINT": address, "HF_HUB_CACHE": str(hub), "HF_HUB_DISABLE_TELEMETRY": "1"}
    argument = json.dumps([str(release.config_json), release.star.sha256, release.vq.sha256])
    return subprocess.run(
        [sys.executable, "-c", FETCH, argument],
        cwd=ROOT,
        env=os.environ | ours | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"},
        capture_output=True,
        text=True,
    )


def test_what_is_missing_is_downloaded_once(mini_checkpoint: Path, release: Release, tmp_path: Path) -> None:
    """By the hub's own library, from a hub on this machine; the cache holds VQ-Model.pt already."""
    hub, base = tmp_path / "hub", by_name(mini_checkpoint / "Qwen2.5-VL-mini")
    cached(hub, "MM-MVR/STAR-VQ", {"VQ-Model.pt": mini_checkpoint / "VQ-Model.pt"})
    page = {"README.md": mini_checkpoint / "STAR-mini.json"}
    repositories = {
        "MM-MVR/STAR-3B": page | {"STAR-3B.pt": mini_checkpoint / "STAR-mini.pt"},
        release.base.repository: page | base,
    }
    with served(repositories) as (address, downloaded):
        first, second = (fetch(release, hub, address) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith(f"True True {hub / 'models--Qwen--Qwen2.5-VL-3B-Instruct'}")
    assert sorted(downloaded) == sorted(
        ["MM-MVR/STAR-3B/STAR-3B.pt", *(f"{release.base.repository}/{name}" for name in base)]
    )
    assert "downloading about 15.5 GB to the hub's cache: STAR-3B.pt (8 GB), Qwen2.5-VL-3B" in first.stderr
    size = sum((mini_checkpoint / "Qwen2.5-VL-mini" / name).stat().st_size for name in base)
    star = (mini_checkpoint / "STAR-mini.pt").stat().st_size
    assert first.stdout.splitlines()[1] == str(
        {
            "download STAR-3B.pt, in bytes": (star, star),
            "download Qwen2.5-VL-3B-Instruct, in bytes": (size, size),
        }
    )
    assert second.stdout.splitlines() == [first.stdout.splitlines()[0], "{}"] and second.stderr == ""


def test_a_damaged_download_is_replaced_as_the_error_says(
    mini_checkpoint: Path, release: Release, tmp_path: Path
) -> None:
    hub, damaged = tmp_path / "hub", tmp_path / "damaged.pt"
    damaged.write_bytes((mini_checkpoint / "STAR-mini.pt").read_bytes()[:-1])
    cached(hub, "MM-MVR/STAR-VQ", {"VQ-Model.pt": mini_checkpoint / "VQ-Model.pt"})
    cached(hub, release.base.repository, by_name(mini_checkpoint / "Qwen2.5-VL-mini"))
    with served({"MM-MVR/STAR-3B": {"STAR-3B.pt": damaged}}) as (address, _):
        refusal = fetch(release, hub, address)
    assert refusal.returncode and "STAR-3B.pt is not the file of the release" in refusal.stderr
    (named,) = re.findall(r"  fix: delete (.+) and run the command again", refusal.stderr)
    Path(named).unlink()
    with served({"MM-MVR/STAR-3B": {"STAR-3B.pt": mini_checkpoint / "STAR-mini.pt"}}) as (address, _):
        assert fetch(release, hub, address).stdout.startswith("True True ")
