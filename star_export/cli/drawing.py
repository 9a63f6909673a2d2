"""The verbs that run a model on a prompt: `generate`, `edit` and `ask`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .outputs import Outcome, check_files, write_ids
from .progress_bar import ProgressBar

if TYPE_CHECKING:
    from engines import Images, Star


def generate(
    bundle: str,
    prompt: str,
    *,
    output: str,
    cfg: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 100,
    num_images: int = 1,
    greedy: bool = False,
    window: int | None = None,
    reason: bool = False,
    max_new_tokens: int = 256,
    save_ids: str | None = None,
    memory: int | None = None,
    backend: str = "onnxruntime",
    progress: bool = True,
) -> Outcome:
    """Draw with `engines.runtime.star.Star.generate`. N images become F.png, F-1.png, F-2.png, ..."""
    first = Path(output)
    names = [first, *(first.with_name(f"{first.stem}-{i}{first.suffix}") for i in range(1, num_images))]
    check_files(output, save_ids)
    with open_star(bundle, backend, memory, window) as star, ProgressBar("generate", shown=progress) as bar:
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
            progress=bar,
        )
    return _written(names, drawn, save_ids)


def edit(
    bundle: str,
    image: str,
    instruction: str,
    *,
    output: str,
    cfg: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 100,
    greedy: bool = False,
    window: int | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    save_ids: str | None = None,
    memory: int | None = None,
    backend: str = "onnxruntime",
    progress: bool = True,
) -> Outcome:
    """Edit an image with `engines.runtime.star.Star.edit`."""
    check_files(output, save_ids)
    with open_star(bundle, backend, memory, window) as star, ProgressBar("edit", shown=progress) as bar:
        drawn = star.edit(
            image,
            instruction,
            cfg=cfg,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            greedy=greedy,
            progress=bar,
            **_pixel_limits(min_pixels, max_pixels),
        )
    return _written([Path(output)], drawn, save_ids)


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
    memory: int | None = None,
    backend: str = "onnxruntime",
    progress: bool = True,
) -> Outcome:
    """Answer a question about an image with `engines.runtime.star.Star.ask`, which is always greedy."""
    check_files(save_ids)
    with open_star(bundle, backend, memory) as star, ProgressBar("ask", shown=progress) as bar:
        limits = _pixel_limits(min_pixels, max_pixels)
        answer = star.ask(image, question, max_new_tokens=max_new_tokens, progress=bar, **limits)
    write_ids(save_ids, answer.ids)
    return Outcome({"answer": answer.text, "ids": answer.ids.tolist()}, answer.text)


def open_star(bundle: str, backend: str, memory: int | None = None, window: int | None = None) -> Star:
    """Open `bundle` on `backend`, within a budget of `memory` bytes if one is given, to draw `window` tokens
    per forward."""
    from engines.runtime.star import Star

    return Star(bundle, backend=backend, memory=memory, window=window)


def _pixel_limits(min_pixels: int | None, max_pixels: int | None) -> dict[str, Any]:
    """The limits that were given; the runtime knows the defaults."""
    limits = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    return {name: value for name, value in limits.items() if value is not None}


def _written(names: list[Path], drawn: Images, ids_file: str | None) -> Outcome:
    from engines.inputs.image_io import write_png

    for name, image in zip(names, drawn.images, strict=True):
        write_png(name, image)
    write_ids(ids_file, drawn.image_ids)
    data = {"images": [str(name) for name in names], "image_ids": drawn.image_ids.tolist()}
    text = "\n".join(str(name) for name in names)
    if drawn.answer is not None:
        data, text = data | {"answer": drawn.answer}, f"{drawn.answer}\n{text}"
    return Outcome(data, text)
