"""Converting images to the encoders' inputs, and the VQ decoder's output to images. No file access.

Sources: transformers 4.51.0 `Qwen2VLImageProcessor` (the slow processor) and
`Qwen2_5_VisionTransformer.rot_pos_emb`; qwen-vl-utils `fetch_image`; docs/star.md 3.2 (`ask` resizes twice)
and 3.6 (`edit` uses two encoders).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..bundle.bfloat16 import bf16_rounded
from ..bundle.manifest import ModelSpec, VisionSpec
from ..errors import ParityError, UsageError
from .image_io import STRIP_PIXELS, check_aspect
from .prompt import check_length

MIN_PIXELS = 28 * 28 * 16  # the release's default limits of the vision encoder's input
MAX_PIXELS = 28 * 28 * 576
ASK_MIN_PIXELS = 4 * 28 * 28  # the limits of the first of the two resizes of `ask`
ASK_MAX_PIXELS = 16384 * 28 * 28
LARGE_PIXELS = 16_000_000  # an image that is resized in strips
ROPE_THETA = 10_000.0


@dataclass(frozen=True)
class VisionInputs:
    """Inputs of `vision_encoder`: pixel_values [P, 1176], rotary_cos and rotary_sin [P, head_dim/2],
    window_ids [P].

    `grid_h` and `grid_w` count merged patches: the encoder returns grid_h * grid_w embeddings, row by row.
    """

    pixel_values: np.ndarray
    rotary_cos: np.ndarray
    rotary_sin: np.ndarray
    window_ids: np.ndarray
    grid_h: int
    grid_w: int

    def feeds(self) -> dict[str, np.ndarray]:
        """The four arrays by input name."""
        names = ("pixel_values", "rotary_cos", "rotary_sin", "window_ids")
        return {name: getattr(self, name) for name in names}


def ask_inputs(
    image: np.ndarray, model: ModelSpec, *, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS
) -> VisionInputs:
    """Prepare an image, uint8 [H, W, 3], for a question.

    The image is resized within wide limits first, then within the encoder's. Raises InputError.
    """
    factor = _factor(model.vision)
    check_pixel_limits(min_pixels=min_pixels, max_pixels=max_pixels, factor=factor)
    height, width = smart_size(
        *image.shape[:2], factor=factor, min_pixels=ASK_MIN_PIXELS, max_pixels=ASK_MAX_PIXELS
    )
    resized = _resized(image, height, width, "BICUBIC")
    return vision_inputs(resized, model, min_pixels=min_pixels, max_pixels=max_pixels)


def edit_inputs(
    image: np.ndarray, model: ModelSpec, *, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS
) -> tuple[VisionInputs, np.ndarray]:
    """Prepare an image, uint8 [H, W, 3], for an edit.

    Returns the inputs of `vision_encoder`, and the image resized to a square for `vq_encoder`: float32
    [1, 3, R, R] in [-1, 1]. Raises InputError.
    """
    check_pixel_limits(min_pixels=min_pixels, max_pixels=max_pixels, factor=_factor(model.vision))
    check_aspect(*image.shape[:2])
    image = _at_least(image, _factor(model.vision))
    square = _resized(image, model.image_size, model.image_size, "BILINEAR")
    half = np.float32(0.5)
    square = (square.astype(np.float32) / np.float32(255) - half) / half  # torchvision's order of rounding
    vision = vision_inputs(image, model, min_pixels=min_pixels, max_pixels=max_pixels)
    return vision, np.ascontiguousarray(square.transpose(2, 0, 1)[None])


def vision_inputs(image: np.ndarray, model: ModelSpec, *, min_pixels: int, max_pixels: int) -> VisionInputs:
    """Resize an image, uint8 [H, W, 3], to multiples of patch x merge and cut it into patches.

    Raises InputError, also for more patches than a prompt can hold.
    """
    vision = model.vision
    height, width = smart_size(
        *image.shape[:2], factor=_factor(vision), min_pixels=min_pixels, max_pixels=max_pixels
    )
    tokens = height * width // _factor(vision) ** 2
    check_length(text=0, image=tokens, new=0, limit_tokens=model.max_positions)
    pixels = patches_from_image(_resized(image, height, width, "BICUBIC"), vision)
    grid_h, grid_w = height // vision.patch_size, width // vision.patch_size
    rows, columns = patch_coordinates(vision, grid_h=grid_h, grid_w=grid_w)
    side = vision.window_size // vision.patch_size  # of a window, in patches
    windows = rows // side * -(-grid_w // side) + columns // side
    return VisionInputs(
        pixels,
        *rotary_cos_sin(vision, rows, columns, rope_bf16=model.rope_bf16),
        windows,
        grid_h=height // _factor(vision),
        grid_w=width // _factor(vision),
    )


def smart_size(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The nearest (height, width) in multiples of `factor` whose area is within the limits.

    Raises InputError.
    """
    check_aspect(height, width)
    h, w = max(factor, round(height / factor) * factor), max(factor, round(width / factor) * factor)
    if h * w > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        h, w = (max(factor, math.floor(side / beta / factor) * factor) for side in (height, width))
    elif h * w < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        h, w = (math.ceil(side * beta / factor) * factor for side in (height, width))
    return h, w


def patches_from_image(image: np.ndarray, vision: VisionSpec) -> np.ndarray:
    """Normalise and cut an image: uint8 [H, W, 3] -> float32 [P, 3 * temporal * patch * patch].

    The merge x merge patches that the encoder merges are consecutive.
    """
    patch, merge, (height, width, _) = vision.patch_size, vision.spatial_merge_size, image.shape
    scaled = (image * (1 / 255)).astype(np.float32)  # in float64 first, as in the release
    normal = (scaled - np.array(vision.image_mean, np.float32)) / np.array(vision.image_std, np.float32)
    blocks = normal.transpose(2, 0, 1).reshape(
        3, height // patch // merge, merge, patch, width // patch // merge, merge, patch
    )
    blocks = blocks.transpose(1, 4, 2, 5, 0, 3, 6)  # [gh, gw, merge, merge, 3, patch, patch]
    frames = np.repeat(blocks[..., None, :, :], vision.temporal_patch_size, axis=-3)  # a still image
    return frames.reshape(-1, 3 * vision.temporal_patch_size * patch * patch)


def patch_coordinates(vision: VisionSpec, *, grid_h: int, grid_w: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of every patch in the order of `patches_from_image`: two arrays int64 [P].

    `grid_h` and `grid_w` are in patches.
    """
    merge = vision.spatial_merge_size
    index = np.indices((grid_h, grid_w)).reshape(2, grid_h // merge, merge, grid_w // merge, merge)
    rows, columns = index.transpose(0, 1, 3, 2, 4).reshape(2, -1)
    return rows, columns


def rotary_angles(
    vision: VisionSpec, rows: np.ndarray, columns: np.ndarray, *, rope_bf16: bool
) -> np.ndarray:
    """Rotary angles of every patch, float32 [P, head_dim/2]: head_dim/4 for its row, then for its column.

    `rope_bf16` rounds frequencies, positions and their products to bfloat16, as the release does
    (docs/star.md 1.1).
    """
    dims = vision.head_dim // 2
    exponents = np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims)
    frequencies = np.float32(1) / np.power(np.float32(ROPE_THETA), exponents)
    rounded = bf16_rounded if rope_bf16 else np.asarray
    angles = [
        rounded(rounded(axis.astype(np.float32))[:, None] * rounded(frequencies)) for axis in (rows, columns)
    ]
    return np.concatenate(angles, axis=1, dtype=np.float32)


def rotary_cos_sin(
    vision: VisionSpec, rows: np.ndarray, columns: np.ndarray, *, rope_bf16: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of `rotary_angles`: two arrays float32 [P, head_dim/2].

    `rope_bf16` rounds them to bfloat16, too.
    """
    angles = rotary_angles(vision, rows, columns, rope_bf16=rope_bf16).astype(np.float64)
    cos, sin = (f(angles).astype(np.float32) for f in (np.cos, np.sin))
    return (bf16_rounded(cos), bf16_rounded(sin)) if rope_bf16 else (cos, sin)


def images_from_decoded(image: np.ndarray) -> np.ndarray:
    """Convert the output of `vq_decoder`, float32 [N, 3, R, R] around [-1, 1], to uint8 [N, R, R, 3].

    Values are clipped and truncated as in the release. Raises ParityError when a value is not finite.
    """
    if not np.isfinite(image).all():
        raise ParityError(
            "The decoded image has non-finite values",
            where=f"vq_decoder: expected finite values, got {np.sum(~np.isfinite(image))} that are not",
            fix="validate the bundle on this device: star-export validate BUNDLE",
        )
    return np.ascontiguousarray(np.clip((image + 1) / 2 * 255, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1))


def check_pixel_limits(*, min_pixels: int, max_pixels: int, factor: int) -> None:
    """Raise UsageError for limits that no image can meet."""
    if not (factor * factor <= max_pixels and 1 <= min_pixels <= max_pixels):
        raise UsageError(
            "These pixel limits cannot be met",
            where=f"expected 1 <= min_pixels <= max_pixels and max_pixels >= {factor * factor}, "
            f"got {min_pixels} and {max_pixels}",
            fix="omit both options to use the defaults",
        )


def _factor(vision: VisionSpec) -> int:
    return vision.patch_size * vision.spatial_merge_size


def _at_least(image: np.ndarray, side: int) -> np.ndarray:
    height, width = image.shape[:2]
    if min(height, width) >= side:
        return image
    scale = max(side / height, side / width)
    return _resized(image, int(height * scale), int(width * scale), "LANCZOS")


def _resized(image: np.ndarray, height: int, width: int, filter_name: str) -> np.ndarray:
    """Resize an image with Pillow.

    A large one is never copied whole: it is resized across in strips of rows, and then down, as Pillow does
    itself except where that takes longer. Then a value may be rounded otherwise.
    """
    from PIL import Image

    resampling, (old_height, old_width, _) = Image.Resampling[filter_name], image.shape
    if old_height * old_width <= LARGE_PIXELS:
        return np.asarray(Image.fromarray(image).resize((width, height), resampling))
    across = Image.new("RGB", (width, old_height))
    rows = max(1, STRIP_PIXELS // old_width)
    for top in range(0, old_height, rows):
        strip = Image.fromarray(image[top : top + rows])
        across.paste(strip.resize((width, strip.height), resampling), (0, top))
    return np.asarray(across.resize((width, height), resampling))
