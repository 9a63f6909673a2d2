"""Copies of a bundle to spoil, whose manifest is made true again: faults that no hash finds."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from safetensors.numpy import load_file, save_file

from engines.bundle.files import sha256_of
from tests.helpers.sealed import edit_sealed


def copied(bundle: Path, folder: Path) -> Path:
    """A copy of `bundle` in `folder`, without what was made of it."""
    ignored = shutil.ignore_patterns("plans", "certificates")
    return shutil.copytree(bundle, folder / "bundle", ignore=ignored)


def rehash(bundle: Path) -> None:
    """Make the manifest true again: what is planted here are faults that no hash finds."""

    def change(manifest: dict) -> None:
        for name, entry in manifest["files"].items():
            entry |= {"size": (bundle / name).stat().st_size, "sha256": sha256_of(bundle / name)}

    edit_sealed(bundle / "manifest.json", change)


def spoil_weight(bundle: Path, component: str, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change one stored weight of `component` in place, for all of its graphs."""
    for path in sorted((bundle / component).glob("*.onnx")):
        model = onnx.load(path, load_external_data=False)
        [weight] = [w for w in model.graph.initializer if f".{w.name}".endswith(f".{name}")]
        if weight.data_location != TensorProto.EXTERNAL:
            changed = change(numpy_helper.to_array(weight))
            weight.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(changed), weight.name))
            path.write_bytes(model.SerializeToString())
        elif path.name == "model.onnx":  # the others read the same file
            array = numpy_helper.to_array(weight, str(path.parent))
            changed = np.ascontiguousarray(change(array), array.dtype)
            assert changed.nbytes == array.nbytes
            patch(path.parent, weight, lambda data: changed.tobytes())
    rehash(bundle)


def patch(folder: Path, weight: TensorProto, change: Callable[[bytes], bytes]) -> None:
    """Change the stored bytes of an external weight."""
    entries = {entry.key: entry.value for entry in weight.external_data}
    with open(folder / entries["location"], "r+b") as file:
        file.seek(int(entries.get("offset", 0)))
        data = file.read(int(entries["length"]))
        file.seek(-len(data), 1)
        changed = change(data)
        assert len(changed) == len(data) and changed != data
        file.write(changed)


def spoil_graph(bundle: Path, component: str, change: Callable[[onnx.GraphProto], None]) -> None:
    """Change the modern graph of `component`, or its fp32 twin where there is one."""
    folder = bundle / component
    path = folder / ("twin.onnx" if (folder / "twin.onnx").exists() else "model.onnx")
    model = onnx.load(path, load_external_data=False)
    change(model.graph)
    path.write_bytes(model.SerializeToString())
    rehash(bundle)


def spoil_golden(bundle: Path, file: str, change: Callable[[dict], dict]) -> None:
    save_file({k: np.array(v, order="C") for k, v in change(load_file(bundle / file)).items()}, bundle / file)
    rehash(bundle)
