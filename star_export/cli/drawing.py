"""The verbs that run a model on a prompt: `generate`, `edit` and `ask`."""

from __future__ import annotations

import itertools
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.bundle.typed_paths import output_file, shown
from engines.errors import UsageError

from .outputs import Outcome, write_ids
from .painting import painting_from_options
from .progress_bar import ProgressBar

if TYPE_CHECKING:
    import numpy as np

    from engines import Images, Star

NAME_CHARACTERS = 40  # of the text of a request, in the name of its image


def generate(
    bundle: str,
    prompt: str,
    *,
    output: str | None = None,
    force: bool = False,
    cfg: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 100,
    num_images: int = 1,
    greedy: bool = False,
    window: int | None = None,
    reason: bool = False,
    max_new_tokens: int = 256,
    decoder: str = "vq",
    resolution: int | None = None,
    steps: int | None = None,
    text_guidance: float | None = None,
    image_guidance: float | None = None,
    noise: str | None = None,
    latents: str | None = None,
    previews: str | None = None,
    save_ids: str | None = None,
    memory: int | None = None,
    backend: str = "onnxruntime",
    threads: int | None = None,
    progress: bool = True,
) -> Outcome:
    """Draw with `engines.runtime.star.Star.generate`. N images become F.png, F-1.png, F-2.png, ...

    The options from `decoder` to `previews` are those of the diffusion decoder (`painting.py`).
    Raises UsageError where a file is there already, without `force`.
    """
    names = _outputs(output or _new_name(prompt, seed), num_images, force=force)
    ids = _ids_file(save_ids, force=force)
    painting = painting_from_options(
        decoder,
        force=force,
        resolution=resolution,
        steps=steps,
        text_guidance=text_guidance,
        image_guidance=image_guidance,
        noise=noise,
        latents=latents,
        previews=previews,
    )
    with (
        open_star(bundle, backend, memory=memory, window=window, threads=threads) as star,
        ProgressBar("generate", shown=progress) as bar,
    ):
        drawn = star.generate(
            prompt,
            cfg=cfg,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            num_images=num_images,
            greedy=greedy,
            reason=reason,
            max_new_tokens=max_new_tokens,
            painting=painting,
            progress=bar,
        )
    return _written(names, drawn, ids)


def edit(
    bundle: str,
    image: str,
    instruction: str,
    *,
    output: str | None = None,
    force: bool = False,
    cfg: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 100,
    greedy: bool = False,
    window: int | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    decoder: str = "vq",
    resolution: int | None = None,
    steps: int | None = None,
    text_guidance: float | None = None,
    image_guidance: float | None = None,
    vq_guidance: float | None = None,
    noise: str | None = None,
    latents: str | None = None,
    previews: str | None = None,
    save_ids: str | None = None,
    memory: int | None = None,
    backend: str = "onnxruntime",
    threads: int | None = None,
    progress: bool = True,
) -> Outcome:
    """Edit an image with `engines.runtime.star.Star.edit`."""
    names = _outputs(output or _new_name(instruction, seed), force=force)
    ids = _ids_file(save_ids, force=force)
    painting = painting_from_options(
        decoder,
        force=force,
        resolution=resolution,
        steps=steps,
        text_guidance=text_guidance,
        image_guidance=image_guidance,
        vq_guidance=vq_guidance,
        noise=noise,
        latents=latents,
        previews=previews,
    )
    with (
        open_star(bundle, backend, memory=memory, window=window, threads=threads) as star,
        ProgressBar("edit", shown=progress) as bar,
    ):
        drawn = star.edit(
            _given_image(image),
            instruction,
            cfg=cfg,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            greedy=greedy,
            progress=bar,
            painting=painting,
            **_pixel_limits(min_pixels, max_pixels),
        )
    return _written(names, drawn, ids)


def ask(
    bundle: str,
    image: str,
    question: str,
    *,
    max_new_tokens: int = 256,
    greedy: bool = True,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    save_ids: str | None = None,
    force: bool = False,
    memory: int | None = None,
    backend: str = "onnxruntime",
    threads: int | None = None,
    progress: bool = True,
) -> Outcome:
    """Answer a question about an image with `engines.runtime.star.Star.ask`, which is always greedy."""
    ids = _ids_file(save_ids, force=force)
    with (
        open_star(bundle, backend, memory=memory, threads=threads) as star,
        ProgressBar("ask", shown=progress) as bar,
    ):
        limits = _pixel_limits(min_pixels, max_pixels)
        answer = star.ask(
            _given_image(image), question, max_new_tokens=max_new_tokens, progress=bar, **limits
        )
    write_ids(ids, answer.ids)
    return Outcome({"answer": answer.text, "ids": answer.ids.tolist()}, answer.text)


def open_star(bundle: str, backend: str, **options: int | None) -> Star:
    """Open `bundle` on `backend` with the options of `engines.runtime.star.Star`."""
    from engines.runtime.star import Star

    return Star(bundle, backend=backend, **options)


def _pixel_limits(min_pixels: int | None, max_pixels: int | None) -> dict[str, Any]:
    """The limits that were given; the runtime knows the defaults."""
    limits = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    return {name: value for name, value in limits.items() if value is not None}


def _given_image(image: str) -> str | np.ndarray:
    """The file of an image, or the image itself that stdin has, for `-`."""
    if image != "-":
        return image
    from engines.inputs.image_io import FILE_LIMIT_BYTES, image_from_bytes

    return image_from_bytes(sys.stdin.buffer.read(FILE_LIMIT_BYTES), where="stdin")


def _new_name(text: str, seed: int) -> str:
    """A name in this folder that nothing has: the first letters and digits of `text`, and the seed."""
    words = re.sub(r"[\W_]+", "-", text).strip("-").lower()[:NAME_CHARACTERS].strip("-") or "image"
    names = (
        f"{words}-{seed}{more}.png" for more in itertools.chain([""], (f"-{i}" for i in itertools.count(2)))
    )
    return next(name for name in names if not os.path.lexists(name))


def _outputs(name: str, number: int = 1, *, force: bool) -> dict[Path, Path]:
    """F.png, F-1.png, F-2.png, ... for F.png, each with the file that it names, checked before any work.

    Of no more than the runtime draws, which refuses a larger number.
    """
    from engines.runtime.settings import IMAGES_LIMIT

    first, count = Path(name), min(number, IMAGES_LIMIT)
    names = [first, *(first.with_name(f"{first.stem}-{i}{first.suffix}") for i in range(1, count))]
    return {name: _free(output_file(name), force=force) for name in names}


def _ids_file(name: str | None, *, force: bool) -> Path | None:
    return None if name is None else _free(output_file(name), force=force)


def _free(file: Path, *, force: bool) -> Path:
    """Raise UsageError if there is such a file already, unless it may be replaced."""
    if file.exists() and not force:
        raise UsageError(
            "This file is there already",
            where=f"{shown(file)}: expected a new name",
            fix="choose another name, or replace it with --force",
        )
    return file


def _written(names: dict[Path, Path], drawn: Images, ids_file: Path | None) -> Outcome:
    from engines.inputs.image_io import write_image

    for file, image in zip(names.values(), drawn.images, strict=True):
        write_image(file, image)
    write_ids(ids_file, drawn.image_ids)
    data = {"images": [str(name) for name in names], "image_ids": drawn.image_ids.tolist()}
    text = "\n".join(str(name) for name in names)
    if drawn.cut_tokens:
        data["cut_tokens"] = drawn.cut_tokens
        text += f"\nthe diffusion decoder did not read the last {drawn.cut_tokens} tokens of the prompt"
    if drawn.answer is not None:
        data, text = data | {"answer": drawn.answer}, f"{drawn.answer}\n{text}"
    return Outcome(data, text)
