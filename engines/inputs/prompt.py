"""Prompts: the token ids and positions that each task feeds the decoder.

This module applies the bundle's tokenizer and chat template and the rules of docs/star.md 3.2 to 3.6. It
knows nothing of sessions, and only the grid size of images. Rows alternate: conditional, unconditional,
conditional, ...
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..bundle.files import text_from_bytes
from ..bundle.manifest import ModelSpec
from ..bundle.reader import Bundle
from ..bundle.tensors import check_array
from ..errors import InputError, listed
from .template import template_from_source
from .tokenizer import ids_from_text, special_tokens, tokenizer_from_json

MAGIC_SUFFIX = " Ultra HD, 4K, cinematic composition"  # appended to the reasoned answer; official model.py
TEXT_LIMIT_BYTES = 16 << 20
SPECIAL_TOKENS = ("im_start", "im_end", "vision_start", "vision_end", "vision_pad", "image_pad", "fim_pad")


@dataclass(frozen=True)
class Prompt:
    """The decoder's input for a task.

    `input_ids` is int64 [B, L], with placeholders for images, and `position_ids` int64 [3, B, L]. The slices
    of L in `vq_tokens` (T tokens) and `vision_tokens` (one token per merged patch) are replaced by the
    encoders' rows.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    vq_tokens: slice | None = None
    vision_tokens: slice | None = None

    @classmethod
    def of_text(cls, input_ids: np.ndarray) -> Prompt:
        """A prompt of text only, whose positions count up on all three axes."""
        return cls(input_ids, text_positions(*input_ids.shape))


class Chat:
    """Tokenizer and chat template of a bundle. Raises InputError when they do not match the manifest."""

    def __init__(self, tokenizer_json: str, template: str, model: ModelSpec, *, where: str = "bundle"):
        self.model, self.where = model, f"{where}: tokenizer.json"
        self.tokenizer = tokenizer_from_json(tokenizer_json, where=self.where)
        self.template = template_from_source(template, where=f"{where}: chat_template.jinja")
        self._special = special_tokens(self.tokenizer, where=self.where)
        for name in SPECIAL_TOKENS:
            expected, got = getattr(model.tokens, name), self.tokenizer.token_to_id(f"<|{name}|>")
            if got != expected:
                raise InputError(
                    "The tokenizer does not match the model",
                    where=f"{self.where}: <|{name}|>: expected id {expected}, got {got}",
                    fix="export the bundle again",
                )
        self.prefix_length = len(self.ids(self.template.prefix))  # 14 with Qwen's default system prompt
        # <|im_end|>\n<|im_start|>assistant\n<|vision_start|>
        self.suffix = [*self.ids(self.template.suffix), model.tokens.vision_start]
        # The unconditional row keeps the suffix from <|im_start|> on: 4 tokens.
        self._kept = len(self.suffix) - self.suffix.index(model.tokens.im_start)

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> Chat:
        """Verify and load the tokenizer and chat template of `bundle`. Raises InputError."""
        tokenizer, template = (
            text_from_bytes(
                bundle.read(name, limit_bytes=TEXT_LIMIT_BYTES), bundle.path / name, where="prompt"
            )
            for name in ("tokenizer.json", "chat_template.jinja")
        )
        return cls(tokenizer, template, bundle.manifest.model, where=str(bundle.path))

    def ids(self, text: str) -> list[int]:
        """Encode `text` without adding special tokens.

        Raises InputError for text that is not valid Unicode.
        """
        ids = ids_from_text(self.tokenizer, text, where=self.where)
        if ids and max(ids) >= self.model.vocab_size:
            raise InputError(
                "The tokenizer does not match the model",
                where=f"{self.where}: expected ids below {self.model.vocab_size}, got {max(ids)}",
                fix="export the bundle again",
            )
        return ids

    def text(self, ids) -> str:
        """Decode `ids`, omitting special tokens."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def generate_prompt(self, text: str, *, num_images: int) -> Prompt:
        """The prompt that draws `text`: 2N rows that end in `<|vision_start|>` (docs/star.md 3.3)."""
        return Prompt.of_text(self._pairs(self._generate_ids(text), num_images))

    def question_prompt(self, text: str) -> Prompt:
        """`text` as a question to the base model, one row: the first step of implicit reasoning (docs/star.md
        3.5).
        """
        self._check_prompt(text)
        return Prompt.of_text(np.array([self.ids(self.template.render(text))], np.int64))

    def reason_prompt(self, text: str, answer: str, *, num_images: int) -> Prompt:
        """The prompt that draws the base model's `answer` in place of `text`: 2N rows (docs/star.md 3.5).

        An empty answer leaves `text`.
        """
        ids = self._generate_ids(text)
        if answer:
            prefix, suffix = ids[: self.prefix_length], ids[-len(self.suffix) :]
            ids = prefix + self.ids(answer) + self.ids(MAGIC_SUFFIX) + suffix
        return Prompt.of_text(self._pairs(ids, num_images))

    def edit_prompt(self, text: str, *, grid_h: int, grid_w: int) -> Prompt:
        """The prompt that edits an image by `text`: two rows (docs/star.md 3.6).

        A row holds the prefix, the image tokens, `grid_h` x `grid_w` merged patches, and the text.
        """
        tokens, vq_count, count = self.model.tokens, self.model.image_tokens, grid_h * grid_w
        vq = [tokens.vision_start, *[tokens.vision_pad] * vq_count, tokens.vision_end]
        vision = [tokens.vision_start, *[tokens.image_pad] * count, tokens.vision_end]
        image = np.array(vq + vision + self.ids("\n"), np.int64)
        rows, at = self._pairs(self._generate_ids(text), 1), self.prefix_length
        rows = np.concatenate([rows[:, :at], np.tile(image, (2, 1)), rows[:, at:]], axis=1)
        vq_at, vision_at = at + 1, at + len(vq) + 1
        positions = positions_with_grid(rows.shape[1], start=vision_at, grid_h=grid_h, grid_w=grid_w)
        return Prompt(
            rows,
            np.repeat(positions, 2, axis=1),
            vq_tokens=slice(vq_at, vq_at + vq_count),
            vision_tokens=slice(vision_at, vision_at + count),
        )

    def ask_prompt(self, question: str, *, grid_h: int, grid_w: int) -> Prompt:
        """The prompt that asks about an image of `grid_h` x `grid_w` merged patches: one row (3.2)."""
        self._check_prompt(question)
        ids, pad = self.ids(self.template.render_image(question)), self.model.tokens.image_pad
        at, count = ids.index(pad), grid_h * grid_w
        ids = ids[:at] + [pad] * count + ids[at + 1 :]
        return Prompt(
            np.array([ids], np.int64),
            positions_with_grid(len(ids), start=at, grid_h=grid_h, grid_w=grid_w),
            vision_tokens=slice(at, at + count),
        )

    def _generate_ids(self, prompt: str) -> list[int]:
        self._check_prompt(prompt)
        return self.ids(self.template.render(prompt)) + [self.model.tokens.vision_start]

    def _pairs(self, ids: list[int], num_images: int) -> np.ndarray:
        pair = np.array([ids, ids], np.int64)
        pair[1, 1 : -self._kept] = self.model.tokens.fim_pad
        return np.tile(pair, (num_images, 1))

    def _check_prompt(self, prompt: str) -> None:
        if not prompt.strip():
            raise InputError(
                "The prompt is empty",
                where="prompt: expected some words, got none",
                fix="describe what to draw, change or answer",
            )
        if found := [self._special[id] for id in dict.fromkeys(self.ids(prompt)) if id in self._special]:
            raise InputError(
                "The prompt contains special tokens of the model",
                where=f"prompt: expected plain text, got {listed(found, separator=', ')}",
                fix="remove them from the prompt",
            )


def positions_with_grid(length: int, *, start: int, grid_h: int, grid_w: int) -> np.ndarray:
    """Positions int64 [3, 1, length] (time, row, column) of a sequence with a grid of image tokens at
    `start`.

    Text counts up on all three axes. All tokens of the grid have `start` as their time, and rows and columns
    that count from `start`; the text after it continues from the grid's larger side. Source: transformers
    4.51.0 `get_rope_index` of Qwen2.5-VL, for one still image.
    """
    after = length - start - grid_h * grid_w
    rows, columns = np.divmod(np.arange(grid_h * grid_w), grid_w)
    grid = start + np.stack([np.zeros_like(rows), rows, columns])  # [3, gh*gw]
    text = np.broadcast_to(np.arange(start), (3, start))
    rest = np.broadcast_to(start + max(grid_h, grid_w) + np.arange(after), (3, after))
    return np.concatenate([text, grid, rest], axis=1, dtype=np.int64)[:, None]


def text_positions(rows: int, length: int) -> np.ndarray:
    """Positions of text, int64 [3, rows, length]: 0, 1, 2, ... on all axes."""
    return np.ascontiguousarray(np.broadcast_to(np.arange(length, dtype=np.int64), (3, rows, length)))


def check_ids(input_ids: np.ndarray, *, vocab_size: int) -> None:
    """Raise InputError unless `input_ids` is int64 [B, L], L > 0, with ids of the vocabulary."""
    if not isinstance(input_ids, np.ndarray) or input_ids.ndim != 2 or not input_ids.size:
        raise InputError(
            "input_ids is not a valid prompt",
            where="input_ids: expected int64[B,L] with B and L of at least 1, got "
            f"{getattr(input_ids, 'shape', type(input_ids).__name__)}",
            fix="pass one row of ids per sequence",
        )
    check_array(input_ids, shape=input_ids.shape, dtype="int64")
    if not (input_ids.min() >= 0 and input_ids.max() < vocab_size):
        raise InputError(
            "A token id is not in the vocabulary",
            where=f"input_ids: expected 0 to {vocab_size - 1}, got {input_ids.min()} to {input_ids.max()}",
            fix="encode the text with the bundle's tokenizer",
        )


def check_length(*, text: int, image: int, new: int, limit_tokens: int) -> None:
    """Raise InputError for a sequence longer than the model or plan allows.

    It has the tokens of the prompt's text and image, and the new ones but for the last, which takes no slot.
    """
    needed = text + image + new
    if needed > limit_tokens:
        parts = {"of text": text, "of the image": image, "to come": new}
        split = ", ".join(f"{count} {part}" for part, count in parts.items() if count)
        raise InputError(
            "The prompt is too long",
            where=f"prompt: expected at most {limit_tokens} tokens, got {needed}: {split}",
            fix=("let the image take fewer tokens (max_pixels, --max-pixels), " if image else "")
            + "shorten the text, or request fewer new tokens",
        )
