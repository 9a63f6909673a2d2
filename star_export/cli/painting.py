"""The options of the diffusion decoder, checked before a bundle is opened."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.bundle.files import read_regular
from engines.bundle.typed_paths import output_folder, shown, typed_path
from engines.errors import InputError, UsageError

if TYPE_CHECKING:
    import numpy as np

    from engines import Painting

FILE_BYTES = 1 << 30  # of noise; that of 16 images of 1024 pixels has 17 MB
NUMBERS = 1 << 25  # of one array of noise: 128 images of 1024 pixels
HEADER_BYTES = 4096


def painting_from_options(decoder: str, *, force: bool, **options: Any) -> Painting | None:
    """The settings of a painting; None for the VQ decoder, which takes none of them.

    Raises UsageError for options of the other decoder, and InputError for a file of noise that cannot be read
    and for a folder of previews that cannot be written.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if decoder == "vq":
        if given:
            raise UsageError(
                "This option is for the diffusion decoder",
                where=f"--{min(given).replace('_', '-')}: expected --decoder diffusion with it, "
                "got --decoder vq",
                fix="add --decoder diffusion, or leave the option out",
            )
        return None
    from engines.runtime.painting import Painting

    if (folder := given.pop("previews", None)) is not None:
        given["preview"] = preview_into(folder, force=force)
    if (file := given.pop("noise", None)) is not None:
        given |= noise_from_file(file)
    return Painting(**given)


def preview_into(name: str, *, force: bool):
    """A function that writes what a step leads to into the existing folder `name`."""
    folder = output_folder(name)
    if not force and (there := next(folder.glob("step-*.png"), None)):
        raise UsageError(
            "This file is there already",
            where=f"{shown(there)}: expected a folder without previews",
            fix="choose another folder, or replace them with --force",
        )

    def preview(step: int, images: Callable[[], np.ndarray]) -> None:
        from engines.inputs.image_io import write_image

        for i, image in enumerate(images()):
            write_image(folder / (f"step-{step:03}" + (f"-{i}" if i else "") + ".png"), image)

    return preview


def noise_from_file(name: str) -> dict[str, np.ndarray]:
    """The arrays `noise` and, if it is there, `source_noise` of an .npz file. Raises InputError."""
    path = typed_path(name)
    data = read_regular(path, limit_bytes=FILE_BYTES, where="noise")
    found = {}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = [entry.filename for entry in archive.infolist()]
            for entry in archive.infolist():
                key = entry.filename.removesuffix(".npy")
                if key not in ("noise", "source_noise"):
                    continue
                if key in found:
                    raise _refusal(path, f"one array {key}", "several of this name")
                limit = HEADER_BYTES + NUMBERS * 8
                if entry.file_size > limit:  # before a byte is unpacked
                    raise _refusal(path, f"at most {limit} bytes of {key}", str(entry.file_size))
                array = array_from_npy(archive.read(entry))
                if math.prod(array.shape) > NUMBERS:
                    raise _refusal(path, f"at most {NUMBERS} numbers of {key}", str(list(array.shape)))
                found[key] = array
    except InputError:
        raise
    except Exception as error:  # a damaged archive or array can raise anything
        said = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise _refusal(path, "an .npz file of numpy", said) from None
    if "noise" not in found:
        raise _refusal(path, "an array `noise`", ", ".join(map(repr, names[:8])) or "none")
    return found


def array_from_npy(data: bytes) -> np.ndarray:
    """The array of an .npy file. What its header states is held against `data` before room is made for it.

    Raises ValueError, also for objects, which are pickled.
    """
    import numpy as np

    file, header = io.BytesIO(data), np.lib.format
    version = header.read_magic(file)
    read = header.read_array_header_1_0 if version == (1, 0) else header.read_array_header_2_0
    shape, _, dtype = read(file)
    stated, left = math.prod(shape) * dtype.itemsize, len(data) - file.tell()
    if not dtype.hasobject and stated > left:
        raise ValueError(f"a header of {stated} bytes before {left}")
    file.seek(0)
    return header.read_array(file, allow_pickle=False)


def _refusal(path: Path, expected: str, got: str) -> InputError:
    return InputError(
        "This file of noise cannot be used",
        where=f"{shown(path)}: expected {expected}, got {got}",
        fix="write it with numpy.savez: noise=..., and for an edit source_noise=...",
    )
