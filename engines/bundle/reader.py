"""A bundle on disk. No file is used before it matches the manifest.

`open` checks the manifest, every path, presence and size, and that there are no unlisted files. The first use
of a file checks its SHA-256; a component's weights are hashed while an executor loads them, and nothing is
computed with them before the hashes were compared. Plans and certificates are created later, on the device;
their readers check them, or `add` the files that a record names.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

from ..errors import InputError, UsageError, listed
from ..progress import Progress, Tick, adder, silent, uncounted
from .files import (
    MANIFEST,
    MANIFEST_LIMIT_BYTES,
    check_regular,
    check_relative,
    read_regular,
    resolve_inside,
    sha256_of,
)
from .manifest import ComponentSpec, FileSpec, Manifest, TableSpec, component_of, manifest_from_json
from .tensors import ITEM_BYTES, PAST
from .typed_paths import shown, typed_path

MADE_LATER = ("plans", "certificates")
TABLE_DTYPES = ("float32", "float16", "bfloat16")
CODES_DTYPE = "int8"  # of a quantised table, whose rows have scales
_RESTORE = "copy the bundle again, or export it again"


class Bundle:
    """A bundle with a checked manifest and file list.

    `manifest` describes its contents; `path` is its folder.
    """

    def __init__(self, path: Path, manifest: Manifest):
        self.path, self.manifest = path, manifest
        self._added: dict[str, FileSpec] = {}
        self._verified: dict[str, tuple] = {}
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)  # one per file

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Read and check `path/manifest.json` and the presence and size of every file. Raises InputError."""
        path = typed_path(path)
        if not path.is_dir():
            got = "a file" if path.exists() else "nothing"
            raise InputError(
                "This is not a bundle",
                where=f"{shown(path)}: expected a folder with {MANIFEST}, got {got}",
                fix="create one: star-export export SOURCE --out BUNDLE",
            )
        file = path / MANIFEST
        data = read_regular(file, limit_bytes=MANIFEST_LIMIT_BYTES, where="bundle")
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise InputError(
                "The manifest is not a text file",
                where=f"{file}: expected UTF-8, got {error.reason} at byte {error.start}",
                fix=_RESTORE,
            ) from None
        manifest = manifest_from_json(text, where=str(file))
        check_components(manifest, where=str(file))
        bundle = cls(path, manifest)
        bundle.check_files()
        return bundle

    def check_files(self) -> None:
        """Check paths, presence and sizes, and that no file is unlisted.

        Reads no contents. Raises InputError.
        """
        files, where = self.manifest.files, f"{self.path / MANIFEST}: files"
        for relative in files:
            check_relative(relative, where=where)
            if relative == MANIFEST or PurePosixPath(relative).parts[0] in MADE_LATER:
                raise InputError(
                    "This path must not be listed in the manifest",
                    where=f"{where}: expected a file of the export, got {relative!r}",
                    fix="export the bundle again",
                )
            if os.path.lexists(self.path / relative):
                resolve_inside(self.path, relative, where=where)
        present = set(files_present(self.path))
        absent, unlisted = sorted(set(files) - present), sorted(present - set(files))
        if absent or unlisted:
            raise InputError(
                "The bundle's files differ from the manifest",
                where=f"{self.path}: absent: {_names(absent)}; not listed: {_names(unlisted)}",
                fix=_RESTORE,
            )
        for relative, spec in files.items():
            size = os.lstat(self.path / relative).st_size
            if size != spec.size:
                raise InputError(
                    "This file has the wrong size",
                    where=f"{relative}: expected {spec.size} bytes, got {size}",
                    fix=_RESTORE,
                )

    def file(self, relative: str, tick: Tick = uncounted) -> Path:
        """Return the path of a listed file after checking its SHA-256.

        The file is hashed on first use, and again when it has changed since, ticking in bytes. Raises
        InputError with both hash prefixes when they differ, and when the manifest does not list the file.
        """
        spec = self.manifest.files.get(relative) or self._added.get(relative)
        if spec is None:
            raise InputError(
                "The bundle has no such file",
                where=f"{self.path}: expected one of its listed files, got {relative!r}",
                fix=f"use one of {_names(sorted(self.manifest.files))}",
            )
        path = resolve_inside(self.path, relative, where="bundle")
        with self._locks[relative]:
            stamp = _stamp(path)
            if self._verified.get(relative) == stamp:
                tick(spec.size)
                return path
            got = sha256_of(path, where="bundle", tick=tick)
            if got != spec.sha256 or _stamp(path) != stamp:
                added = relative in self._added
                raise InputError(
                    f"This file has changed since {'it was made' if added else 'the export'}",
                    where=f"{path}: expected sha256 {spec.sha256[:16]}..., got {got[:16]}...",
                    fix=f"remove the folder {path.parent}" if added else _RESTORE,
                )
            self._verified[relative] = stamp
        return path

    def add(self, files: Mapping[str, FileSpec]) -> None:
        """Let `file` give out files made after the export, each checked by the spec in its record."""
        self._added |= files

    def parts(self, component: str) -> list[str]:
        """The names of the graphs that make up `component`, in order: its own, or those of its parts.

        Raises UsageError with the valid names.
        """
        names = [name for name in self.manifest.components if component_of(name) == component]
        return names or [self._known(component)]

    def table(self, name: str) -> tuple[TableSpec, Path]:
        """The spec of the table `name` and its file, after checking the file's SHA-256. Raises InputError."""
        spec = self.manifest.tables[name]
        return spec, self.file(spec.file)

    def hash_ahead(self, files: Iterable[str]) -> threading.Thread:
        """Begin to hash listed files in a thread of their own; `file` waits for the one that it needs.

        A file that differs is found again, and refused, by `file`.
        """

        def work() -> None:
            for relative in files:
                with contextlib.suppress(InputError):
                    self.file(relative)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        return thread

    @contextlib.contextmanager
    def loading(self, name: str, *, twin: bool = False, dialect: str = "modern") -> Iterator[Path]:
        """Yield the path of the component's ONNX file, as `loading_files` does."""
        with self.loading_files(
            self.graph_name(name, twin=twin, dialect=dialect), self.weights(name)
        ) as path:
            yield path

    @contextlib.contextmanager
    def loading_files(self, graph: str, weights: Sequence[str]) -> Iterator[Path]:
        """Yield the path of an ONNX file, verified, while its weights are being hashed.

        When the block ends, all files are the expected ones and those that were there when it began;
        otherwise InputError is raised, also in place of an error that the block raised.
        """
        before = {relative: _stamp(self.path / relative) for relative in weights}
        self.hash_ahead(weights)
        before[graph] = _stamp(self.file(graph))
        try:
            yield self.path / graph
        finally:
            for relative, stamp in before.items():
                if _stamp(self.file(relative)) != stamp:
                    raise InputError(
                        "This file was replaced while it was loaded",
                        where=f"{self.path / relative}: expected one file throughout, got another one",
                        fix="do not write to a bundle in use; run the command again",
                    )

    def component(self, name: str) -> ComponentSpec:
        """The spec of the graph `name`, a component or a part. Raises UsageError with the valid names."""
        return self.manifest.components[self._known(name)]

    def _known(self, name: str) -> str:
        if name not in self.manifest.components:
            raise UsageError(
                "The bundle has no such component",
                where=f"{self.path}: expected one of {', '.join(self.manifest.components)}, got {name!r}",
                fix="use one of these names",
            )
        return name

    def graph(self, name: str, *, twin: bool = False, dialect: str = "modern") -> Path:
        """Verify the component's ONNX file and weights, and return the file's path.

        `twin` selects the fp32 twin where there is one.
        """
        for weights in self.weights(name):
            self.file(weights)
        return self.file(self.graph_name(name, twin=twin, dialect=dialect))

    def graph_name(self, name: str, *, twin: bool = False, dialect: str = "modern") -> str:
        """Manifest name of the component's ONNX file in `dialect`, or of its fp32 twin where there is one.

        Raises InputError if there is no graph in that dialect.
        """
        spec = self.component(name)
        if twin and spec.twin:
            return spec.twin
        relative = spec.classic if dialect == "classic" else spec.graph
        if relative is None:
            raise InputError(
                "This bundle has no classic graphs",
                fix="export the bundle again with this version of star-export",
                where=f"{self.path}: {name}: expected a graph for TensorRT before 10.15, got none",
            )
        return relative

    def weights(self, name: str) -> list[str]:
        """Manifest names of the component's external weight files."""
        folder = PurePosixPath(self.component(name).graph).parent
        return sorted(
            f for f in self.manifest.files if PurePosixPath(f).parent == folder and f.endswith(".data")
        )

    def verify(self, progress: Progress = silent) -> None:
        """Check the SHA-256 of every file. Raises InputError at the first one that differs."""
        tick = adder(progress, "hash every file, in bytes", sum(f.size for f in self.manifest.files.values()))
        for relative in self.manifest.files:
            self.file(relative, tick)


def check_components(manifest: Manifest, *, where: str) -> None:
    """Raise InputError unless `files` lists every file that a component names and holds every table, and the
    parts of a decoder are all there, in order."""
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


def files_present(root: Path) -> list[str]:
    """Relative names of all files and links under `root`, except the manifest, plans and certificates."""
    names = []
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        if here == root:
            folders[:] = [f for f in folders if f not in MADE_LATER]
            files = [f for f in files if f != MANIFEST]
        links = [f for f in folders if (here / f).is_symlink()]
        names += [(here / f).relative_to(root).as_posix() for f in files + links]
    return names


def _stamp(path: Path) -> tuple:
    status = check_regular(path, where="bundle")
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _names(names: list[str]) -> str:
    return listed(names, separator=", ") or "none"
