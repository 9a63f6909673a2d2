"""The released models by name: what a release consists of, where each part comes from, and what it must be.

A release has four parts. Its configuration is only in the repository of its code, so this package holds it
(`release_configs/`). STAR-*.pt, VQ-Model.pt and the folder of the base model come from a folder of the
user's, from the hub's cache, or from the hub. The two .pt files are checked by their SHA-256. No hash of the
base model is known, so the loader compares only its names and shapes.

Sources: docs/star.md 1.7 and 2.1; MM-MVR/STAR, star/configs/.
"""

from __future__ import annotations

import hashlib
import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .containers import first_line
from .errors import CheckpointError
from .strict_json import Section, read_object

CONFIGS = Path(__file__).parent / "release_configs"
BASE_FILES = ["*.json", "*.txt", "*.jinja", "*.safetensors"]  # what the export may read of the base model
BASE_JSON = [
    *("config.json", "generation_config.json", "preprocessor_config.json"),
    *("tokenizer.json", "tokenizer_config.json"),
]
BLOCK = 16 << 20


@dataclass(frozen=True)
class Part:
    """A file of a release, or the folder of its base model, which has no `sha256`.

    `name` is its name in the hub's `repository` and in a folder of the user's, `gigabytes` its size as the
    hub shows it, and `flag` the option that replaces it.
    """

    name: str
    repository: str
    gigabytes: float
    flag: str
    sha256: str | None = None


@dataclass(frozen=True)
class Release:
    """The parts of a released model."""

    config_json: Path
    star: Part
    vq: Part
    base: Part

    @property
    def parts(self) -> tuple[Part, Part, Part]:
        return self.star, self.vq, self.base


VQ = Part(
    "VQ-Model.pt",
    "MM-MVR/STAR-VQ",
    2.12,
    "--vq",
    "096fce44a3da98be4c5a7523c78379222cd87b27a4bfdcc6da74d1c00083d769",
)
RELEASES = {
    "star-3b": Release(
        CONFIGS / "STAR_Qwen2.5-VL-3B.json",
        Part(
            "STAR-3B.pt",
            "MM-MVR/STAR-3B",
            8.0,
            "--checkpoint",
            "b4739dc0174b8edbd4d319e0a5db3a055400cfcdfab290de02332631a4793c67",
        ),
        VQ,
        Part("Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct", 7.5, "--base"),
    ),
    "star-7b": Release(
        CONFIGS / "STAR_Qwen2.5-VL-7B.json",
        Part(
            "STAR-7B.pt",
            "MM-MVR/STAR-7B",
            12.3,
            "--checkpoint",
            "6d6e05aaee5e72f0818e71afbb5c8e31f0eb48e64e405d833bccd7b0eb265491",
        ),
        VQ,
        Part("Qwen2.5-VL-7B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct", 16.6, "--base"),
    ),
}


def silent(what: str, done: int, total: int) -> None:
    """A progress callback that does nothing."""


def find_release(source: str | Path) -> Release | None:
    """The release that `source` names: `star-3b`, `star-7b`, or the hub id of its STAR-*.pt.

    A local path wins over the hub id, and the short name over a folder, which is `./star-3b`.
    """
    if release := RELEASES.get(str(source)):
        return release
    by_hub_id = {release.star.repository: release for release in RELEASES.values()}
    return None if Path(source).exists() else by_hub_id.get(str(source))


def find_parts(
    parts: Sequence[Part],
    *,
    from_folder: str | Path | None = None,
    progress: Callable[[str, int, int], None] = silent,
) -> dict[Part, Path]:
    """Part -> its place: in the folder `from_folder`, in the hub's cache, or downloaded to that cache.

    What is here already is checked before anything is downloaded, and a line on stderr says what will be
    downloaded. `progress` is called with the bytes of a part that are downloaded or hashed, and with all.
    Raises CheckpointError if `from_folder` holds a file of another name or an incomplete base model, if a
    part cannot be downloaded, or if a file has another SHA-256.
    """
    found: dict[Part, Path] = in_folder(parts, Path(from_folder)) if from_folder and parts else {}
    for part in parts:
        if part not in found and (path := in_cache(part)):
            found[part] = path
    if missing := [part for part in parts if part not in found]:
        total = sum(part.gigabytes for part in missing)
        names = ", ".join(f"{part.name} ({part.gigabytes:g} GB)" for part in missing)
        print(f"downloading about {total:.3g} GB to the hub's cache: {names}", file=sys.stderr, flush=True)
    for part in sorted(parts, key=lambda part: part in missing):
        if part in missing:
            found[part] = downloaded(part, progress)
        if part.sha256:
            check_hash(part, found[part], progress)
    return found


def in_folder(parts: Sequence[Part], folder: Path) -> dict[Part, Path]:
    """The parts that a folder of the user's holds. Raises CheckpointError if it holds none of them, a file
    that belongs to no release, or a base model with files missing."""
    names = [part.name for part in parts]
    known = {part.name for release in RELEASES.values() for part in release.parts} | {"README.md"}
    known |= {release.config_json.name for release in RELEASES.values()}
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise CheckpointError(
            "the folder given with --from cannot be read",
            where=f"{folder}: {error.strerror}",
            fix="check the path",
        ) from None
    files = [path.name for path in entries if not path.is_dir() and not path.name.startswith(".")]
    if unknown := [name for name in files if name not in known]:
        raise CheckpointError(
            "the folder given with --from holds a file that is no part of a release",
            where=f"{folder}: expected any of {', '.join(names)}; got {', '.join(unknown[:5])}",
            fix="give the files the names of the release, and keep others elsewhere",
        )
    found = {part: folder / part.name for part in parts if (folder / part.name).exists()}
    if not found:
        raise CheckpointError(
            "the folder given with --from holds no part of this release",
            where=f"{folder}: expected any of {', '.join(names)}; got none of them",
            fix="check the path",
        )
    for part, path in found.items():
        if not part.sha256 and (absent := absent_from_base(path)):
            raise CheckpointError(
                "the base model is not complete",
                where=f"{path}: expected {', '.join(absent)}; found none",
                fix=f"download all of {part.repository}",
            )
    return found


def absent_from_base(folder: Path) -> list[str]:
    """The files that the folder of a base model lacks, including the shards that its index names."""
    names, index_json = list(BASE_JSON), folder / "model.safetensors.index.json"
    if index_json.exists():
        weight_map = Section(read_object(index_json), source=index_json).section("weight_map")
        names += sorted({weight_map.text(name) for name in weight_map.values})
    elif not (folder / "model.safetensors").exists():
        names.append(index_json.name)
    if (folder / "processor_config.json").exists():  # transformers 5 keeps the image processor there
        names.remove("preprocessor_config.json")
    return [name for name in names if not (folder / name).exists()]


def in_cache(part: Part) -> Path | None:
    """The part in the hub's cache, or None."""
    try:
        return from_hub(part, local_files_only=True)
    except Exception:  # the hub's errors share no base class with those of its HTTP library
        return None


def downloaded(part: Part, progress: Callable[[str, int, int], None]) -> Path:
    """The part, downloaded to the hub's cache. Raises CheckpointError if that does not work."""
    try:
        return from_hub(part, local_files_only=False, progress=progress)
    except Exception as error:  # as above
        while isinstance(error.__cause__, Exception):  # the hub's own message does not say why
            error = error.__cause__
        raise CheckpointError(
            f"{part.name} is not on this machine and cannot be downloaded",
            where=f"{part.repository}, {part.gigabytes:g} GB: {first_line(error)}",
            fix="check the network and run the command again; or download it elsewhere, and give the folder "
            f"that holds {part.name} with --from FOLDER",
        ) from None


def from_hub(
    part: Part, *, local_files_only: bool, progress: Callable[[str, int, int], None] = silent
) -> Path:
    """The part's path in the hub's cache, where a download that was interrupted is resumed."""
    from huggingface_hub import hf_hub_download, snapshot_download

    bar = reporter(f"download {part.name}, in bytes", progress)
    options: dict[str, Any] = {"local_files_only": local_files_only, "tqdm_class": bar}
    if part.sha256:
        return Path(hf_hub_download(part.repository, part.name, **options))
    folder = Path(snapshot_download(part.repository, allow_patterns=BASE_FILES, **options))
    if absent := absent_from_base(folder):  # the cache may hold single files of a repository
        raise FileNotFoundError(f"the hub's cache lacks {', '.join(absent)} in {folder}")
    return folder


def reporter(what: str, progress: Callable[[str, int, int], None]) -> type:
    """A class that the hub uses in place of tqdm's: it draws nothing, and tells `progress` of the bytes."""
    from tqdm import tqdm

    done = 0

    class Reporter(tqdm):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options | {"file": io.StringIO()})

        def display(self, *_, **__) -> None:
            nonlocal done
            if self.unit == "B" and self.total and self.n >= done:  # the hub counts files and transfers too
                done = self.n
                progress(what, done, self.total)

    return Reporter


def check_hash(part: Part, path: Path, progress: Callable[[str, int, int], None]) -> None:
    """Compare a file with the SHA-256 of its release. Raises CheckpointError."""
    digest, done = hashlib.sha256(), 0
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
                done += len(block)
                progress(f"check the SHA-256 of {part.name}, in bytes", done, size)
    except OSError as error:
        raise CheckpointError(
            f"cannot read {part.name}", where=f"{path}: {error.strerror}", fix="check the file"
        ) from None
    if digest.hexdigest() != part.sha256:
        raise CheckpointError(
            f"{part.name} is not the file of the release",
            where=f"{path}: expected SHA-256 {part.sha256} (about {part.gigabytes:g} GB), "
            f"got {digest.hexdigest()} ({size} bytes)",
            fix=f"delete {path.resolve()} and run the command again, which downloads it from "
            f"{part.repository}; or give a file of your own with {part.flag}",
        )
