"""What decides the bytes of a bundle: the checkpoint, this project's sources, and some packages."""

from __future__ import annotations

import hashlib
from pathlib import Path

from engines.bundle.files import sha256_from_file
from engines.progress import Progress, adder, silent
from reference.weights import CheckpointFiles

SUFFIXES = (".json", ".jinja", ".safetensors")
VERSIONS = ("torch", "onnx", "onnx-ir", "onnxscript")


def code_hash() -> str:
    """The SHA-256 of this project's sources: steps of another state of the code are not gone on with."""
    digest, root = hashlib.sha256(), Path(__file__).parents[2]
    for package in ("reference", "engines", "star_export"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def checkpoint_hashes(files: CheckpointFiles, progress: Progress = silent) -> dict[str, str]:
    """File name -> SHA-256 of every file of the checkpoint that an export reads; links are followed."""
    paths = [
        files.config_json,
        files.star_pt,
        files.vq_pt,
        *sorted(path for path in files.qwen_folder.iterdir() if path.suffix in SUFFIXES),
    ]
    if files.lumina_folder:
        paths += sorted(path for path in files.lumina_folder.glob("*/*") if path.suffix in SUFFIXES)
    tick = adder(progress, "hash the checkpoint, in bytes", sum(path.stat().st_size for path in paths))
    found = {}
    for path in paths:
        name = path.name
        if files.lumina_folder and path.is_relative_to(files.lumina_folder):
            name = path.relative_to(files.lumina_folder).as_posix()
        with open(path, "rb") as file:
            found[name] = sha256_from_file(file, tick=tick)
    return found
