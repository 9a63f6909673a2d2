"""The reference as the benchmark uses it: lists of prompts, images and questions, run by `reference.tasks`.

It uses the same random numbers as the runtime: image i of a list is drawn with those of seed + i.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ... import tasks
from ...gumbel import gumbel_noise
from ...model import Star
from .. import recipe
from ..checkpoint.tokens import Rows
from ..checkpoint.vision import MERGED_SIDE, embeds_of, prepared
from ..training.batches import MERGED_PATCHES
from .score import ANSWER_TOKENS

ROWS = 256  # images drawn together
SAMPLED = ("generate", "edit")  # tasks with their own sampling; `reason` draws like `generate`


@dataclass(frozen=True)
class Sampling:
    """How a task draws its images."""

    guidance: float = recipe.GUIDANCE
    top_k: int = recipe.TOP_K
    top_p: float = recipe.TOP_P


Drawn = tuple[np.ndarray, np.ndarray]  # the ids int64 [T] of an image, and the image


class Painter:
    """A STAR-Nano model that draws, edits, answers and reasons.

    Images are uint8 [64, 64, 3]. `sampling` holds one `Sampling` for each task of SAMPLED.
    """

    batch = 300

    def __init__(self, star: Star, rows: Rows, sampling: dict[str, Sampling]):
        self.star, self.rows, self.sampling = star, rows, sampling
        self.device = star.token_embedding.weight.device

    @classmethod
    def from_checkpoint(
        cls, root: Path, *, device: str = "cpu", sampling: dict[str, Sampling] | None = None
    ) -> Painter:
        from ...weights import load_star, resolve_checkpoint

        files = resolve_checkpoint(root)
        star = load_star(files, device=device)
        rows = Rows.from_file(files.qwen_folder / "tokenizer.json", star.config.special)
        return cls(star, rows, sampling or stored_sampling(root))

    def draw(self, prompts: Sequence[str], *, seed: int) -> list[np.ndarray]:
        """An image for each prompt."""
        return _images(self._drawn([self.rows.draw(prompt) for prompt in prompts], seed))

    def draw_ids(self, prompts: Sequence[str], *, seed: int) -> list[np.ndarray]:
        """The ids int64 [T] of an image for each prompt."""
        return [ids for ids, _ in self._drawn([self.rows.draw(prompt) for prompt in prompts], seed)]

    def reason(self, prompts: Sequence[str], *, seed: int) -> tuple[list[str], list[np.ndarray]]:
        """The base model's answer to each prompt, and an image of that answer, or of the prompt if the answer
        is empty."""
        answers = [self._answer(self.rows.question(prompt), None) for prompt in prompts]
        rows = [
            self.rows.draw(a, magic=True) if a else self.rows.draw(p)
            for p, a in zip(prompts, answers, strict=True)
        ]
        return answers, _images(self._drawn(rows, seed))

    def edit(self, images: Sequence[np.ndarray], texts: Sequence[str], *, seed: int) -> list[np.ndarray]:
        """Each image, changed by its instruction."""
        size = self.star.config.vq.image_tokens
        rows = [self.rows.edit(text, image_tokens=size, merged_patches=MERGED_PATCHES) for text in texts]
        return _images(self._drawn(rows, seed, images=images))

    @torch.no_grad()
    def ask(self, images: Sequence[np.ndarray], questions: Sequence[str]) -> list[str]:
        """The answer to each question about its image."""
        answers = []
        for image, question in zip(images, questions, strict=True):
            embeds = embeds_of(self.star.vision_encoder, prepared([image], sharp=False).to(self.device))[0]
            answers.append(self._answer(self.rows.ask(question, merged_patches=MERGED_PATCHES), embeds))
        return answers

    @torch.no_grad()
    def rebuild(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The images after the VQ model has encoded and decoded them."""
        parts = [self._image(images[i : i + ROWS]) for i in range(0, len(images), ROWS)]
        made = [self.star.vq_decoder(self.star.vq_encoder(part)) for part in parts]
        return images_of(torch.cat(made))

    def _answer(self, row: list[int], embeds: Tensor | None) -> str:
        ids = torch.tensor([row], device=self.device)
        positions = tasks.mrope_position_ids(ids[0], [(MERGED_SIDE, MERGED_SIDE)], self.star.config.special)
        answer = tasks.answer(self.star, ids, positions, embeds, max_new_tokens=ANSWER_TOKENS)
        return self.rows.text(answer.tolist())

    def _drawn(
        self, rows: list[list[int]], seed: int, *, images: Sequence[np.ndarray] | None = None
    ) -> list[Drawn]:
        """Ids and images in the order of the rows; rows of equal length are drawn together."""
        by_length: dict[int, list[int]] = defaultdict(list)
        for index, row in enumerate(rows):
            by_length[len(row)].append(index)
        made: dict[int, Drawn] = {}
        for indices in by_length.values():
            for at in range(0, len(indices), ROWS):
                part = indices[at : at + ROWS]
                chosen = None if images is None else [images[i] for i in part]
                drawn = self._draw_equal([rows[i] for i in part], [seed + i for i in part], chosen)
                made |= zip(part, drawn, strict=True)
        return [made[index] for index in range(len(rows))]

    @torch.no_grad()
    def _draw_equal(
        self, rows: list[list[int]], seeds: list[int], images: Sequence[np.ndarray] | None
    ) -> list[Drawn]:
        """Ids and images of rows of equal length."""
        star, special = self.star, self.star.config.special
        pairs = [row for cond in rows for row in (cond, self.rows.unconditional(cond))]
        ids = torch.tensor(pairs, device=self.device)
        embeds, positions, count = None, None, star.config.vq.image_tokens
        if images is not None:
            seen = embeds_of(star.vision_encoder, prepared(images, sharp=True).to(self.device))  # [N, 16, H]
            tokens = star.image_embedding(star.vq_encoder(self._image(images)))  # [N, T, H]
            embeds = star.token_embedding(ids)
            for placeholder, values in ((special.vision_pad, tokens), (special.image_pad, seen)):
                embeds[ids == placeholder] = values.repeat_interleave(2, dim=0).flatten(0, 1)
            grid = [(MERGED_SIDE, MERGED_SIDE)]
            positions = tasks.mrope_position_ids(ids[0], grid, special, trailing=count)
        s = self.sampling["generate" if images is None else "edit"]
        made = tasks.generate(
            star,
            ids,
            guidance=s.guidance,
            top_k=s.top_k,
            top_p=s.top_p,
            inputs_embeds=embeds,
            position_ids=positions,
            noise=lambda step: gumbel_noise(seeds, step, star.config.vq.codebook_size).to(self.device),
        )
        return list(zip(made.image_ids.cpu().numpy(), images_of(made.image), strict=True))

    def _image(self, images: Sequence[np.ndarray]) -> Tensor:
        """Images as the VQ encoder takes them, [N, 3, 64, 64] in [-1, 1]."""
        return torch.from_numpy(np.stack(images)).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1


def _images(drawn: list[Drawn]) -> list[np.ndarray]:
    return [image for _, image in drawn]


def images_of(image: Tensor) -> list[np.ndarray]:
    """Decoded images [N, 3, 64, 64] as bytes, clipped and truncated as in the release (docs/star.md 3.3)."""
    levels = ((image + 1) / 2 * 255).clamp(0, 255).to(torch.uint8)
    return list(levels.permute(0, 2, 3, 1).cpu().contiguous().numpy())


def stored_sampling(root: Path) -> dict[str, Sampling]:
    """The sampling of each task, from a checkpoint's `sampling.json` or else the release's defaults.

    Raises ValueError if the file names other tasks.
    """
    import json

    path = root / "sampling.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    if strange := sorted(set(stored) - set(SAMPLED)):
        raise ValueError(
            f"{path}: expected only {' and '.join(SAMPLED)}, got {', '.join(strange)}; "
            "remove the file and run the sweep again with --choose"
        )
    return {task: Sampling(**stored.get(task, {})) for task in SAMPLED}
