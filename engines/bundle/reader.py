"""A bundle on disk. No file is used before it matches the manifest.

`open` checks the manifest, every path, presence and size, and that there are no unlisted files. The first use
of a file checks its SHA-256; a component's weights are hashed while an executor loads them, and nothing is
computed with them before the hashes were compared. Plans and certificates are created later, on the device;
their readers check them, or `add` the files that a record names.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ..errors import InputError, UsageError, listed
from ..progress import Progress, Tick, adder, silent, uncounted
from .cross_checks import check_components
from .files import (
    MANIFEST,
    MANIFEST_LIMIT_BYTES,
    check_relative,
    open_regular,
    read_regular,
    resolve_inside,
    sha256_from_file,
)
from .held import linked, real_path, stamp_of
from .manifest import ComponentSpec, FileSpec, Manifest, component_of, manifest_from_json
from .typed_paths import shown, typed_path

MADE_LATER = ("plans", "certificates")
# What file managers, Git and hubs leave in a folder: it is never read.
JUNK = (".DS_Store", "desktop.ini", "Thumbs.db", ".gitattributes", ".gitignore", ".directory", "README.md")
JUNK_FOLDERS = (".git", ".cache", "__MACOSX")  # at the top
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
            size = os.stat(self.path / relative).st_size
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
        with self._opened(relative) as (file, spec):
            self._check(relative, spec, file, tick)
        return self.path / relative

    @contextlib.contextmanager
    def opened(self, relative: str) -> Iterator[BinaryIO]:
        """Yield a listed file, open, after checking the SHA-256 of what is open. Raises InputError."""
        with self._opened(relative) as (file, spec):
            self._check(relative, spec, file, uncounted)
            file.seek(0)
            yield file

    def read(self, relative: str, *, limit_bytes: int | None = None) -> bytes:
        """The bytes of a listed file: those that were hashed. Raises InputError as `file` does, and for more
        than `limit_bytes`."""
        with self._opened(relative) as (file, spec):
            if limit_bytes is not None and spec.size > limit_bytes:
                raise InputError(
                    "This file is too large",
                    where=f"{self.path / relative}: expected at most {limit_bytes} bytes, got {spec.size}",
                    fix="check that this is the right file",
                )
            data = file.read(spec.size + 1)
        if (got := hashlib.sha256(data).hexdigest()) != spec.sha256:
            raise self._changed(relative, spec, got)
        return data

    @contextlib.contextmanager
    def _opened(self, relative: str) -> Iterator[tuple[BinaryIO, FileSpec]]:
        spec = self.manifest.files.get(relative) or self._added.get(relative)
        if spec is None:
            raise InputError(
                "The bundle has no such file",
                where=f"{self.path}: expected one of its listed files, got {relative!r}",
                fix=f"use one of {_names(sorted(self.manifest.files))}",
            )
        with open_regular(resolve_inside(self.path, relative, where="bundle"), where="bundle") as file:
            yield file, spec

    def _check(self, relative: str, spec: FileSpec, file: BinaryIO, tick: Tick) -> None:
        """Hash an open file, unless it is as it was when it was hashed before. Raises InputError."""
        with self._locks[relative]:
            stamp = stamp_of(file)
            if self._verified.get(relative) == stamp:
                tick(spec.size)
                return
            file.seek(0)
            got = sha256_from_file(file, tick=tick)
            if got != spec.sha256 or stamp_of(file) != stamp:
                raise self._changed(relative, spec, got)
            self._verified[relative] = stamp

    def _changed(self, relative: str, spec: FileSpec, got: str) -> InputError:
        path, added = self.path / relative, relative in self._added
        return InputError(
            f"This file has changed since {'it was made' if added else 'the export'}",
            where=f"{path}: expected sha256 {spec.sha256[:16]}..., got {got[:16]}...",
            fix=f"remove the folder {path.parent}" if added else _RESTORE,
        )

    def add(self, files: Mapping[str, FileSpec]) -> None:
        """Let `file` give out files made after the export, each checked by the spec in its record."""
        self._added |= files

    def parts(self, component: str) -> list[str]:
        """The names of the graphs that make up `component`, in order: its own, or those of its parts.

        Raises UsageError with the valid names.
        """
        names = [name for name in self.manifest.components if component_of(name) == component]
        return names or [self._known(component)]

    @contextlib.contextmanager
    def loading(self, name: str, *, twin: bool = False, dialect: str = "modern") -> Iterator[Path]:
        """Yield the path of the component's ONNX file, as `loading_files` does."""
        with self.loading_files(
            self.graph_name(name, twin=twin, dialect=dialect), self.weights(name)
        ) as path:
            yield path

    @contextlib.contextmanager
    def loading_files(self, graph: str, weights: Sequence[str]) -> Iterator[Path]:
        """Yield a path of an ONNX file, verified, while its weights beside it are being hashed.

        On Linux the path leads to the open files that are hashed (`held`), for as long as the block lasts.
        When the block ends, all files are the expected ones and those that were there when it began;
        otherwise InputError is raised, also in place of an error that the block raised.
        """
        with contextlib.ExitStack() as stack:
            held = {name: stack.enter_context(self._opened(name)) for name in (graph, *weights)}
            before = {name: stamp_of(file) for name, (file, _) in held.items()}
            places = {real_path(self.path / name).parent for name in held}
            if len(places) > 1:
                raise InputError(
                    "A graph's weights are links to files in another folder than their graph",
                    where=f"{self.path / graph}: expected one folder, got {_names(sorted(map(str, places)))}",
                    fix="replace the links with copies: cp -rL BUNDLE COPY",
                )

            def check(names: Iterable[str], tick: Tick = uncounted) -> None:
                for name in names:
                    file, spec = held[name]
                    self._check(name, spec, file, tick)

            stopped = threading.Event()

            def check_ahead() -> None:
                def tick(_: int) -> None:
                    if stopped.is_set():
                        raise InterruptedError

                with contextlib.suppress(InputError, InterruptedError):  # a wrong file is told below
                    check(weights, tick)

            def check_loaded() -> None:
                ahead.join()
                check(held)
                for name, (file, _) in held.items():
                    by_path = os.stat(real_path(folder / PurePosixPath(name).name)).st_ino
                    if stamp_of(file) != before[name] or by_path != before[name][1]:
                        raise InputError(
                            "This file was replaced while it was loaded",
                            where=f"{self.path / name}: expected one file throughout, got another one",
                            fix="do not write to a bundle in use; run the command again",
                        )

            ahead = threading.Thread(target=check_ahead)
            ahead.start()
            stack.callback(ahead.join)  # it reads the files until then
            stack.callback(stopped.set)
            check([graph])
            files = {PurePosixPath(name).name: file for name, (file, _) in held.items()}
            folder = stack.enter_context(linked(files)) or (self.path / graph).parent
            try:
                yield folder / PurePosixPath(graph).name
            except Exception:
                check_loaded()
                raise
            check_loaded()

    def component(self, name: str) -> ComponentSpec:
        """The spec of the graph `name`, a component or a part. Raises UsageError with the valid names."""
        return self.manifest.components[self._known(name)]

    def _known(self, name: str) -> str:
        if name not in self.manifest.components:
            raise UsageError(
                "The bundle has no such component",
                where=f"{self.path}: expected one of {', '.join(self.manifest.components)}, got {name!r}",
                fix="use one of these names, or a bundle that was exported with all components",
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


def files_present(root: Path) -> list[str]:
    """Relative names of all files and links under `root`, except the manifest, plans, certificates, and what
    other programs are known to leave."""
    names = []
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        if here == root:
            folders[:] = [f for f in folders if f not in (*MADE_LATER, *JUNK_FOLDERS)]
            files = [f for f in files if f != MANIFEST]
        links = [f for f in folders if (here / f).is_symlink()]
        files = [f for f in files if f not in JUNK and not f.startswith("._")]  # the latter of macOS
        names += [(here / f).relative_to(root).as_posix() for f in files + links]
    return names


def _names(names: list[str]) -> str:
    return listed(names, separator=", ") or "none"
