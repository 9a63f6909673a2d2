"""What the entries of a manifest must say of each other. Nothing is read here but the manifest."""

from __future__ import annotations

import math
from collections.abc import Container

from ..errors import InputError
from .manifest import PART, Manifest, component_of
from .tensors import ITEM_BYTES, PAST

TABLE_DTYPES = ("float32", "float16", "bfloat16")
CODES_DTYPE = "int8"  # of a quantised table, whose rows have scales


def check_components(manifest: Manifest, *, where: str) -> None:
    """Raise InputError unless `files` lists every file that a component names and holds every table, and the
    parts of each component are all there, in order."""
    named = [
        (f"components: {name}: {field}", getattr(spec, field))
        for name, spec in manifest.components.items()
        for field in ("graph", "twin", "golden", "classic")
    ] + [
        (f"tables: {name}: {field}", getattr(spec, field))
        for name, spec in manifest.tables.items()
        for field in ("file", "golden")
    ]
    for key, relative in named:
        if relative is not None and relative not in manifest.files:
            raise InputError(
                "A component names a file that the manifest does not list",
                where=f"{where}: {key}: expected a key of files, got {relative!r}",
                fix="export the bundle again",
            )
    for component in dict.fromkeys(map(component_of, manifest.components)):
        parts = [name for name in manifest.components if component_of(name) == component]
        ordered = [f"{component}{PART}{i}" for i in range(len(parts))]
        if parts not in ([component], ordered):
            raise InputError(
                "A component's parts are not all there, in order",
                where=f"{where}: components: expected {component}, or {component}{PART}0 and so on, "
                f"got {', '.join(parts)}",
                fix="export the bundle again",
            )
    for decoder, cache in manifest.model.cache.items():
        caches = [
            t.name
            for name, spec in manifest.components.items()
            if component_of(name) == decoder
            for t in spec.inputs
            if t.name.startswith(PAST)
        ]
        expected = [f"{PAST}{i}.{side}" for i in range(cache.layers) for side in ("key", "value")]
        if caches and caches != expected:
            at = next((i for i, (a, b) in enumerate(zip(caches, expected)) if a != b), len(caches))
            raise InputError(
                "A decoder's layers are not all there, in order",
                where=f"{where}: components: {decoder}: expected {len(expected)} caches of "
                f"{cache.layers} layers, got {len(caches)}, other than expected from number {at} on",
                fix="export the bundle again",
            )
    for name, table in manifest.tables.items():
        size = manifest.files[table.file].size
        rows = table.dtype, math.prod(table.shape), table.offset
        scales = table.scales_dtype, table.shape[0], table.scales_offset
        quantised = table.dtype == CODES_DTYPE
        held = _within(size, TABLE_DTYPES, *rows) and (scales[0], scales[2]) == (None, None)
        if quantised:
            held = _within(size, (CODES_DTYPE,), *rows) and _within(size, TABLE_DTYPES, *scales)
        if not held:
            raise InputError(
                "A table does not lie within its file",
                where=f"{where}: tables: {name}: expected rows of {', '.join(TABLE_DTYPES)} within "
                f"{size} bytes, or of {CODES_DTYPE} with their scales, got {table.dtype}{list(table.shape)} "
                f"from byte {table.offset}"
                + (f", scales {table.scales_dtype} from byte {table.scales_offset}" if quantised else ""),
                fix="export the bundle again",
            )


def _within(
    size: int, dtypes: Container[str | None], dtype: str | None, numbers: int, offset: int | None
) -> bool:
    """Whether so many numbers of one of `dtypes`, from `offset` on, end within a file of `size` bytes."""
    if dtype is None or dtype not in dtypes or offset is None:
        return False
    return 0 <= offset < offset + numbers * ITEM_BYTES[dtype] <= size
