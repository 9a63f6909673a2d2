"""The library of the KV-cache attention plugin: its limits, its place, and the checks before it is loaded.

The library is native code, built on the machine that runs it (README.md in this folder). It is found at
`$STAR_PLUGIN`, else where the documented command builds it. Its bytes are read before it is loaded: they
tell its ABI and the TensorRT that it was built for, and a plan records their SHA-256.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..bundle.files import open_regular, read_regular, sha256_from_file
from ..bundle.held import linked
from ..bundle.manifest import ComponentSpec, Manifest, component_of
from ..errors import InputError, MissingError
from ..targets import Target

NAME, ABI = "KVCacheAttention", 1  # the ABI is the plugin's version: plugin_fields.h, STAR_ABI
HEAD_DIMS, MAX_ROWS, MAX_CAPACITY = (64, 128), 8, 4096
PRECISIONS = ("fp16", "bf16", "int8", "int4", "mixed")
VARIABLE = "STAR_PLUGIN"
FOLDER = Path(__file__).parent
BUILT = FOLDER / "build" / "libstar_plugins.so"
COMMAND = f"cmake -S {FOLDER} -B {FOLDER / 'build'} && cmake --build {FOLDER / 'build'}"
_LIMIT_BYTES = 256 << 20
_MARKER = re.compile(rb"star-plugin abi=(\d+) tensorrt=(\d+)\.(\d+);")


@dataclass(frozen=True)
class Library:
    """A plugin library on disk: its ABI, the TensorRT that it was built against, and the SHA-256 of its
    bytes.
    """

    path: Path
    abi: int
    tensorrt: tuple[int, int]
    sha256: str


def needs_plugin(target: Target, spec: ComponentSpec) -> bool:
    """Whether plans of this component for `target` contain the plugin."""
    return target.dialect == "classic" and spec.plugin_abi is not None


def check_limits(manifest: Manifest, component: str, *, rows: int, capacity_tokens: int) -> None:
    """Check that the plugin can compute this decoder. Raises InputError naming the limit that it exceeds."""
    cache = manifest.model.cache[component_of(component)]

    def check(good: bool, what: str, expected: str, got: object, fix: str) -> None:
        if not good:
            raise InputError(
                "The KV-cache plugin cannot compute this decoder",
                fix=fix,
                where=f"{component}: {what}: expected {expected}, got {got}",
            )

    other, precision = "use a target with TensorRT 10.15 or newer, or ONNX Runtime", manifest.precision
    check(cache.head_dim in HEAD_DIMS, "head_dim", " or ".join(map(str, HEAD_DIMS)), cache.head_dim, other)
    known, bf16 = f"one of {', '.join(PRECISIONS)}", "export with --precision bf16"
    check(precision in PRECISIONS, "precision", known, precision, bf16)
    check(1 <= rows <= MAX_ROWS, "rows", f"1 to {MAX_ROWS}", rows, "build with fewer rows")
    fits = 1 <= capacity_tokens <= MAX_CAPACITY
    check(fits, "capacity", f"1 to {MAX_CAPACITY} tokens", capacity_tokens, "build with a smaller capacity")


def find_library() -> Library:
    """The library of this machine.

    Raises MissingError when it is not built, InputError when the file is not the plugin.
    """
    path = Path(os.environ.get(VARIABLE) or BUILT)
    if not path.is_file():
        raise MissingError(
            "The KV-cache plugin is not built",
            fix=f"{COMMAND}; or set {VARIABLE} to its path",
            where=f"{path}: expected {BUILT.name}, got no file",
        )
    return library_from_file(path)


def library_from_file(path: Path) -> Library:
    """Read the marker in the bytes of `path` without loading it. Raises InputError when it has none."""
    data = read_regular(path, limit_bytes=_LIMIT_BYTES, where="plugin")
    marker = _MARKER.search(data)
    if marker is None:
        raise InputError(
            "This file is not the KV-cache plugin",
            fix=f"build it: {COMMAND}",
            where=f"{path}: expected its marker, got {len(data)} bytes without it",
        )
    abi, major, minor = map(int, marker.groups())
    return Library(path, abi, (major, minor), hashlib.sha256(data).hexdigest())


def check_library(library: Library, *, abi: int, tensorrt: str) -> None:
    """Check that the library has the manifest's ABI and was built for the major version of this TensorRT.

    Raises MissingError naming what was expected and found.
    """
    major = int(tensorrt.split(".")[0])
    if library.abi != abi:
        raise MissingError(
            "The KV-cache plugin has another ABI",
            fix=f"build the plugin of this bundle's star-export: {COMMAND}",
            where=f"{library.path}: expected ABI {abi}, got {library.abi}",
        )
    if library.tensorrt[0] != major:
        built = ".".join(map(str, library.tensorrt))
        raise MissingError(
            "The KV-cache plugin was built for another TensorRT",
            fix=f"build it again: {COMMAND}",
            where=f"{library.path}: expected TensorRT {major}, got {built}",
        )


def check_plan_library(library: Library, sha256: str | None, *, where: str, fix: str) -> None:
    """Check that the library is the one that the plan was built with. Raises InputError."""
    if library.sha256 != sha256:
        known = f"{sha256[:16]}..." if sha256 else "none"
        raise InputError(
            "This plan is stale: the KV-cache plugin has changed since it was built",
            fix=fix,
            where=f"{where}: built with sha256 {known}, now {library.sha256[:16]}... ({library.path})",
        )


def library_for(target: Target, spec: ComponentSpec, *, tensorrt: str) -> Library | None:
    """The checked library that a plan of this component for `target` needs; None where it needs none."""
    if spec.plugin_abi is None or not needs_plugin(target, spec):
        return None
    library = find_library()
    check_library(library, abi=spec.plugin_abi, tensorrt=tensorrt)
    return library


def load(library: Library) -> ctypes.CDLL:
    """Load a checked library once per process; this registers the plugin. Raises MissingError on failure."""
    return _loaded(str(library.path.resolve()), library.sha256)


@functools.cache
def _loaded(path: str, sha256: str) -> ctypes.CDLL:
    try:
        with open_regular(Path(path), where="plugin") as file:
            got = sha256_from_file(file)
            # The loader takes one name for one library, so the link has a folder of its own.
            with linked({Path(path).name: file}) as folder:
                own = (folder or Path(path).parent) / Path(path).name
                native = ctypes.CDLL(str(own)) if got == sha256 else None
    except OSError as error:
        raise MissingError(
            "The KV-cache plugin cannot be loaded", where=f"{path}: {error}", fix=f"build it again: {COMMAND}"
        ) from None
    if native is None:
        raise InputError(
            "The KV-cache plugin was replaced while it was loaded",
            where=f"{path}: expected sha256 {sha256[:16]}..., got {got[:16]}...",
            fix="run the command again",
        )
    if not native.star_plugin_registered():
        raise MissingError(
            "TensorRT did not register the KV-cache plugin",
            fix="use one plugin library per process",
            where=f"{path}: expected {NAME} version {ABI} to be registered, got a refusal",
        )
    _LOADED.append(native)
    return native


_LOADED: list[ctypes.CDLL] = []


def take_overflow() -> bool:
    """Whether a write since the last call did not fit its cache. Wait for the device's work before asking."""
    flags = [
        native.star_plugin_take_overflow() for native in _LOADED
    ]  # asking clears a flag, so ask them all
    return any(flags)


def check_overflow() -> None:
    """Raise InputError if `take_overflow`."""
    if take_overflow():
        raise InputError(
            "A write did not fit the cache",
            fix="shorten the prompt, or build with a larger capacity",
            where="cache: expected slots within the capacity, got slots beyond it; nothing was written",
        )
