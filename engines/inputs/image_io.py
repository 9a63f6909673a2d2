"""Image files and uint8 arrays [H, W, 3]: what is read from PNG and JPEG, and PNG written whole.

Every kind of image has one defined meaning or is refused: EXIF rotation is applied, transparency is laid on white, grey becomes
three equal channels, 16-bit samples keep their high byte, CMYK is converted without a profile (no colour profile is applied).
"""

from __future__ import annotations

import io
import os
import stat
import warnings
from pathlib import Path

import numpy as np

from ..bundle.files import reason, write_atomic
from ..errors import InputError

PIXEL_LIMIT = 64_000_000
FILE_LIMIT_BYTES = 256 << 20
MIN_SIDE_PIXELS = 2
_PLAIN_MODES = ("1", "L", "RGB", "CMYK", "YCbCr")
_ALPHA_MODES = ("LA", "La", "PA", "P", "RGBA", "RGBa")
_FIX = "give a PNG or JPEG image"


def read_image(path: str | Path) -> np.ndarray:
    """The image in a PNG or JPEG file, uint8 [H, W, 3], at most 64 megapixels. Raises InputError."""
    return image_from_bytes(_read(Path(path)), where=str(path))


def image_from_bytes(data: bytes, *, where: str) -> np.ndarray:
    """As `read_image`, from the file's bytes. The size in the header is checked before anything is decoded."""
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_large(where, "more") from None
    except Exception as error:  # parsers of foreign files raise anything
        raise InputError(
            "This file is no image that can be read",
            where=f"{where}: expected PNG or JPEG, got {_guess(data, error)}",
            fix=_FIX,
        ) from None
    _check_header(image, where)
    try:
        # An MPO (a JPEG with more images behind it, as phones make) is its first image.
        return _rgb_from_image(ImageOps.exif_transpose(image), where)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            "This image is damaged",
            where=f"{where}: expected {image.width}x{image.height} pixels, got {error}",
            fix="copy or export the image again",
        ) from None


def png_from_image(image: np.ndarray) -> bytes:
    """The bytes of a PNG file of `image`, uint8 [H, W, 3]."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG")
    return file.getvalue()


def write_png(path: str | Path, image: np.ndarray) -> None:
    """Write `image`, uint8 [H, W, 3], as a PNG file, whole or not at all. Raises InputError."""
    write_atomic(Path(path), png_from_image(image))


def check_image(image: np.ndarray, *, where: str) -> None:
    """Refuse an array that is not uint8 [H, W, 3] of a permitted size. Raises InputError."""
    shape, dtype = getattr(image, "shape", ()), getattr(image, "dtype", type(image).__name__)
    if len(shape) != 3 or shape[2] != 3 or dtype != np.uint8:
        raise InputError(
            "This is no image",
            where=f"{where}: expected uint8[H,W,3], got {dtype}[{','.join(map(str, shape))}]",
            fix="convert it to RGB bytes",
        )
    _check_size(shape[1], shape[0], where)


def _read(path: Path) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InputError(
                "This is no image file",
                where=f"{path}: expected a regular file, got a folder, pipe or device",
                fix=_FIX,
            )
        if status.st_size > FILE_LIMIT_BYTES:
            raise InputError(
                "This image file is too large",
                fix=_FIX,
                where=f"{path}: expected at most {FILE_LIMIT_BYTES} bytes, got {status.st_size}",
            )
        with os.fdopen(
            os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb"
        ) as file:
            return file.read(FILE_LIMIT_BYTES)
    except (OSError, ValueError) as error:
        raise InputError(
            "This image cannot be read", where=f"{path}: {reason(error)}", fix="check the path"
        ) from None


def _check_header(image, where: str) -> None:
    _check_size(image.width, image.height, where)
    if image.format == "PNG" and getattr(image, "n_frames", 1) > 1:
        raise InputError(
            "This image moves",
            where=f"{where}: expected one frame, got {image.n_frames}",
            fix="save one frame as PNG",
        )


def _check_size(width: int, height: int, where: str) -> None:
    if width * height > PIXEL_LIMIT:
        raise _too_large(where, f"{width}x{height}")
    if min(width, height) < MIN_SIDE_PIXELS:
        raise InputError(
            "This image is too small",
            fix="give a larger image",
            where=f"{where}: expected at least {MIN_SIDE_PIXELS} pixels a side, got {width}x{height}",
        )


def _rgb_from_image(image, where: str) -> np.ndarray:
    from PIL import Image

    image.load()
    if image.mode.startswith("I;16"):
        return _rgb_from_grey16(np.asarray(image), image.info.get("transparency"))
    if image.mode in _ALPHA_MODES or image.mode in _PLAIN_MODES and "transparency" in image.info:
        image = image.convert("RGBA")
        return np.array(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image))[..., :3].copy()
    if image.mode not in _PLAIN_MODES:
        raise InputError(
            "This kind of image is not known",
            where=f"{where}: expected grey, RGB, palette or CMYK, got {image.mode}",
            fix="save it as 8-bit RGB",
        )
    return np.array(image.convert("RGB"))


def _rgb_from_grey16(grey: np.ndarray, transparent: int | None) -> np.ndarray:
    high = (grey >> 8).astype(np.uint8)  # what Pillow does with 16-bit RGB; its own conversion of grey clips
    if transparent is not None:
        high = np.where(grey == transparent, np.uint8(255), high)
    return np.repeat(high[..., None], 3, axis=2)


def _guess(data: bytes, error: Exception) -> str:
    if not data:
        return "an empty file"
    head = data[:512].lstrip().lower()
    kinds = {
        b"<!doctype html": "HTML",
        b"<html": "HTML",
        b"<svg": "SVG",
        b"<?xml": "XML or SVG",
        b"gif8": "GIF",
        b"simple": "FITS",
        b"riff": "WebP or RIFF",
        b"bm": "BMP",
        b"ii*": "TIFF",
        b"mm\0*": "TIFF",
        b"%pdf": "PDF",
        b"version https://git-lfs": "a Git LFS pointer",
    }
    known = next((kind for start, kind in kinds.items() if head.startswith(start)), None)
    return known or f"something else ({type(error).__name__})"


def _too_large(where: str, got: str) -> InputError:
    return InputError(
        "This image is too large",
        where=f"{where}: expected at most {PIXEL_LIMIT} pixels, got {got}",
        fix="scale it down",
    )
