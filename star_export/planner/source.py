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
from engines.fit.sizes import Geometry, Sizes, Transformer
from reference.config import StarConfig, config_from_files
from reference.diffusion.config import DiTConfig
from reference.errors import CheckpointError
from reference.releases import CONFIGS, RELEASES, find_release
from reference.weights import SHIPPED, named_tensors, resolve_checkpoint

from ..components import COMPONENTS, PART_BYTES, Part, boundary, components_of, parts_of, whole
from ..golden.feeds import CASES, LARGE, SPECS
from ..graph import wrappers
from ..graph.precisions import Precision, precision_named
from ..graph.quantize import INLINE_BYTES
from ..graph.repeat import layer_of

# Estimates of what is not weights: a graph for each stored tensor, the entry of a golden tensor in its file's
# header, what the host prepares but for the square of an edit, and Qwen2.5's tokenizer where a release is not
# downloaded.
GRAPH_BYTES_PER_TENSOR, GOLDEN_ENTRY_BYTES, PREPARED_BYTES = 1000, 95, 1_050_000
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
    config = files.config()
    named_tensors(files, config, headers_only=True)
    copied = [files.qwen_folder / "tokenizer.json"]
    if files.lumina_folder:
        copied.append(files.lumina_folder / "tokenizer" / "tokenizer.json")
    return Source(config, sum(path.stat().st_size for path in copied))


def sizes_from_source(
    source: Source,
    precision: str,
    names: Sequence[str] | None = None,
    *,
    part_bytes: int = PART_BYTES,
) -> Sizes:
    """The sizes of the bundle that an export in `precision` would write; `names` limits the components.

    `mixed` is the smallest such bundle, with the fewest bits per weight.
    """
    config, chosen = source.config, precision_named(precision)
    names = components_of(config) if names is None else names
    model = geometry_of(config)
    overhead = source.copied_bytes + PREPARED_BYTES + 3 * 4 * model.image_size**2  # in float32
    shared: set[str] = set()
    graphs, formats = {}, {}
    tables = {name: weight for name in names if (weight := COMPONENTS[name].table)}
    for part in [part for name in names for part in _parts(name, config, precision, part_bytes)]:
        overhead += golden_bytes(part, config)
        if part.component in tables:
            continue
        shapes = shapes_of(part, config)
        stored = stored_tensors(shapes, chosen)
        formats[part.name] = bytes_by_format(shapes, chosen)
        graphs[part.name] = sum(size for size in stored if size > INLINE_BYTES)
        overhead += len(stored) * GRAPH_BYTES_PER_TENSOR * (2 if precision == "fp32" else 3)  # with the twin
        shared |= set(shapes)
    rows = {name: shapes_of(whole(name, config), config)[weight] for name, weight in tables.items()}
    own = {
        name: 0 if weight in shared else sum(chosen.stored(weight, rows[name])[1])
        for name, weight in tables.items()
    }
    return Sizes(
        model=model,
        precision=precision,
        graphs=graphs,
        formats=formats,
        tables=own,
        bundle_bytes=sum(graphs.values()) + sum(own.values()) + overhead,
    )


@functools.lru_cache(maxsize=256)
def shapes_of(part: Part, config: StarConfig) -> Shapes:
    """Name -> shape of every parameter that one graph or table holds."""
    star = _meta_star(config)
    names = {id(parameter): key for key, parameter in star.named_parameters()}
    module = wrappers.wrapper_of(part, star)
    shapes = {names[id(parameter)]: tuple(parameter.shape) for parameter in module.parameters()}
    if part.layers is None:
        return shapes
    return {name: shape for name, shape in shapes.items() if _holds(part, name, config)}


def _holds(part: Part, name: str, config: StarConfig) -> bool:
    """Whether the part of a stack holds the parameter `name` of its component."""
    stack, layers = COMPONENTS[part.component].stack, part.layers
    assert stack and layers
    if (layer := layer_of(name)) is not None:
        return layer in layers
    if stack.after and name.startswith(f"{part.component}.{stack.after}."):
        return layers.stop == stack.layers(config)
    return layers.start == 0


def stored_tensors(shapes: Shapes, precision: Precision) -> list[int]:
    """Sizes of the tensors that parameters of these shapes are stored as: themselves, or codes and scales."""
    return [size for name, shape in shapes.items() for size in precision.stored(name, shape)[1]]


def bytes_by_format(shapes: Shapes, precision: Precision) -> dict[str, int]:
    """Format -> the bytes of the parameters of these shapes that are stored in it."""
    found: dict[str, int] = {}
    for name, shape in shapes.items():
        stored, sizes = precision.stored(name, shape)
        found[stored] = found.get(stored, 0) + sum(sizes)
    return found


def scratch_bytes(config: StarConfig) -> int:
    """What an export writes beside the bundle and removes: the table of image embeddings in float32."""
    return config.vq.codebook_size * config.base_ar.hidden_size * ITEM_BYTES["float32"]


def largest_tensor_bytes(config: StarConfig, names: Sequence[str] | None = None) -> int:
    """Size of the largest parameter in float32: what an export converts at a time."""
    parts = [whole(name, config) for name in (components_of(config) if names is None else names)]
    shapes = [shape for part in parts for shape in shapes_of(part, config).values()]
    return max(map(math.prod, shapes), default=0) * ITEM_BYTES["float32"]


@functools.lru_cache(maxsize=256)
def golden_bytes(part: Part, config: StarConfig) -> int:
    """Size of the golden file of one graph or table, which hardly depends on the precision."""
    inputs, outputs = boundary(part, config, "float32")
    numbers = sum(parameter.numel() for parameter in _meta_star(config).parameters())
    total, spec = 0, SPECS[numbers > LARGE]
    for feeds in CASES[part.component](config, np.random.default_rng(0), spec, part).values():
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
        transformer=transformer_of(config.diffusion.dit) if config.diffusion else None,
    )


def transformer_of(dit: DiTConfig) -> Transformer:
    """The sizes of a diffusion transformer that its arithmetic follows from."""
    return Transformer(dit.hidden_size, dit.blocks, dit.token_weights)


def _parts(name: str, config: StarConfig, precision: str, part_bytes: int) -> list[Part]:
    """The graphs that the export divides a component into."""
    stored = sum(stored_tensors(shapes_of(whole(name, config), config), precision_named(precision)))
    return parts_of(name, config, weight_bytes=stored, part_bytes=part_bytes)


@functools.lru_cache(maxsize=2)
def _meta_star(config: StarConfig) -> wrappers.FoldedStar:
    with torch.device("meta"):
        return wrappers.FoldedStar(config)
