"""Copies of a bundle to spoil, whose manifest is made true again: faults that no hash finds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file

from engines.bundle.files import sha256_of


def copied(bundle: Path, folder: Path) -> Path:
    """A copy of `bundle` in `folder`, without what was made of it."""
    ignored = shutil.ignore_patterns("plans", "certificates")
    return shutil.copytree(bundle, folder / "bundle", ignore=ignored)


def rehash(bundle: Path) -> None:
    """Make the manifest true again: what is planted here are faults that no hash finds."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    for name, entry in manifest["files"].items():
        entry |= {"size": (bundle / name).stat().st_size, "sha256": sha256_of(bundle / name)}
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def spoil_weight(bundle: Path, component: str, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change one stored weight of `component` in place."""
    path = bundle / component / "model.onnx"
    model = onnx.load(path)
    [weight] = [w for w in model.graph.initializer if f".{w.name}".endswith(f".{name}")]
    array = numpy_helper.to_array(weight)
    weight.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(change(array), array.dtype), weight.name))
    (path.parent / "model.onnx.data").unlink()
    onnx.save_model(model, path, save_as_external_data=True, location="model.onnx.data")
    rehash(bundle)


def spoil_golden(bundle: Path, file: str, change: Callable[[dict], dict]) -> None:
    save_file({k: np.array(v, order="C") for k, v in change(load_file(bundle / file)).items()}, bundle / file)
    rehash(bundle)
