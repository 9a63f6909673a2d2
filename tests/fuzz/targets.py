"""What is fuzzed: good files of a miniature, how they are mutated, and what reads them."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from engines.bundle.cross_checks import check_components
from engines.bundle.manifest import FileSpec, TensorSpec, manifest_from_json
from engines.bundle.records import json_from_record
from engines.inputs.image_io import image_from_bytes
from engines.targets import target_from_name
from engines.tensorrt.plan import PlanSpec, build_from_file, build_header
from engines.tensorrt.profiles import Profile, Range
from reference.config import config_from_files
from reference.containers import tensors_from_pt, tensors_from_safetensors
from reference.processor import chat_template_from_folder, image_settings_from_folder

from .mutate import mutated_bytes, mutated_json, mutated_record
from .requests import mutated_request, seeds, send_to_a_server

Mutate = Callable[[bytes, np.random.Generator], bytes]


@dataclass(frozen=True)
class Target:
    """`read` reads one of the mutated `seeds`; it may raise this project's errors and nothing else."""

    seeds: tuple[bytes, ...]
    mutate: Mutate
    read: Callable[[bytes], object]


def targets(bundle: Path, checkpoint: Path, scratch: Path) -> dict[str, Target]:
    """The targets by name; files are written to `scratch`."""
    manifest = (bundle / "manifest.json").read_bytes()
    shard = next(checkpoint.glob("*/model-00001-of-*.safetensors")).read_bytes()
    base = next(path.parent for path in checkpoint.glob("*/tokenizer.json"))
    folder = scratch / "base"
    folder.mkdir()
    for path in base.glob("*.json"):
        if path.name not in ("tokenizer.json", "model.safetensors.index.json"):
            (folder / path.name).write_bytes(path.read_bytes())
    config = config_from_files(star := next(checkpoint.glob("STAR-*.json")), base)
    archive = io.BytesIO()
    torch.save({"a": torch.zeros(3, 4), "b": torch.ones(2, dtype=torch.float16)}, archive)

    def reads(name: str, read: Callable[[Path], object]) -> Callable[[bytes], object]:
        """Write the bytes under `name`, and read that."""

        def from_bytes(data: bytes) -> object:
            path = folder / name
            old = path.read_bytes() if path.exists() else None
            path.write_bytes(data)
            try:
                return read(path)
            finally:
                if old is not None:
                    path.write_bytes(old)

        return from_bytes

    def read_manifest(data: bytes) -> None:
        try:
            text = data.decode()
        except UnicodeDecodeError:
            return  # the reader says so before it parses
        check_components(manifest_from_json(text, where="manifest"), where="manifest")

    return {
        "manifest": Target((manifest,), mutated_record, read_manifest),
        "plan record": Target((plan_record(),), mutated_record, reads("build.json", build_from_file)),
        "safetensors": Target(
            (shard[:4096],), mutated_bytes, reads("x.safetensors", tensors_from_safetensors)
        ),
        "pt": Target((archive.getvalue(),), mutated_bytes, reads("x.pt", tensors_from_pt)),
        "base configuration": Target(
            ((base / "config.json").read_bytes(),),
            mutated_json,
            reads("config.json", lambda path: config_from_files(star, folder)),
        ),
        "preprocessor": Target(
            ((base / "preprocessor_config.json").read_bytes(),),
            mutated_json,
            reads("preprocessor_config.json", lambda path: image_settings_from_folder(folder, config.vision)),
        ),
        "template": Target(
            ((base / "chat_template.json").read_bytes(),),
            mutated_json,
            reads("chat_template.json", lambda path: chat_template_from_folder(folder)),
        ),
        "picture": Target(pictures(), mutated_bytes, lambda data: image_from_bytes(data, where="picture")),
        "request": Target(seeds(), mutated_request, send_to_a_server()),
    }


def plan_record() -> bytes:
    """A record of one plan."""
    tensor, profile = (
        TensorSpec("x", "float32", ("B", "S", 64)),
        Profile("decode", {"x": Range((1, 1, 64), (1, 1, 64), (4, 1, 64))}),
    )
    spec = PlanSpec({"x": "0" * 64}, (profile,), FileSpec(10, "0" * 64), (tensor,), (tensor,), 0, 1.0)
    header = build_header(target_from_name("rtx-4090"), "1.7.1")
    return json_from_record(dataclasses.replace(header, components={"text_head": spec})).encode()


def pictures() -> tuple[bytes, ...]:
    """A small image in each format that is read, and in some modes."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8))
    made = []
    for kind, mode in (
        ("PNG", "RGB"),
        ("PNG", "P"),
        ("PNG", "RGBA"),
        ("PNG", "I;16"),
        ("JPEG", "L"),
        ("WEBP", "RGB"),
    ):
        file = io.BytesIO()
        (Image.new(mode, (24, 24)) if mode == "I;16" else noise.convert(mode)).save(file, kind)
        made.append(file.getvalue())
    return tuple(made)
