"""The sizes of a checkpoint's bundle, before it is exported: from shapes, without reading a weight.

The weights are what the export will write, to the byte, and so are the golden tensors but for the headers of
their files. The graphs are estimated from the number of their tensors.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from engines.bundle.manifest import CacheSpec
from engines.bundle.tensors import ITEM_BYTES, disagreements, shape_from_symbols
from engines.fit.sizes import Geometry, Sizes
from reference.config import StarConfig, config_from_files
from reference.errors import CheckpointError
from reference.releases import CONFIGS, RELEASES, find_release
from reference.weights import SHIPPED, named_tensors, resolve_checkpoint

from ..components import COMPONENTS
from ..golden.record import CASES
from ..graph import wrappers
from ..graph.quantize import PRECISIONS, Precision, block_size

INLINE_BYTES = 1024  # smaller tensors are shapes and scalars, and stay in model.onnx
# Estimates of what is not weights: a graph for each stored tensor, the entry of a golden tensor in its file's
# header, and Qwen2.5's tokenizer where a release is not downloaded.
GRAPH_BYTES_PER_TENSOR, GOLDEN_ENTRY_BYTES = 1000, 95
TOKENIZER_BYTES = 7_000_000

Shapes = dict[str, tuple[int, ...]]  # parameter -> shape, as in the checkpoint


@dataclass(frozen=True)
class Source:
    """The configuration of a checkpoint, and the size of the files that its bundle takes over unchanged."""

    config: StarConfig
    copied_bytes: int


def find_source(source: str) -> Source:
    """A release, `nano`, or a checkpoint on this machine, whose headers are compared with its configuration.

    Downloads nothing, and reads no weights. Raises CheckpointError for a source that is not here, and as
    `named_tensors` does.
    """
    if release := find_release(source):
        folder = CONFIGS / release.base.name  # what of the base model's files the configuration reads
        return Source(config_from_files(release.config_json, folder), TOKENIZER_BYTES)
    if source not in SHIPPED and not Path(source).exists():
        raise CheckpointError(
            "there is no such source on this machine, and a plan downloads nothing",
            where=f"{source}: expected a bundle, a folder or JSON of a checkpoint, or one of "
            f"{', '.join([*SHIPPED, *RELEASES])}",
            fix="check the spelling, or download the checkpoint and give its folder",
        )
    files = resolve_checkpoint(source)
    config = config_from_files(files.config_json, files.qwen_folder)
    named_tensors(files, config)
    return Source(config, (files.qwen_folder / "tokenizer.json").stat().st_size)


def sizes_from_source(source: Source, precision: str, names: Sequence[str] = tuple(COMPONENTS)) -> Sizes:
    """The sizes of the bundle that an export in `precision` would write; `names` limits the components."""
    config, weights, graphs, golden = source.config, {}, 0, 0
    for name in names:
        stored = stored_tensors(name, config, PRECISIONS[precision])
        weights[name] = sum(size for size in stored if size > INLINE_BYTES)
        graphs += len(stored) * GRAPH_BYTES_PER_TENSOR * (2 if precision == "fp32" else 3)  # with the twin
        golden += golden_bytes(name, config)
    return Sizes(
        model=geometry_of(config),
        precision=precision,
        graphs=weights,
        bundle_bytes=sum(weights.values()) + graphs + golden + source.copied_bytes,
    )


@functools.lru_cache(maxsize=2 * len(COMPONENTS))
def shapes_of(name: str, config: StarConfig) -> Shapes:
    """Name -> shape of every parameter that the graph of component `name` holds."""
    star = _meta_star(config)
    names = {id(parameter): key for key, parameter in star.named_parameters()}
    module = getattr(wrappers, COMPONENTS[name].wrapper)(star)
    return {names[id(parameter)]: tuple(parameter.shape) for parameter in module.parameters()}


def stored_tensors(name: str, config: StarConfig, precision: Precision) -> list[int]:
    """Sizes of the tensors that component `name` stores: parameters, or their codes and scales."""
    sizes = []
    for parameter, shape in shapes_of(name, config).items():
        numbers, item = math.prod(shape), ITEM_BYTES[precision.dtype_name]
        block = block_size(parameter, shape, precision)
        if block is None or precision.bits is None:
            sizes.append(numbers * item)
        else:
            sizes += [numbers * precision.bits // 8, numbers // block * item]
    return sizes


def largest_tensor_bytes(config: StarConfig, names: Sequence[str] = tuple(COMPONENTS)) -> int:
    """Size of the largest parameter in float32: what an export converts at a time."""
    shapes = [shape for name in names for shape in shapes_of(name, config).values()]
    return max(map(math.prod, shapes), default=0) * ITEM_BYTES["float32"]


def golden_bytes(name: str, config: StarConfig) -> int:
    """Size of the golden file of component `name`, which hardly depends on the precision."""
    inputs, outputs = COMPONENTS[name].boundary(config, "float32")
    total = 0
    for feeds in CASES[name](config, np.random.default_rng(0)).values():
        symbols: dict[str, tuple[int, str]] = {}
        for tensor in inputs:
            disagreements(tensor, feeds[tensor.name], symbols)
        sizes = {symbol: size for symbol, (size, _) in symbols.items()}
        for tensor in (*inputs, *outputs):
            total += math.prod(shape_from_symbols(tensor.shape, sizes)) * ITEM_BYTES[tensor.dtype]
            total += GOLDEN_ENTRY_BYTES
    return total


def geometry_of(config: StarConfig) -> Geometry:
    """The sizes in a checkpoint's configuration."""
    decoders = {"base_ar": config.base_ar, "stacked_ar": config.stacked_ar}
    return Geometry(
        name=config.name,
        hidden_size=config.base_ar.hidden_size,
        vocab_size=config.vocab_size,
        codebook_size=config.vq.codebook_size,
        image_tokens=config.vq.image_tokens,
        image_size=config.vq.image_size,
        max_positions=config.base_ar.max_positions,
        cache={
            name: CacheSpec(decoder.num_layers, decoder.num_kv_heads, decoder.head_dim)
            for name, decoder in decoders.items()
        },
    )


@functools.lru_cache(maxsize=2)
def _meta_star(config: StarConfig) -> wrappers.FoldedStar:
    with torch.device("meta"):
        return wrappers.FoldedStar(config)
