"""Images on their way out: previews, sizes and file formats."""

from __future__ import annotations

import io

import numpy as np

from ..inputs.image_io import bytes_from_image

GREY = 128  # of what is not drawn yet


def with_rows(image: np.ndarray, share: float) -> np.ndarray:
    """`image` uint8 [R, R, 3] with only the upper `share` of its rows, and grey below."""
    shown = image.copy()
    shown[round(len(image) * share) :] = GREY
    return shown


def sent_size(asked: tuple[int, int] | None, drawn: int) -> int:
    """The side in pixels that a square image is sent with: the shorter one of what was asked for."""
    return drawn if asked is None else min(asked)


def file_from_image(
    image: np.ndarray, *, side: int, file_format: str, compression: int | None = None
) -> bytes:
    """Resize `image`, uint8 [R, R, 3], to a square of `side` pixels and encode it as png, jpeg or webp.

    `compression` is the quality of jpeg and webp in percent; without one, webp is lossless and jpeg 95 %.
    """
    from PIL import Image

    if side != len(image):
        resized = Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS)
        image = np.asarray(resized)
    if compression is None or compression == 100 or file_format == "png":
        return bytes_from_image(image, f".{file_format}")
    file = io.BytesIO()
    Image.fromarray(image).save(file, format=file_format.upper(), quality=max(1, compression))
    return file.getvalue()
