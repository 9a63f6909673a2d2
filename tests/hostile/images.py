"""Files that are given as an image."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from .harness import Case


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, data: bytes = b"", *, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG file with any header."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(data)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


PLAIN = Image.new("RGB", (60, 40), "red")
GOOD = encoded(PLAIN)
FILES = {
    "an empty file": b"",
    "a page": b"<!DOCTYPE html><html>404</html>",
    "a drawing": b"<svg xmlns='x'/>",
    "a GIF": encoded(PLAIN, "GIF"),
    "a TIFF": encoded(PLAIN, "TIFF"),
    "a BMP": encoded(PLAIN, "BMP"),
    "a PDF": b"%PDF-1.7\n",
    "FITS": b"SIMPLE  =                    T" * 100,
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "zeros": bytes(1000),
    "noise": bytes(range(256)) * 40,
    "half a PNG": GOOD[: len(GOOD) // 2],
    "half a JPEG": encoded(PLAIN, "JPEG")[:400],
    "half a WebP": encoded(PLAIN, "WEBP")[:60],
    "a signature alone": GOOD[:8],
    "a header of 65,000 pixels square": png(65_000, 65_000),
    "a header of 4 gigapixels": png(2**31 - 1, 2),
    "100 megapixels": png(10_000, 10_000),
    "no pixels": png(0, 0),
    "one pixel": encoded(Image.new("RGB", (1, 1))),
    "a strip of one pixel": encoded(Image.new("RGB", (500, 1))),
    "a strip 300 times as long as high": encoded(Image.new("RGB", (3000, 10))),
    "an unknown kind of colour": png(4, 4, colour=7),
    "an odd depth": png(4, 4, depth=3),
    "too few pixels": png(40, 40, b"\0"),
    "an animated PNG": encoded(PLAIN, save_all=True, append_images=[Image.new("RGB", (60, 40))]),
    "an animated WebP": encoded(PLAIN, "WEBP", save_all=True, append_images=[Image.new("RGB", (60, 40))]),
}
SPECIAL: dict[str, Callable[[Path], None]] = {
    "a folder": lambda path: path.mkdir(),
    "a pipe": lambda path: os.mkfifo(path),
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "300 MB of nothing": lambda path: _sparse(path, 300 << 20),
}


def _sparse(path: Path, size: int) -> None:
    with open(path, "wb") as file:
        file.truncate(size)


def given(data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / "cat.png").write_bytes(data) and None


def special(make: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda folder: make(folder / "cat.png")


ASK = ("ask", "{bundle}", "cat.png", "what?", "--max-new-tokens", "1")
EDIT = ("edit", "{bundle}", "cat.png", "blue", "-o", "out.png")
CASES = [
    *(Case(f"ask about {name}", ASK, 3, spoil=given(data)) for name, data in FILES.items()),
    *(Case(f"edit {name}", EDIT, 3, spoil=given(data)) for name, data in FILES.items()),
    *(Case(f"ask about {name}", ASK, 3, spoil=special(make)) for name, make in SPECIAL.items()),
    Case("ask about nothing on stdin", ("ask", "{bundle}", "-", "what?"), 3, "stdin"),
    Case("ask about noise on stdin", ("ask", "{bundle}", "-", "what?"), 3, "stdin", stdin=bytes(100)),
    Case(
        "ask about an image on stdin",
        ("ask", "{bundle}", "-", "what?", "--max-new-tokens", "1"),
        0,
        stdin=GOOD,
    ),
    Case(
        "an image larger than its prompt may be",
        ("ask", "{bundle}", "cat.png", "what?", "--min-pixels", "40000000", "--max-pixels", "50000000"),
        3,
        "--max-pixels",
        spoil=given(GOOD),
    ),
]
