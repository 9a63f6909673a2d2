"""Prompts as rows of ids with their positions: what each task feeds the decoder.

Knows the bundle's tokenizer and chat template, and the rules of STAR.md 3.2 to 3.6; knows nothing of sessions or images beyond
the size of their grid. Rows come as conditional, unconditional, conditional, unconditional, ...
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..bundle.manifest import ModelSpec
from ..bundle.reader import Bundle
from ..errors import InputError

MAGIC_SUFFIX = " Ultra HD, 4K, cinematic composition"  # appended to the reasoned answer; official model.py
TEXT_LIMIT_BYTES = 16 << 20
_MARK = "\ue000"  # stands for the prompt while the template is cut in two


@dataclass(frozen=True)
class Prompt:
    """What a task feeds the decoder: `input_ids` int64 [B, L], with placeholders where an image goes, and `position_ids` int64 [3, B, L].

    `vq_tokens` (T places) and `vision_tokens` (one per merged patch) are the slices of L that the encoders' rows replace.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    vq_tokens: slice | None = None
    vision_tokens: slice | None = None

    @classmethod
    def of_text(cls, input_ids: np.ndarray) -> Prompt:
        """Text alone: positions count up on all three axes."""
        return cls(input_ids, text_positions(*input_ids.shape))


class Chat:
    """Tokenizer and chat template of a bundle. Raises InputError where they disagree with the manifest."""

    def __init__(self, tokenizer_json: str, template: str, model: ModelSpec, *, where: str = "bundle"):
        self.model, self.where = model, where
        self.tokenizer = _tokenizer_from_json(tokenizer_json, where=where)
        self._template = _compiled(template, where=where)
        for name in (
            "im_start",
            "im_end",
            "vision_start",
            "vision_end",
            "vision_pad",
            "image_pad",
            "fim_pad",
        ):
            expected, got = getattr(model.tokens, name), self.tokenizer.token_to_id(f"<|{name}|>")
            if got != expected:
                raise InputError(
                    "The tokenizer is not the model's",
                    where=f"{where}: <|{name}|>: expected id {expected}, got {got}",
                    fix="export the bundle again",
                )
        parts = [self.ids(part) for part in self._render(_MARK).split(_MARK)]
        if len(parts) != 2 or model.tokens.im_start not in parts[1]:
            raise InputError(
                "The chat template is not of the expected form",
                fix="export the bundle again",
                where=f"{where}: chat_template.jinja: expected the prompt once, then <|im_start|>assistant",
            )
        self.prefix_length = len(parts[0])  # 14 with Qwen's default system prompt
        self.suffix = parts[1] + [
            model.tokens.vision_start
        ]  # <|im_end|>\n<|im_start|>assistant\n<|vision_start|>
        self._kept = len(self.suffix) - self.suffix.index(
            model.tokens.im_start
        )  # 4: what the unconditional row keeps

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> Chat:
        """The chat of `bundle`, its two files verified. Raises InputError."""
        tokenizer, template = (
            bundle.file(name).read_text(encoding="utf-8")
            for name in ("tokenizer.json", "chat_template.jinja")
        )
        return cls(tokenizer, template, bundle.manifest.model, where=str(bundle.path))

    def ids(self, text: str) -> list[int]:
        """Token ids of `text`; nothing is added in front or behind. Raises InputError for what is not valid Unicode."""
        try:
            ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeError):
            raise InputError(
                "The text cannot be encoded",
                where="prompt: expected valid Unicode, got lone surrogates",
                fix="give the prompt as UTF-8",
            ) from None
        if ids and max(ids) >= self.model.vocab_size:
            raise InputError(
                "The tokenizer is not the model's",
                fix="export the bundle again",
                where=f"{self.where}: expected ids below {self.model.vocab_size}, got {max(ids)}",
            )
        return ids

    def text(self, ids) -> str:
        """Text of `ids` without special tokens."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def generate_prompt(self, text: str, *, num_images: int) -> Prompt:
        """Draw `text`: 2N rows that end in `<|vision_start|>` (STAR.md 3.3)."""
        return Prompt.of_text(self._pairs(self._generate_ids(text), num_images))

    def question_prompt(self, text: str) -> Prompt:
        """`text` as a question to the base model, one row: the first half of implicit reasoning (STAR.md 3.5)."""
        self._check_prompt(text)
        return Prompt.of_text(np.array([self.ids(self._render(text))], np.int64))

    def reason_prompt(self, text: str, answer: str, *, num_images: int) -> Prompt:
        """Draw the base model's `answer`, which replaces `text`: 2N rows. An empty answer draws the text."""
        ids = self._generate_ids(text)
        if answer:
            ids = (
                ids[: self.prefix_length]
                + self.ids(answer)
                + self.ids(MAGIC_SUFFIX)
                + ids[-len(self.suffix) :]
            )
        return Prompt.of_text(self._pairs(ids, num_images))

    def edit_prompt(self, text: str, *, grid_h: int, grid_w: int) -> Prompt:
        """Edit an image by `text`: prefix, image tokens, `grid_h` x `grid_w` merged patches, text; two rows (STAR.md 3.6)."""
        tokens, count = self.model.tokens, grid_h * grid_w
        start, end = [tokens.vision_start], [tokens.vision_end]
        image = (
            start
            + [tokens.vision_pad] * self.model.image_tokens
            + end
            + start
            + [tokens.image_pad] * count
            + end
            + self.ids("\n")
        )
        rows, at = self._pairs(self._generate_ids(text), 1), self.prefix_length
        rows = np.concatenate(
            [rows[:, :at], np.tile(np.array(image, np.int64), (2, 1)), rows[:, at:]], axis=1
        )
        vision_at = at + 1 + self.model.image_tokens + 2
        positions = positions_with_grid(rows.shape[1], start=vision_at, grid_h=grid_h, grid_w=grid_w)
        return Prompt(
            rows,
            np.repeat(positions, 2, axis=1),
            vq_tokens=slice(at + 1, at + 1 + self.model.image_tokens),
            vision_tokens=slice(vision_at, vision_at + count),
        )

    def ask_prompt(self, question: str, *, grid_h: int, grid_w: int) -> Prompt:
        """A question about an image of `grid_h` x `grid_w` merged patches: one row."""
        self._check_prompt(question)
        content = [{"type": "image", "image": ""}, {"type": "text", "text": question}]
        ids, pad = self.ids(self._render(content)), self.model.tokens.image_pad
        if ids.count(pad) != 1:
            raise InputError(
                "The chat template has no place for the image",
                fix="export the bundle again",
                where=f"{self.where}: chat_template.jinja: expected one <|image_pad|>, got {ids.count(pad)}",
            )
        at, count = ids.index(pad), grid_h * grid_w
        ids = ids[:at] + [pad] * count + ids[at + 1 :]
        return Prompt(
            np.array([ids], np.int64),
            positions_with_grid(len(ids), start=at, grid_h=grid_h, grid_w=grid_w),
            vision_tokens=slice(at, at + count),
        )

    def _generate_ids(self, prompt: str) -> list[int]:
        self._check_prompt(prompt)
        return self.ids(self._render(prompt)) + [self.model.tokens.vision_start]

    def _pairs(self, ids: list[int], num_images: int) -> np.ndarray:
        pair = np.array([ids, ids], np.int64)
        pair[1, 1 : -self._kept] = self.model.tokens.fim_pad
        return np.tile(pair, (num_images, 1))

    def _render(self, content) -> str:
        import jinja2

        try:
            return self._template.render(
                messages=[{"role": "user", "content": content}], add_generation_prompt=True
            )
        except (jinja2.TemplateError, TypeError, ValueError, OverflowError) as error:
            raise InputError(
                "The chat template fails",
                where=f"{self.where}: chat_template.jinja: {error}",
                fix="export the bundle again",
            ) from None

    def _check_prompt(self, prompt: str) -> None:
        if not prompt.strip():
            raise InputError(
                "The prompt is empty",
                where="prompt: expected some words, got none",
                fix="say what to draw, change or answer",
            )
        model, found = self.model.tokens, set(self.ids(prompt))
        named = (
            model.im_start,
            model.im_end,
            model.vision_start,
            model.vision_end,
            model.vision_pad,
            model.image_pad,
            model.fim_pad,
        )
        if special := [self.tokenizer.id_to_token(i) for i in named if i in found]:
            raise InputError(
                "The prompt holds the model's own marks",
                where=f"prompt: expected plain text, got {', '.join(special)}",
                fix="leave them out",
            )


def positions_with_grid(length: int, *, start: int, grid_h: int, grid_w: int) -> np.ndarray:
    """Three-axis positions [3, 1, length] (time, row, column) of a sequence with one grid of `grid_h` x `grid_w` places at `start`.

    Text counts up on all axes; the grid has its start as time, and its rows and columns from there; text goes on after the
    larger side. Source: transformers 4.51.0 `get_rope_index` of Qwen2.5-VL, one still image.
    """
    after = length - start - grid_h * grid_w
    rows, columns = np.divmod(np.arange(grid_h * grid_w), grid_w)
    grid = start + np.stack([np.zeros_like(rows), rows, columns])  # [3, gh*gw]
    text = np.broadcast_to(np.arange(start), (3, start))
    rest = np.broadcast_to(start + max(grid_h, grid_w) + np.arange(after), (3, after))
    return np.concatenate([text, grid, rest], axis=1, dtype=np.int64)[:, None]


def text_positions(rows: int, length: int) -> np.ndarray:
    """Positions [3, rows, length] of text: 0, 1, 2, ... on all axes."""
    return np.ascontiguousarray(np.broadcast_to(np.arange(length, dtype=np.int64), (3, rows, length)))


def check_length(needed_tokens: int, *, limit_tokens: int, what: str) -> None:
    """Refuse a sequence (prompt and what is to come) longer than the model or plan can hold. Raises InputError with both numbers."""
    if needed_tokens > limit_tokens:
        raise InputError(
            f"The {what} is too long",
            where=f"{what}: expected at most {limit_tokens} tokens, got {needed_tokens}",
            fix="shorten it, or ask for fewer new tokens",
        )


def _tokenizer_from_json(text: str, *, where: str):
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise InputError(
            "The tokenizer cannot be read",
            where=f"{where}: tokenizer.json: {error}",
            fix="export the bundle again",
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _compiled(template: str, *, where: str):
    """The chat template as transformers renders it: trimmed blocks, loop controls, nothing but what it is given."""
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise InputError(
            "The chat template cannot be read",
            where=f"{where}: chat_template.jinja: {error}",
            fix="export the bundle again",
        ) from None
