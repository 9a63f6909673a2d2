"""Publish a bundle: stage it beside its final place, check, hash, and rename it.

The final name does not exist before the rename. This module knows nothing of the files' contents.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from engines.bundle.files import reason, sha256_of, sync_folder, write_atomic
from engines.bundle.manifest import SCHEMA, FileSpec, Manifest, json_from_manifest
from engines.bundle.reader import MANIFEST, Bundle, files_present
from engines.errors import InputError


def check_out(out: Path) -> None:
    """Check that `out` is absent or an empty folder, in an existing folder that can be written.

    Raises InputError. Writes nothing.
    """
    try:
        if out.is_symlink():
            raise _refusal(out, "a symbolic link")
        if out.is_dir() and any(out.iterdir()):
            raise _refusal(out, "a folder with files in it")
        if out.exists() and not out.is_dir():
            raise _refusal(out, "a file")
        if not out.parent.is_dir():
            raise InputError(
                "The bundle cannot be written here",
                where=f"{out}: expected its parent to be a folder, got "
                + ("a file" if out.parent.exists() else "nothing"),
                fix="create the parent folder first",
            )
        if not os.access(out.parent, os.W_OK):
            raise InputError(
                "The bundle cannot be written here",
                where=f"{out}: {out.parent} is read-only",
                fix="choose a folder that you can write to",
            )
    except OSError as error:  # for example a name that is too long
        raise _not_written(out, error) from None


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Yield a folder beside `out` to fill. It becomes `out` if the block succeeds, else it is removed."""
    check_out(out)
    try:
        stage = Path(tempfile.mkdtemp(prefix=f".{out.name[:40]}.", suffix=".stage", dir=out.parent))
    except OSError as error:
        raise _not_written(out, error) from None
    try:
        yield stage
        _sync(stage)
        stage.chmod(0o755)
        os.rename(stage, out)  # replaces an empty folder, and fails on one that has been filled meanwhile
        sync_folder(out.parent)
    except OSError as error:
        raise _not_written(out, error) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def write_manifest(stage: Path, *, precision: str, model, components) -> None:
    """Hash every staged file, write the manifest, and open the result as a device would."""
    files = {}
    for name in sorted(files_present(stage)):
        files[name] = FileSpec(size=(stage / name).stat().st_size, sha256=sha256_of(stage / name))
    manifest = Manifest(schema=SCHEMA, precision=precision, model=model, components=components, files=files)
    write_atomic(stage / MANIFEST, json_from_manifest(manifest).encode())
    if Bundle.open(stage).manifest != manifest:
        raise AssertionError("the manifest differs after it is written and parsed")


def _sync(stage: Path) -> None:
    for folder, _, names in os.walk(stage):
        for name in names:
            with open(Path(folder) / name, "rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(folder))


def _refusal(out: Path, got: str) -> InputError:
    return InputError(
        "The output path is already in use",
        where=f"{out}: expected nothing or an empty folder, got {got}",
        fix="choose another --out, or remove what is there",
    )


def _not_written(out: Path, error: OSError) -> InputError:
    return InputError(
        "The bundle cannot be written",
        where=f"{out}: {reason(error)}",
        fix="check the name, the permissions and the free space, or choose another --out",
    )
