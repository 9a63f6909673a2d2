"""Paths that a person typed: what cannot be read or written under one is said before any work.

`typed_path` is for a name that is read, `output_file` and `output_folder` for one that is written. Nothing is
written among a bundle's own files, which would no longer be those that its manifest lists.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from pathlib import Path, PureWindowsPath

from ..errors import InputError
from .files import MANIFEST, MANIFEST_LIMIT_BYTES, not_written, reason

# Names that Windows has devices for, whatever their suffix, and characters that its names cannot hold.
_DEVICE = re.compile(
    r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9\u00b9\u00b2\u00b3]) *(\..*)?", re.IGNORECASE
)
_NOT_IN_A_NAME = re.compile('[<>:"|?*\x00-\x1f]|[. ]$')
SHOWN_CHARACTERS = 200  # of a path in a message


def typed_path(path: str | Path) -> Path:
    """`path` with `~` expanded, whether there is anything or not.

    Raises InputError for an empty name, which would be the working folder, and where the system cannot even
    look: a name that is too long, a folder without access, links in a circle.
    """
    if not str(path):
        raise InputError(
            "This path cannot be used",
            where="path: expected a name, got an empty text",
            fix="name a file or a folder; the working folder is .",
        )
    try:
        found = Path(path).expanduser()
        found.stat()
    except (FileNotFoundError, NotADirectoryError):
        return found
    except (OSError, ValueError, RuntimeError) as error:  # the last of `~` without a home
        raise InputError(
            "This path cannot be used",
            where=f"{shown(path)}: {reason(error)}",
            fix="check the name and the permissions of its folders",
        ) from None
    return found


def output_file(path: str | Path) -> Path:
    """The file that `path` names, links followed, after its folder let a file be created in it.

    An old file stays as it is. Raises InputError where `path` cannot be written, is a folder, or lies inside
    a bundle.
    """
    check_name(path)
    found = Path(os.path.realpath(typed_path(path)))
    if found.is_dir():
        raise not_written(shown(path), "expected a file name, got a folder")
    _check_room(path, found.parent)
    return found


def output_folder(path: str | Path) -> Path:
    """The existing folder that `path` names, links followed, after it let a file be created in it.

    Raises InputError, also for a bundle.
    """
    found = Path(os.path.realpath(typed_path(path)))
    _check_room(path, found)
    return found


def check_name(path: str | Path) -> None:
    """Raise InputError for a name that Windows, where this runs on it, would write somewhere else.

    `NUL` and `con.png` are devices, `a.png:b` is a part of a file that no folder shows, and of `x.png.` the
    end is dropped.
    """
    if sys.platform != "win32":
        return
    for name in _plain_names(path):
        if _DEVICE.fullmatch(name) or _NOT_IN_A_NAME.search(name):
            raise not_written(shown(path), f"{name!r:.80} is no name of a file on Windows")


def _plain_names(path: str | Path) -> list[str]:
    """The names in a path of Windows, without its drive, `.` and `..`."""
    pure = PureWindowsPath(path)
    return [name for name in pure.parts[bool(pure.anchor) :] if name != ".."]


def shown(path: str | Path) -> str:
    """A path for a message: its beginning, if it is long."""
    text = str(path)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def _check_room(path: str | Path, folder: Path) -> None:
    """Raise InputError unless a file can be created in `folder`, outside of every bundle."""
    if not folder.is_dir():
        raise not_written(shown(path), f"expected an existing folder, got {shown(folder)}")
    for parent in (folder, *folder.parents):
        if _is_bundle(parent):
            raise not_written(shown(path), f"expected a place outside the bundle {shown(parent)}")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise not_written(shown(path), reason(error)) from None


def _is_bundle(folder: Path) -> bool:
    """Whether the folder has a manifest that `export` wrote."""
    try:
        file = folder / MANIFEST
        if file.stat().st_size > MANIFEST_LIMIT_BYTES:
            return False
        text = file.read_text(encoding="utf-8")
        return '"components"' in text and {"schema", "precision", "files"} <= json.loads(text).keys()
    except (OSError, ValueError, AttributeError, RecursionError):
        return False
