"""A bundle on disk: nothing in it is used before it is what the manifest says.

At `open`: the manifest, every path, presence, sizes, and files that nobody listed. At first use of a file: its SHA-256. Plans and
certificates are made later, on the device, and are checked by who reads them.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path, PurePosixPath

from ..errors import InputError, UsageError
from .files import check_regular, check_relative, read_regular, resolve_inside, sha256_of
from .manifest import ComponentSpec, Manifest, manifest_from_json

MANIFEST = "manifest.json"
MADE_LATER = ("plans", "certificates")
MANIFEST_LIMIT_BYTES = 16 << 20
_LISTED = 10


class Bundle:
    """A bundle whose manifest and file list have been checked. `manifest` says what is in it, `path` is its folder."""

    def __init__(self, path: Path, manifest: Manifest):
        self.path, self.manifest = path, manifest
        self._verified: dict[str, tuple] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Read and check `path/manifest.json` and the presence and size of every file. Raises InputError."""
        path = Path(path)
        if not path.is_dir():
            got = "a file" if path.exists() else "nothing"
            raise InputError(
                "This is not a bundle",
                where=f"{path}: expected a folder with {MANIFEST}, got {got}",
                fix="make one: star-export export SOURCE --out BUNDLE",
            )
        file = path / MANIFEST
        data = read_regular(file, limit_bytes=MANIFEST_LIMIT_BYTES, where="bundle")
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise InputError(
                "The manifest is not text",
                where=f"{file}: expected UTF-8, got {error.reason} at byte {error.start}",
                fix="copy the bundle again, or export it again",
            ) from None
        manifest = manifest_from_json(text, where=str(file))
        check_components(manifest, where=str(file))
        bundle = cls(path, manifest)
        bundle.check_files()
        return bundle

    def check_files(self) -> None:
        """Paths, presence, unlisted files and sizes against the manifest, without reading contents. Raises InputError."""
        listed, where = self.manifest.files, f"{self.path / MANIFEST}: files"
        for relative in listed:
            check_relative(relative, where=where)
            if relative == MANIFEST or PurePosixPath(relative).parts[0] in MADE_LATER:
                raise InputError(
                    "This path may not be listed",
                    where=f"{where}: expected a file of the export, got {relative!r}",
                    fix="export the bundle again",
                )
            if os.path.lexists(self.path / relative):
                resolve_inside(self.path, relative, where=where)
        present = set(files_present(self.path))
        absent, unlisted = sorted(set(listed) - present), sorted(present - set(listed))
        if absent or unlisted:
            raise InputError(
                "The bundle's files are not the listed ones",
                fix="copy the bundle again, or export it again",
                where=f"{self.path}: absent: {_names(absent)}; not listed: {_names(unlisted)}",
            )
        for relative, spec in listed.items():
            size = os.lstat(self.path / relative).st_size
            if size != spec.size:
                raise InputError(
                    "This file has another size",
                    where=f"{relative}: expected {spec.size} bytes, got {size}",
                    fix="copy the bundle again, or export it again",
                )

    def file(self, relative: str) -> Path:
        """Path of a listed file whose SHA-256 was checked. Hashed on first use, and again when the file has changed since.

        Raises InputError with both hash prefixes, or when the manifest does not list it.
        """
        spec = self.manifest.files.get(relative)
        if spec is None:
            raise InputError(
                "The bundle has no such file",
                where=f"{self.path}: expected one of its listed files, got {relative!r}",
                fix=f"its files: {_names(sorted(self.manifest.files))}",
            )
        path = resolve_inside(self.path, relative, where="bundle")
        with self._lock:
            stamp = _stamp(path)
            if self._verified.get(relative) == stamp:
                return path
            got = sha256_of(path, where="bundle")
            if got != spec.sha256 or _stamp(path) != stamp:
                raise InputError(
                    "This file is not the one that was exported",
                    fix="copy the bundle again, or export it again",
                    where=f"{path}: expected sha256 {spec.sha256[:16]}..., got {got[:16]}...",
                )
            self._verified[relative] = stamp
        return path

    def component(self, name: str) -> ComponentSpec:
        """Boundary and files of the component `name`. Raises UsageError listing the valid names."""
        spec = self.manifest.components.get(name)
        if spec is None:
            raise UsageError(
                "No such component",
                where=f"{self.path}: expected one of {', '.join(self.manifest.components)}, got {name!r}",
                fix="use one of these names",
            )
        return spec

    def graph(self, name: str, *, twin: bool = False, dialect: str = "modern") -> Path:
        """Path of the component's ONNX file (`twin`: its fp32 twin, where it has one), it and its weights verified."""
        spec = self.component(name)
        relative = spec.twin if twin and spec.twin else self.graph_name(name, dialect=dialect)
        for weights in self.weights(name):
            self.file(weights)
        return self.file(relative)

    def graph_name(self, name: str, *, dialect: str) -> str:
        """The component's ONNX file in `dialect`, as the manifest lists it. Raises InputError when the bundle has none."""
        spec = self.component(name)
        relative = spec.classic if dialect == "classic" else spec.graph
        if relative is None:
            raise InputError(
                "This bundle has no classic graphs",
                fix="export it again with this version of star-export",
                where=f"{self.path}: {name}: expected a graph for TensorRT before 10.15, got none",
            )
        return relative

    def weights(self, name: str) -> list[str]:
        """The component's external weight files, as listed names."""
        folder = PurePosixPath(self.component(name).graph).parent
        return sorted(
            f for f in self.manifest.files if PurePosixPath(f).parent == folder and f.endswith(".data")
        )

    def verify(self) -> None:
        """Check the SHA-256 of every file. Raises InputError at the first that differs."""
        for relative in self.manifest.files:
            self.file(relative)


def check_components(manifest: Manifest, *, where: str) -> None:
    """Every file that a component names must be listed. Raises InputError."""
    for name, spec in manifest.components.items():
        for field in ("graph", "twin", "golden", "classic"):
            relative = getattr(spec, field)
            if relative is not None and relative not in manifest.files:
                raise InputError(
                    "A component names a file that is not listed",
                    fix="export the bundle again",
                    where=f"{where}: components: {name}: {field}: expected a key of files, got {relative!r}",
                )


def files_present(root: Path) -> list[str]:
    """Relative names (with `/`) of everything under `root` that is not a folder, but for the manifest, plans and certificates."""
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
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return (", ".join(names[:_LISTED]) or "none") + more
