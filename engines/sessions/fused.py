"""The graphs that ONNX Runtime made of int8 and int4 decoders, kept in the bundle for the next start.

When it loads such a decoder, ONNX Runtime replaces every `DequantizeLinear` and the product after it by one
`MatMulNBits` (com.microsoft), whose weights lie in another order. That takes most of the time to load. So the
first session leaves the result in `plans/onnxruntime/<graph>/`, and later ones begin with it:

    model.onnx  model.onnx.data   what ONNX Runtime wrote
    build.json                    what it was made from and by, and the SHA-256 of both files

It is used only if all of the record holds, and hashed while it is loaded, as every other file is. It is never
needed: where it cannot be written, the next start is as slow as the first.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from ..bundle.files import read_regular, resolve_inside, sha256_of, sync_folder, write_atomic
from ..bundle.lock import locked
from ..bundle.manifest import FileSpec, component_of
from ..bundle.reader import Bundle
from ..bundle.records import json_from_record, record_from_json, value_from_json
from ..errors import InputError
from ..fit.machine import free_disk
from ..fit.memory import CONVOLUTIONS

SCHEMA = 2  # 1 had no hash of its own
FOLDER = "plans/onnxruntime"
RECORD, GRAPH, WEIGHTS = "build.json", "model.onnx", "model.onnx.data"
RECORD_LIMIT_BYTES = 1 << 20
WORTH_BYTES = 64 << 20  # a smaller component loads at once
FUSED = ("int8", "int4")  # formats whose DequantizeLinear is fused with the product after it
S = TypeVar("S")


@dataclass(frozen=True)
class Fused:
    """The contents of `build.json`.

    `made_from` maps the bundle's files to their SHA-256; `options` are those of the session, whose graph
    depends on them.
    """

    schema: int
    onnxruntime: str
    options: dict[str, str]
    made_from: dict[str, str]
    files: dict[str, FileSpec]


def load(
    bundle: Bundle, graph: str, make: Callable[..., S], *, onnxruntime: str, options: dict[str, str]
) -> S:
    """Make a session of `graph` from the kept files if there are any, and else from the bundle's, and keep
    what ONNX Runtime made of those.

    `make(path, fused=False, save_to=None)` makes the session: of a graph that is `fused`, or saving it in the
    file `save_to`. Raises InputError for kept files that were changed, and what `make` raises.
    """
    names = (bundle.graph_name(graph, twin=True), *bundle.weights(graph))
    made_from = {name: bundle.manifest.files[name].sha256 for name in names}
    wanted = Fused(SCHEMA, onnxruntime, options, made_from, {})
    folder = f"{FOLDER}/{graph}"
    if kept := read_record(bundle, f"{folder}/{RECORD}", wanted):
        bundle.add({f"{folder}/{name}": spec for name, spec in kept.files.items()})
        with bundle.loading_files(f"{folder}/{GRAPH}", [f"{folder}/{WEIGHTS}"]) as path:
            return make(path, fused=True)
    with stage_beside(bundle, graph, bundle.path / folder) as stage:
        with bundle.loading(graph, twin=True) as path:
            try:
                session = make(path, save_to=stage and stage / GRAPH)
            except InputError:  # the disk may be full, or the graph invalid
                if stage is None:
                    raise
                shutil.rmtree(stage, ignore_errors=True)
                session = make(path)
        if stage and stage.is_dir():
            keep(stage, bundle.path / folder, wanted)
    return session


def worth_keeping(bundle: Bundle, graph: str) -> bool:
    """Whether fusing takes long: the graph has large products with int8 or int4 weights."""
    weights = bundle.component(graph).weights
    quantised = sum(size for name, size in weights.items() if name in FUSED)
    return quantised >= WORTH_BYTES and component_of(graph) not in CONVOLUTIONS


def read_record(bundle: Bundle, relative: str, wanted: Fused) -> Fused | None:
    """The record `relative` to the bundle, if it says what is `wanted`; None without a record or for another.

    Raises InputError for a record that is damaged.
    """
    if not os.path.lexists(bundle.path / relative):
        return None
    path = resolve_inside(bundle.path, relative, where="plans")
    text = read_regular(path, limit_bytes=RECORD_LIMIT_BYTES, where="plans").decode(errors="replace")
    try:
        value = value_from_json(text, where=str(path))
        if not isinstance(value, dict) or value.get("schema") != SCHEMA:
            return None
        found = record_from_json(Fused, text, schema=SCHEMA, other="", fix="", where=str(path))
    except InputError as error:  # nobody has another copy of it to restore
        fix = f"remove the folder {path.parent}"
        raise InputError(error.what, where=error.where, fix=fix) from None
    same = replace(found, files={}) == wanted and set(found.files) == {GRAPH, WEIGHTS}
    return found if same else None


@contextlib.contextmanager
def stage_beside(bundle: Bundle, graph: str, folder: Path) -> Iterator[Path | None]:
    """Yield an empty folder to write into, or None if there is no room for it or another process is writing.

    It is gone when the block ends. One that a killed process left goes first.
    """
    stage = folder.with_name(f".{folder.name}.stage")
    size = sum(bundle.manifest.files[name].size for name in bundle.weights(graph))
    free = free_disk(bundle.path)
    with contextlib.ExitStack() as stack:
        try:
            if free is not None and free < 2 * size:
                raise OSError("the disk is too full")
            stage.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder.with_name(f".{folder.name}.lock"), what="process"))
            stack.callback(shutil.rmtree, stage, ignore_errors=True)
            shutil.rmtree(stage, ignore_errors=True)  # of a process that was killed
            stage.mkdir()
        except (OSError, InputError):
            yield None
            return
        yield stage


def keep(stage: Path, folder: Path, made: Fused) -> None:
    """Record the files in `stage`, and give it its final name. A folder that cannot be written is none."""
    with contextlib.suppress(OSError, InputError):
        files = {
            name: FileSpec(size=(stage / name).stat().st_size, sha256=sha256_of(stage / name))
            for name in (GRAPH, WEIGHTS)
        }
        write_atomic(stage / RECORD, json_from_record(replace(made, files=files)).encode())
        shutil.rmtree(folder, ignore_errors=True)  # of another version
        stage.rename(folder)
        sync_folder(folder.parent)
