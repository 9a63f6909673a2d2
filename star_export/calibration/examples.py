"""What a model is calibrated on: its own images and answers, with every position that it decoded.

Prompts are drawn with guidance, so both rows of a pair are there. The images are then edited and asked about.
The model decodes with the weights of the checkpoint; a large one reads them from the file for each forward,
so several tokens are drawn per forward (`engines.runtime.windows`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from engines.bundle.files import reason
from engines.bundle.manifest import ModelSpec, SamplingSpec
from engines.errors import InputError
from engines.inputs.image_io import read_image
from engines.inputs.preprocess import VisionInputs, ask_inputs, edit_inputs, images_from_decoded
from engines.inputs.prompt import Chat, Prompt
from engines.progress import Progress, silent
from engines.runtime.gumbel import Noise
from engines.runtime.windows import Windows
from reference import tasks

from ..golden.oracle import resident
from ..graph.wrappers import FoldedStar

SEED = 271828
WINDOW = 16  # tokens per forward
ANSWER_TOKENS = 32
RESIDENT_NUMBERS = 1 << 28  # a model of fewer weights is held in memory while it decodes
PROMPTS = "prompts.txt"  # in a folder of calibration, one prompt per line
SUFFIXES = (".png", ".jpg", ".jpeg")
QUESTION = "Describe this image."
SHIPPED = Path(__file__).parent / PROMPTS


@dataclass(frozen=True)
class Material:
    """Texts and images: prompts to draw, instructions to edit by, questions, and images uint8 [H, W, 3].

    Without images, those that are drawn first are edited and asked about.
    """

    prompts: tuple[str, ...]
    edits: tuple[str, ...]
    questions: tuple[str, ...]
    images: tuple[np.ndarray, ...] = ()


@dataclass(frozen=True)
class Example:
    """What a decode fed the base decoder: embeds float32 [B, L, H] at positions int64 [3, B, L].

    An `image` goes on through the stacked decoder. Behind layers that were rounded, `exact` is what `embeds`
    would be without any rounding.
    """

    embeds: Tensor
    positions: Tensor
    image: bool
    exact: Tensor | None = None


def read_material(folder: Path | None, shipped: Path, count: int, *, fewer: bool = False) -> Material:
    """The first `count` prompts of `folder`, or else of the file `shipped`, and the images of `folder`.

    A line `edit: TEXT` is an instruction, and `ask: TEXT` a question; at most a quarter as many of each are
    taken. With `fewer`, a file of fewer prompts will do. Raises InputError for one otherwise, and for a
    folder or file with nothing to use.
    """
    quarter = max(1, count // 4)
    images = _images(folder, quarter) if folder else ()
    file = folder / PROMPTS if folder and (folder / PROMPTS).is_file() else shipped
    try:
        if not file.is_file():  # a pipe would never end
            raise FileNotFoundError("no file of this name")
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeError) as error:
        raise InputError(
            "The prompts of the calibration cannot be read",
            where=f"{file}: expected a text file in UTF-8, got {type(error).__name__}: {error}",
            fix="write one prompt per line",
        ) from None
    kinds: dict[str, list[str]] = {"draw": [], "edit": [], "ask": []}
    for line in lines:
        kind, colon, text = line.partition(":")
        if not colon or kind not in kinds:
            kinds["draw"].append(line)
        elif text.strip():
            kinds[kind].append(text.strip())
    if not kinds["draw"]:
        raise InputError(
            "The calibration has no prompts",
            where=f"{file}: expected at least one line with a prompt to draw, got {len(lines)} lines",
            fix="write one prompt per line",
        )
    if len(kinds["draw"]) < count and not fewer:
        raise InputError(
            "The calibration has fewer prompts than it is to draw",
            where=f"{file}: expected {count} prompts to draw, got {len(kinds['draw'])}",
            fix=f"calibrate with {len(kinds['draw'])} prompts or fewer, or add prompts, one per line",
        )
    return Material(
        prompts=tuple(kinds["draw"][:count]),
        edits=tuple(kinds["edit"][:quarter]),
        questions=tuple(kinds["ask"][:quarter] or [QUESTION]),
        images=images,
    )


def _images(folder: Path, count: int) -> tuple[np.ndarray, ...]:
    try:
        found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
        usable = found or (folder / PROMPTS).is_file()
    except OSError as error:
        raise InputError(
            "The folder of the calibration cannot be read",
            where=f"{folder}: expected a folder with {PROMPTS} or images, got: {reason(error)}",
            fix="check the spelling, or omit it to use the shipped prompts",
        ) from None
    if not usable:
        raise InputError(
            "The folder of the calibration holds nothing to use",
            where=f"{folder}: expected {PROMPTS}, or images ({', '.join(SUFFIXES)}), got neither",
            fix="add images, or prompts, one per line",
        )
    return tuple(read_image(path) for path in found[:count])


def decoded(
    star: FoldedStar,
    chat: Chat,
    model: ModelSpec,
    material: Material,
    sampling: SamplingSpec,
    progress: Progress = silent,
) -> list[Example]:
    """Let `star` decode what `material` asks for, and return what its decoders were fed.

    Raises InputError, before anything is drawn, for an image that the model does not take.
    """
    for image in material.images:
        edit_inputs(image, model)
    numbers = sum(parameter.numel() for parameter in star.parameters())
    with (
        torch.inference_mode(),
        resident(star) if numbers < RESIDENT_NUMBERS else contextlib.nullcontext(),
    ):
        prompts = [chat.generate_prompt(text, num_images=1) for text in material.prompts]
        drawn = [_Fed(star.token_embedding(_tensor(p.input_ids)), _tensor(p.position_ids)) for p in prompts]
        ids = draw(star, drawn, sampling, progress=progress)
        examples = [_with_image(star, fed, row) for fed, row in zip(drawn, ids, strict=True)]
        images = list(material.images)
        if not images:
            count = max(len(material.edits), len(material.questions))
            images = [
                images_from_decoded(star.vq_decoder(ids[i : i + 1]).numpy())[0]
                for i in range(min(count, len(ids)))
            ]
        edits = []
        for i, text in enumerate(material.edits):
            vision, square = edit_inputs(images[i % len(images)], model)
            prompt = chat.edit_prompt(text, grid_h=vision.grid_h, grid_w=vision.grid_w)
            embeds = _embedded(star, prompt, vision)
            image_ids = star.vq_encoder(torch.from_numpy(square))[0]
            embeds[:, prompt.vq_tokens] = star.image_embedding(image_ids)
            edits.append(_Fed(embeds, _tensor(prompt.position_ids)))
        if edits:
            ids = draw(star, edits, sampling, progress=progress)
            examples += [_with_image(star, fed, row) for fed, row in zip(edits, ids, strict=True)]
        for i, question in enumerate(material.questions):
            vision = ask_inputs(images[i % len(images)], model)
            prompt = chat.ask_prompt(question, grid_h=vision.grid_h, grid_w=vision.grid_w)
            progress("answer for calibration", i, len(material.questions))
            examples.append(_answered(star, _embedded(star, prompt, vision), prompt))
    return examples


@dataclass(frozen=True)
class _Fed:
    """A prompt: embeds [2, L, H] and positions [3, 2, L]."""

    embeds: Tensor
    positions: Tensor


def draw(
    star: FoldedStar, prompts: Sequence[_Fed], sampling: SamplingSpec, *, progress: Progress = silent
) -> Tensor:
    """Draw an image for each prompt, all in one batch: ids int64 [N, T].

    Shorter prompts are followed by slots that hold garbage, which the image overwrites before it sees them.
    """
    lengths = torch.tensor([fed.embeds.shape[1] for fed in prompts])
    tokens, longest = star.config.vq.image_tokens, int(lengths.max())
    short = [(fed, longest - fed.embeds.shape[1]) for fed in prompts]
    embeds = torch.cat([pad(fed.embeds, (0, 0, 0, by)) for fed, by in short])
    positions = torch.cat([pad(fed.positions, (0, by)) for fed, by in short], dim=1)
    rows = lengths.repeat_interleave(2)
    caches = tasks.new_caches(star, len(rows), capacity_tokens=longest + tokens)
    next_position = torch.tensor([int(fed.positions.max()) + 1 for fed in prompts]).repeat_interleave(2)
    _, hidden = tasks.both_decoders(star, embeds, positions, 0, caches)
    noise = Noise(SEED, images=len(prompts), window=1, size=star.config.vq.codebook_size)
    last = hidden[torch.arange(len(rows)), rows - 1][:, None]
    first = _sampled(star, last, sampling, noise.at(np.zeros(len(prompts), np.int64)))[:, 0]
    windows = Windows(first.numpy(), tokens=tokens, window=WINDOW)
    noise = Noise(SEED, images=len(prompts), window=windows.window, size=star.config.vq.codebook_size)
    while not windows.done:
        progress("draw for calibration, in tokens", int(windows.known.min()), tokens)
        starts = torch.from_numpy(windows.starts).repeat_interleave(2)
        fed = star.image_embedding(torch.from_numpy(windows.fed())).repeat_interleave(2, dim=0)
        at = (next_position + starts)[:, None] + torch.arange(windows.window)
        hidden = fed
        for decoder, cache in zip((star.base_ar, star.stacked_ar), caches, strict=True):
            hidden = decoder(hidden, at.expand(3, -1, -1), rows + starts, cache)[0]
        windows.advance(_sampled(star, hidden, sampling, noise.at(windows.starts + 1)).numpy())
    return torch.from_numpy(windows.ids)


def _sampled(star: FoldedStar, hidden: Tensor, sampling: SamplingSpec, noise: np.ndarray) -> Tensor:
    """hidden [2N, W, H], noise [N, W, V] -> ids [N, W]."""
    guided = tasks.guide(star.image_head(hidden).float(), sampling.guidance)
    ids = tasks.sample(
        guided.flatten(0, 1),
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        noise=torch.from_numpy(noise).flatten(0, 1),
    )
    return ids.unflatten(0, guided.shape[:2])


def _with_image(star: FoldedStar, fed: _Fed, ids: Tensor) -> Example:
    """The prompt and all but the last of the image's tokens, which is fed to nothing."""
    image = star.image_embedding(ids[:-1]).expand(2, -1, -1)
    after = int(fed.positions.max()) + 1 + torch.arange(image.shape[1]).expand(3, 2, -1)
    return Example(torch.cat([fed.embeds, image], 1), torch.cat([fed.positions, after], 2), image=True)


def _answered(star: FoldedStar, embeds: Tensor, prompt: Prompt) -> Example:
    """A question about an image, and the answer that the base decoder gives, greedily."""
    positions, limit = _tensor(prompt.position_ids), embeds.shape[1] + ANSWER_TOKENS
    cache, fed, first = star.base_ar.new_cache(1, capacity_tokens=limit), embeds, 0
    for _ in range(ANSWER_TOKENS):
        hidden = tasks.decode(star.base_ar, fed, positions[:, :, first:], first, cache)
        word = star.text_head(hidden[:, -1:])[0, 0].argmax()
        if int(word) in star.config.eos_token_ids:
            break
        first, fed = embeds.shape[1], star.token_embedding(word.view(1, 1))
        embeds = torch.cat([embeds, fed], 1)
        positions = torch.cat([positions, positions.amax() + torch.ones_like(positions[:, :, :1])], 2)
    return Example(embeds, positions[:, :, : embeds.shape[1]], image=False)


def _embedded(star: FoldedStar, prompt: Prompt, vision: VisionInputs) -> Tensor:
    """The embeddings of a prompt with an image: [B, L, H]."""
    embeds = star.token_embedding(_tensor(prompt.input_ids))
    given = [torch.from_numpy(array) for array in vision.feeds().values()]
    embeds[:, prompt.vision_tokens] = star.vision_encoder(*given)
    return embeds


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
