"""Graphs without weights, of STAR-Nano and of the decoders at the released sizes: python -m tests.gpu.graphs
FOLDER

They are traced once, by the versions that this project pins, and are small enough to travel:
FOLDER/<size>/<component>.onnx, with every weight declared as external data of a file that is not there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import onnx_ir as ir

from reference.config import StarConfig, config_from_files
from reference.weights import resolve_checkpoint
from star_export.components import COMPONENTS, DIFFUSION, whole
from star_export.graph.repeat import graph_from_config

from .sizes import PARTS, SIZES

NANO, WEIGHTS = "nano", "noise.data"


def graph_of(name: str, config: StarConfig) -> ir.Model:
    """The bf16 graph of a component with empty initializers: what an export of this configuration starts
    from."""
    return graph_from_config(whole(name, config), config, rope_bf16=True)


def save_graph(model: ir.Model, path: Path) -> None:
    """Write a graph with empty initializers; `load_graph` gives it back."""
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            value.const_value = ir.ExternalTensor(WEIGHTS, 0, 0, value.dtype, shape=value.shape, name=name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(ir.to_proto(model).SerializeToString())


def read_graph(size: str, name: str, folder: Path | None) -> ir.Model:
    """The graph from `folder` where it lies there, else traced now. Weights are initializers without a
    value."""
    path = folder / size / f"{name}.onnx" if folder else None
    if path is None or not path.exists():
        return graph_of(name, SIZES[size])
    return load_graph(path)


def load_graph(path: Path) -> ir.Model:
    """A graph that `save_graph` wrote: weights are initializers without a value."""
    model = ir.load(path)
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = None
    return model


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.graphs", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sizes", nargs="+", default=[NANO, "3B", "7B"], choices=[NANO, *SIZES])
    options = parser.parse_args(argv)
    for size in options.sizes:
        config = nano_config() if size == NANO else SIZES[size]
        graphs = [name for name, row in COMPONENTS.items() if not row.table and name not in DIFFUSION]
        for name in graphs if size == NANO else PARTS:
            save_graph(graph_of(name, config), options.folder / size / f"{name}.onnx")


def nano_config() -> StarConfig:
    """The configuration of STAR-Nano's checkpoint, which lies in this repository."""
    files = resolve_checkpoint(NANO, checkpoint=None, base=None, vq=None)
    return config_from_files(files.config_json, files.qwen_folder)


if __name__ == "__main__":
    main()
