"""Reading PNG, JPEG and WebP files into uint8 arrays [H, W, 3], and writing them.

Each kind of image has one defined conversion or raises InputError. EXIF rotation is applied, transparency is
composited on white, grey becomes three equal channels, 16-bit samples keep their high byte, and CMYK is
converted without a profile (no colour profile is applied).
"""

from __future__ import annotations

import io
import os
import stat
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np

from ..bundle.files import reason, write_atomic
from ..bundle.typed_paths import shown, typed_path
from ..errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

GivenImage: TypeAlias = "str | Path | np.ndarray | Image"  # Pillow is imported only where it is needed

PIXEL_LIMIT = 64_000_000
WEBP_PIXEL_LIMIT = 20_000_000  # its decoder holds four copies of them
FILE_LIMIT_BYTES = 256 << 20
MIN_SIDE_PIXELS = 2
ASPECT_LIMIT = 200
_PLAIN_MODES = ("1", "L", "RGB", "CMYK", "YCbCr")
_ALPHA_MODES = ("LA", "La", "PA", "P", "RGBA", "RGBa")
_GREY16_MODES = ("I;16", "I;16L", "I;16B")
STRIP_PIXELS = 1 << 20  # of an image that is converted or resized at a time
_ORIENTATION = 0x0112  # of EXIF; by its value, what turns an image [H, W, 3] upright
_TURNED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.transpose(1, 0, 2),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: image[::-1, ::-1].transpose(1, 0, 2),
    8: lambda image: np.rot90(image),
}
# Suffix of a file that is written -> its format in Pillow, and how it is encoded.
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".webp": ("WEBP", {"lossless": True}),
}
_FIX = "use a PNG, JPEG or WebP image"


def read_image(path: str | Path) -> np.ndarray:
    """Read a PNG or JPEG file of at most 64 megapixels, or a WebP file of 20, as uint8 [H, W, 3].

    Raises InputError.
    """
    return image_from_bytes(_read(typed_path(path)), where=shown(path))


def image_from_bytes(data: bytes, *, where: str) -> np.ndarray:
    """Decode the bytes of an image file as `read_image` does.

    The header's size is checked before decoding.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP"))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_large(where, "more") from None
    except Exception as error:  # Pillow's parsers raise many kinds of exceptions
        raise InputError(
            "This file is not a readable image",
            where=f"{where}: expected PNG, JPEG or WebP, got {_guess(data, error)}",
            fix=_FIX,
        ) from None
    try:
        turned = _rgb_from_pillow(image, where)
    finally:
        image.close()  # it takes more than the array
    return np.ascontiguousarray(turned)


def image_from_pillow(image: Image, *, where: str) -> np.ndarray:
    """Convert a Pillow image, decoded or not, to uint8 [H, W, 3] as `read_image` does. Raises InputError."""
    return np.ascontiguousarray(_rgb_from_pillow(image, where))


def _rgb_from_pillow(image: Image, where: str) -> np.ndarray:
    """A view of the converted image, turned as its EXIF says."""
    _check_header(image, where)
    try:
        # Only the first image of an MPO (several JPEG images in one file, as phones write) is read.
        rgb = _rgb_from_image(image, where)
        return _TURNED.get(image.getexif().get(_ORIENTATION, 1), np.asarray)(rgb)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            "This image is damaged",
            where=f"{where}: expected {image.width}x{image.height} pixels, got {error}",
            fix="copy or save the image again",
        ) from None


def checked_image(image: GivenImage) -> np.ndarray:
    """uint8 [H, W, 3] of a file (`read_image`), of a Pillow image, converted alike, or of an array, which is
    checked (`check_image`)."""
    if isinstance(image, (str, Path)):
        return read_image(image)
    if hasattr(image, "getbands"):
        return image_from_pillow(cast("Image", image), where="image")
    check_image(image, where="image")
    return image


def bytes_from_image(image: np.ndarray, suffix: str = ".png") -> bytes:
    """Encode `image`, uint8 [H, W, 3], as a file of that suffix, one of `FORMATS`."""
    from PIL import Image

    file, (kind, options) = io.BytesIO(), FORMATS[suffix]
    Image.fromarray(image).save(file, format=kind, **options)
    return file.getvalue()


def write_image(path: str | Path, image: np.ndarray) -> None:
    """Write `image`, uint8 [H, W, 3], atomically in the format of the suffix. Raises InputError."""
    write_atomic(Path(path), bytes_from_image(image, Path(path).suffix.lower()))


def check_image(image: np.ndarray, *, where: str) -> None:
    """Raise InputError unless `image` is uint8 [H, W, 3] of an allowed size."""
    shape: tuple[int, ...] = getattr(image, "shape", ())
    dtype = getattr(image, "dtype", type(image).__name__)
    if len(shape) != 3 or shape[2] != 3 or dtype != np.uint8:
        raise InputError(
            "This array is not an image",
            where=f"{where}: expected uint8[H,W,3], got {dtype}[{','.join(map(str, shape))}]",
            fix="convert it to uint8 RGB",
        )
    _check_size(shape[1], shape[0], where)


def _read(path: Path) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InputError(
                "This is not an image file",
                where=f"{path}: expected a regular file, got a folder, pipe or device",
                fix=_FIX,
            )
        if status.st_size > FILE_LIMIT_BYTES:
            raise InputError(
                "This image file is too large",
                where=f"{path}: expected at most {FILE_LIMIT_BYTES} bytes, got {status.st_size}",
                fix=_FIX,
            )
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        with os.fdopen(os.open(path, flags), "rb") as file:
            return file.read(FILE_LIMIT_BYTES)
    except (OSError, ValueError) as error:
        raise InputError(
            "This image cannot be read",
            where=f"{path}: expected an image file, got {reason(error)}",
            fix="check the path and its permissions",
        ) from None


def _check_header(image, where: str) -> None:
    _check_size(image.width, image.height, where, WEBP_PIXEL_LIMIT if image.format == "WEBP" else PIXEL_LIMIT)
    if image.format in ("PNG", "WEBP") and getattr(image, "n_frames", 1) > 1:
        raise InputError(
            "This image is animated",
            where=f"{where}: expected one frame, got {image.n_frames}",
            fix="save one frame as an image of its own",
        )


def check_aspect(height: int, width: int, where: str = "image") -> None:
    """Raise InputError for sides whose ratio no encoder takes."""
    if max(height, width) > ASPECT_LIMIT * min(height, width):
        raise InputError(
            "The image's aspect ratio is too large",
            where=f"{where}: expected sides within {ASPECT_LIMIT} to 1, got {width}x{height}",
            fix="crop the image",
        )


def _check_size(width: int, height: int, where: str, limit: int = PIXEL_LIMIT) -> None:
    if width * height > limit:
        raise _too_large(where, f"{width}x{height}", limit)
    if min(width, height) < MIN_SIDE_PIXELS:
        raise InputError(
            "This image is too small",
            where=f"{where}: expected at least {MIN_SIDE_PIXELS} pixels per side, got {width}x{height}",
            fix="use a larger image",
        )
    check_aspect(height, width, where)


def _rgb_from_image(image, where: str) -> np.ndarray:
    """Convert in strips of rows: whole copies of a large image would take a gigabyte."""
    image.load()
    if image.mode not in (*_GREY16_MODES, *_ALPHA_MODES, *_PLAIN_MODES):
        raise InputError(
            "This image mode is not supported",
            where=f"{where}: expected grey, RGB, palette or CMYK, got {image.mode}",
            fix="save the image as 8-bit RGB",
        )
    rgb = np.empty((image.height, image.width, 3), np.uint8)
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        rgb[top : top + rows] = _rgb_from_strip(strip)
    return rgb


def _rgb_from_strip(image) -> np.ndarray:
    from PIL import Image

    if image.mode in _GREY16_MODES:
        return _rgb_from_grey16(np.asarray(image), image.info.get("transparency"))
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        image = image.convert("RGBA")
        return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image))[..., :3]
    return np.asarray(image.convert("RGB"))


def _rgb_from_grey16(grey: np.ndarray, transparent: int | None) -> np.ndarray:
    high = (grey >> 8).astype(np.uint8)  # as Pillow does for 16-bit RGB; for 16-bit grey it clips instead
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
        b"riff": "RIFF",
        b"bm": "BMP",
        b"ii*": "TIFF",
        b"mm\0*": "TIFF",
        b"%pdf": "PDF",
        b"version https://git-lfs": "a Git LFS pointer",
    }
    known = next((kind for start, kind in kinds.items() if head.startswith(start)), None)
    return known or f"something else ({type(error).__name__})"


def _too_large(where: str, got: str, limit: int = PIXEL_LIMIT) -> InputError:
    return InputError(
        "This image is too large",
        where=f"{where}: expected at most {limit} pixels, got {got}",
        fix="scale the image down",
    )
