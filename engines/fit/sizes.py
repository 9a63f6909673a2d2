"""How large a model is: the bytes of each component at one precision, and what multiplies them in use.

`sizes_from_bundle` reads a bundle's manifest. `star_export.planner.source` makes the same from the shapes of
a checkpoint, so all further arithmetic is that of this folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath

from ..bundle.manifest import CacheSpec, DiffusionSpec, ModelSpec, component_of
from ..bundle.reader import Bundle
from ..bundle.tensors import ITEM_BYTES

CACHE_BYTES = {"fp32": ITEM_BYTES["float32"]}  # of one number in a cache; in every other precision:
CACHE_BYTES_16BIT = ITEM_BYTES["bfloat16"]


@dataclass(frozen=True)
class Transformer:
    """The sizes of a diffusion transformer that its arithmetic follows from; `token_weights` are those that
    multiply every token."""

    hidden_size: int
    blocks: int
    token_weights: int


@dataclass(frozen=True)
class Geometry:
    """The sizes of a model that caches, buffers and steps follow from; `image_size` is in pixels, and
    `transformer` the diffusion decoder's, if there is one."""

    name: str
    hidden_size: int
    vocab_size: int
    codebook_size: int
    image_tokens: int
    image_size: int
    max_positions: int
    cache: dict[str, CacheSpec]
    transformer: Transformer | None = None


@dataclass(frozen=True)
class Sizes:
    """A model at one precision.

    `graphs` maps each graph of the bundle, a component or a part of one, to the bytes of its weights as
    stored, and `formats` to the same by format. `tables` maps each component that is a table to the bytes
    that only it stores: the host reads rows from the file and holds none. `bundle_bytes` is the size of the
    whole bundle.
    """

    model: Geometry
    precision: str
    graphs: dict[str, int]
    formats: dict[str, dict[str, int]]
    tables: dict[str, int]
    bundle_bytes: int

    @property
    def weights(self) -> dict[str, int]:
        """Component with a graph -> the bytes of its weights as stored, in all of its parts."""
        found: dict[str, int] = {}
        for graph, size in self.graphs.items():
            component = component_of(graph)
            found[component] = found.get(component, 0) + size
        return found

    @property
    def weights_bytes(self) -> int:
        """All weights as stored, those of tables included."""
        return sum(self.graphs.values()) + sum(self.tables.values())

    @property
    def cache_item_bytes(self) -> int:
        """Bytes of one number in a cache."""
        return CACHE_BYTES.get(self.precision, CACHE_BYTES_16BIT)

    def cache_bytes(self, decoder: str, *, rows: int, capacity_tokens: int) -> int:
        """Bytes of all caches of `decoder`; 0 for a component without caches."""
        cache = self.model.cache.get(decoder)
        if cache is None:
            return 0
        numbers = 2 * cache.layers * cache.kv_heads * cache.head_dim * rows * capacity_tokens
        return numbers * self.cache_item_bytes


def geometry_of(model: ModelSpec) -> Geometry:
    """The sizes in the description of a bundle's model."""
    names = ("name", "hidden_size", "vocab_size", "codebook_size", "image_tokens", "image_size")
    return Geometry(
        **{name: getattr(model, name) for name in names},
        max_positions=model.max_positions,
        cache=dict(model.cache),
        transformer=transformer_of(model.diffusion) if model.diffusion else None,
    )


def transformer_of(spec: DiffusionSpec) -> Transformer:
    """The sizes in the description of a bundle's diffusion decoder."""
    return Transformer(spec.hidden_size, spec.blocks, spec.token_weights)


def sizes_from_bundle(bundle: Bundle) -> Sizes:
    """The sizes that a bundle's manifest states."""
    manifest = bundle.manifest
    graphs = {
        name: sum(manifest.files[file].size for file in bundle.weights(name)) for name in manifest.components
    }
    return Sizes(
        model=geometry_of(manifest.model),
        precision=manifest.precision,
        graphs=graphs,
        formats={name: spec.weights for name, spec in manifest.components.items()},
        tables={
            name: 0
            if PurePosixPath(table.file).parent.as_posix() in graphs
            else manifest.files[table.file].size
            for name, table in manifest.tables.items()
        },
        bundle_bytes=sum(file.size for file in manifest.files.values()),
    )
