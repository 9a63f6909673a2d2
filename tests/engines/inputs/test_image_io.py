"""Image files: refused, or one defined meaning (docs/bad_inputs.md rows 44 and 45)."""

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from engines.errors import InputError
from engines.inputs import image_io
from engines.inputs.image_io import (
    bytes_from_image,
    check_image,
    checked_image,
    image_from_bytes,
    image_from_pillow,
    read_image,
    write_image,
)

ROOT = Path(__file__).parents[3]
RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 10, 3), dtype=np.uint8)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return file.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, *, depth=8, colour=2, data=b"", extra=b""):
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + extra
        + chunk(b"IDAT", zlib.compress(data))
        + chunk(b"IEND", b"")
    )


NOISE = encoded(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)), "JPEG")
GIF = encoded(Image.new("P", (8, 8)), "GIF", save_all=True, append_images=[Image.new("P", (8, 8), 3)])
APNG = encoded(Image.new("RGB", (8, 8)), save_all=True, append_images=[Image.new("RGB", (8, 8), "red")])
WEBP = encoded(
    Image.new("RGB", (8, 8)), "WEBP", save_all=True, append_images=[Image.new("RGB", (8, 8), "red")]
)


# Row 44
@pytest.mark.parametrize(
    "data, match",
    [
        (b"", "an empty file"),
        (b"<!DOCTYPE html><html>404</html>", "HTML"),
        (b"<svg xmlns='x'/>", "SVG"),
        (GIF, "GIF"),
        (b"SIMPLE  =                    T", "FITS"),
        (encoded(Image.new("RGB", (8, 8)), "BMP"), "BMP"),
        (encoded(Image.new("RGB", (8, 8)), "TIFF"), "TIFF"),
        (WEBP, "one frame, got 2"),
        (b"\0" * 100, "something else"),
        (NOISE[: len(NOISE) // 2], "damaged"),
        (encoded(Image.fromarray(RGB))[:-30], "damaged"),
        (APNG, "one frame, got 2"),
        (png(65_000, 65_000), "at most 64000000 pixels"),
        (png(10_000, 10_000), "at most 64000000 pixels, got"),
        (png(8001, 8000), "8001x8000"),
        (encoded(Image.new("RGB", (1, 1))), "at least 2 pixels per side, got 1x1"),
        (png(0, 0), "PNG, JPEG or WebP"),
        (png(0, 5), "PNG, JPEG or WebP|at least 2"),
        (png(4, 4, colour=7), "PNG, JPEG or WebP"),
        (png(4, 4, depth=3), "PNG, JPEG or WebP"),
        (png(4, 4, data=b"\0"), "damaged"),
        (b"\x89PNG\r\n\x1a\n", "PNG, JPEG or WebP"),
        (b"\xff\xd8\xff", "PNG, JPEG or WebP"),
    ],
)
def test_what_is_no_image_is_refused(data, match, recwarn):
    with pytest.raises(InputError, match=match) as caught:
        image_from_bytes(data, where="x.png")
    assert len(str(caught.value).splitlines()) == 3 and not recwarn.list


@pytest.mark.parametrize(
    "make", [lambda p: p.mkdir(), lambda p: os.mkfifo(p), lambda p: p.symlink_to("/dev/zero"), lambda p: None]
)
def test_what_is_no_file_is_refused_at_once(tmp_path, make):
    make(tmp_path / "x.png")
    with pytest.raises(InputError, match="regular file|No such file"):
        read_image(tmp_path / "x.png")


def test_a_huge_file_is_refused_unread(tmp_path):
    with open(tmp_path / "x.png", "wb") as file:
        file.truncate(300 << 20)
    with pytest.raises(InputError, match="at most 268435456 bytes, got 314572800"):
        read_image(tmp_path / "x.png")


# Row 45
def test_rgb_is_itself(tmp_path):
    write_image(tmp_path / "x.png", RGB)
    np.testing.assert_array_equal(read_image(tmp_path / "x.png"), RGB)
    assert os.listdir(tmp_path) == ["x.png"]
    np.testing.assert_array_equal(image_from_bytes(bytes_from_image(RGB), where="x"), RGB)


@pytest.mark.parametrize("name", ["x.webp", "x.jpg", "X.JPEG"])
def test_the_suffix_is_the_format(tmp_path, name):
    write_image(tmp_path / name, RGB)
    read = read_image(tmp_path / name)
    assert Image.open(tmp_path / name).format == ("WEBP" if name == "x.webp" else "JPEG")
    assert read.shape == RGB.shape and (name != "x.webp" or (read == RGB).all())


def test_a_pillow_image_is_converted_as_its_file_is(tmp_path):
    image = Image.fromarray(RGB).convert("RGBA")
    image.putalpha(100)
    image.save(tmp_path / "x.png")
    np.testing.assert_array_equal(checked_image(image), read_image(tmp_path / "x.png"))
    with pytest.raises(InputError, match="at least 2 pixels"):
        checked_image(Image.new("RGB", (1, 5)))


def test_grey_becomes_three_equal_channels():
    grey = RGB[..., 0]
    np.testing.assert_array_equal(
        image_from_bytes(encoded(Image.fromarray(grey)), where="x"), np.stack([grey] * 3, axis=2)
    )
    bits = image_from_bytes(encoded(Image.fromarray(grey > 99)), where="x")
    np.testing.assert_array_equal(bits[..., 1], np.where(grey > 99, 255, 0))


def test_sixteen_bit_grey_is_scaled_not_clipped():
    grey = np.array([[0, 255, 256, 257], [32768, 40000, 65279, 65535]], np.uint16)
    got = image_from_bytes(encoded(Image.fromarray(grey)), where="x")
    np.testing.assert_array_equal(got, np.stack([grey >> 8] * 3, axis=2))


def test_sixteen_bit_colour_is_scaled_not_clipped():
    samples = RNG.integers(0, 65536, (2, 3, 3)).astype(">u2")
    data = b"".join(b"\0" + row.tobytes() for row in samples)
    np.testing.assert_array_equal(image_from_bytes(png(3, 2, depth=16, data=data), where="x"), samples >> 8)


def test_transparency_is_laid_on_white():
    alpha = np.concatenate([RGB, np.full((6, 10, 1), 0, np.uint8)], axis=2)
    assert (image_from_bytes(encoded(Image.fromarray(alpha)), where="x") == 255).all()
    alpha[..., :3], alpha[..., 3] = 0, 102  # 40 % black on white
    np.testing.assert_array_equal(
        image_from_bytes(encoded(Image.fromarray(alpha)), where="x"), np.full_like(RGB, 153)
    )
    grey = Image.merge("LA", [Image.new("L", (4, 4), 0), Image.new("L", (4, 4), 102)])
    assert (image_from_bytes(encoded(grey), where="x") == 153).all()


@pytest.mark.parametrize(
    "mode, colour, transparent", [("P", 1, 1), ("L", 7, 7), ("RGB", (1, 2, 3), (1, 2, 3)), ("I;16", 700, 700)]
)
def test_a_transparent_colour_is_laid_on_white(mode, colour, transparent):
    image = Image.new(mode, (4, 4), colour)
    if mode == "P":
        image.putpalette([0, 0, 0, 10, 20, 30])
    image.putpixel((1, 2), 0 if mode != "RGB" else (0, 0, 0))
    got = image_from_bytes(encoded(image, transparency=transparent), where="x")
    assert (got[2, 1] == 0).all() and (np.delete(got.reshape(16, 3), 9, axis=0) == 255).all()


def test_a_palette_gives_its_colours():
    image = Image.fromarray(RGB).quantize(16)
    np.testing.assert_array_equal(image_from_bytes(encoded(image), where="x"), np.array(image.convert("RGB")))


def test_cmyk_is_converted_without_a_profile():
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    np.testing.assert_allclose(
        image_from_bytes(encoded(image, "JPEG", quality=100), where="x"),
        np.broadcast_to([255, 0, 0], (8, 8, 3)),
        atol=2,
    )


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_exif_rotation_is_applied(orientation, kind):
    turned = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a),
    }[orientation]
    image = np.zeros((16, 32, 3), np.uint8)
    image[:8, :16] = 255  # top left is white
    exif = Image.Exif()
    exif[0x0112] = orientation
    got = image_from_bytes(encoded(Image.fromarray(image), kind, exif=exif), where="x")
    np.testing.assert_allclose(got, turned(image), atol=8)


def test_a_jpeg_with_more_images_behind_it_is_its_first():
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    got = image_from_bytes(encoded(first, "MPO", save_all=True, append_images=[second]), where="x")
    assert (got[..., 0] > 250).all() and (got[..., 2] < 5).all()


def test_arrays_that_are_no_images_are_refused():
    check_image(RGB, where="image")
    for bad, got in [
        (RGB.astype(np.float32), "float32[6,10,3]"),
        (RGB[..., 0], "uint8[6,10]"),
        (RGB[None], "uint8[1,6,10,3]"),
        ("x.png", "str[]"),
    ]:
        with pytest.raises(InputError) as caught:
            check_image(bad, where="image")
        assert got in str(caught.value)


def test_a_image_that_cannot_be_written_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="cannot be written"):
        write_image(tmp_path / "absent" / "x.png", RGB)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "PA", "RGBA", "LA", "CMYK", "YCbCr", "I;16", "I;16B"])
def test_an_image_that_is_converted_in_strips_is_the_whole_one_turned(mode, monkeypatch):
    rng = np.random.default_rng(0)
    if mode.startswith("I;16"):
        image = Image.frombytes(mode, (23, 17), rng.bytes(23 * 17 * 2))
    else:
        drawn = Image.fromarray(rng.integers(0, 256, (17, 23, 4), dtype=np.uint8), "RGBA")
        kept = drawn if mode in ("RGBA", "LA") else drawn.convert("RGB")
        image = kept.convert("P").convert("PA") if mode == "PA" else kept.convert(mode)
    whole = image_from_pillow(image, where="image")
    monkeypatch.setattr(image_io, "STRIP_PIXELS", 60)
    for orientation in range(1, 9):
        image.getexif()[0x0112] = orientation
        upright = Image.fromarray(whole)
        upright.getexif()[0x0112] = orientation
        turned = ImageOps.exif_transpose(upright)
        found = image_from_pillow(image, where="image")
        assert found.flags.c_contiguous
        np.testing.assert_array_equal(found, np.asarray(turned))


PEAK = """
import sys
from pathlib import Path
from types import SimpleNamespace
from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin
from engines.errors import InputError
from engines.inputs.image_io import read_image
from engines.inputs.preprocess import ask_inputs, edit_inputs
from tests.helpers.tiny_bundle import MODEL

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM:"))) * 1024

before = peak()
for prepare in (ask_inputs, edit_inputs):
    try:
        prepare(read_image(sys.argv[1]), MODEL)
    except InputError as error:
        print(error.what)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is not known")
@pytest.mark.parametrize(
    "kind, size, said",
    [
        ("JPEG", (9000, 7000), []),
        ("PNG", (30_000_000, 2), ["The image's aspect ratio is too large"] * 2),
        ("WEBP", (5100, 4000), ["This image is too large"] * 2),
    ],
)
def test_the_largest_images_take_their_pixels_and_little_more(tmp_path, kind, size, said):
    options = {"PNG": {"compress_level": 1}, "WEBP": {"method": 0}, "JPEG": {}}[kind]
    Image.new("RGB", size, "teal").save(tmp_path / "x", kind, **options)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path / "x"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    *told, grown = done.stdout.splitlines()
    limit = 3 * size[0] * size[1] + (tmp_path / "x").stat().st_size + (256 << 20)
    assert told == said and int(grown) < limit, f"{int(grown) >> 20} of {limit >> 20} MiB"
