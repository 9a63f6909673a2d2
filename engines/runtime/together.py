"""Requests of several people on one model: images that are drawn together, and answers as they come.

The images of a batch share the settings of the draw, which are inputs of `image_head` for the whole batch.
Each has its own prompt, of any length (shorter ones are padded at their ends, where their image's tokens go),
and its own seed, so it is the same whatever it is drawn together with.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..fit.memory import DRAW, PAINTED
from ..inputs.preprocess import MAX_PIXELS, MIN_PIXELS, ask_inputs, edit_inputs, images_from_decoded
from ..inputs.prompt import Prompt
from ..progress import Progress, silent
from ..sessions import plan_rows, run
from .decode import Watch
from .painter import Painter
from .painting import Painting, Preview
from .star import Star

CAPACITY_STEP = 64  # caches grow in steps: sums over a cache are then added in one order, whatever its size
SPARE_TOKENS = 64  # of a prompt's template and an answer, beside an image that takes all the room there is


@dataclass(frozen=True)
class Prepared:
    """The prompt of an image: float32 [2, L, H] with positions int64 [3, 2, L].

    `picture_tokens` of its L are of a picture. `answer` is what is drawn in place of the prompt, if the base
    model was asked first. Of an image that will be painted, `painter` makes its painter for a seed and a
    preview, `cut_tokens` counts the ids at the prompt's end that the diffusion decoder cannot read, and
    `task` is that of `engines.fit.memory`.
    """

    embeds: np.ndarray
    position_ids: np.ndarray
    answer: str | None = None
    painter: Callable[[int, Preview | None], Painter] | None = None
    cut_tokens: int = 0
    task: str = "generate"
    picture_tokens: int = 0


@dataclass(frozen=True)
class Drawn:
    """Image ids int64 [N, T] and the number of `forwards` that drew them."""

    image_ids: np.ndarray
    forwards: int


@dataclass(frozen=True)
class Said:
    """The `text` of an answer, its token `ids` int64 [n], the tokens of its prompt, and whether the model
    ended it (`stopped`)."""

    text: str
    ids: np.ndarray
    prompt_tokens: int
    stopped: bool


class _Warm(Exception):
    """Ends the first draw."""


class Together:
    """What a server asks of `star`, for one thread at a time."""

    def __init__(self, star: Star):
        self.star, self.model = star, star.model

    def images_limit(self) -> int | None:
        """How many images one batch may have: as many as the plan was built for, None without one."""
        bundle, backend = self.star.bundle, self.star.backend
        rows = plan_rows(bundle, bundle.parts("base_ar")[0], backend=backend)
        return rows and rows // 2

    def load(self, *, images: int) -> None:
        """Open every component for batches of `images`, unless a budget lets them take turns."""
        use = self.star.use("base_ar", rows=2 * images, length=1, tokens=self.model.image_tokens)
        names = ["token_embedding", "vision_encoder", "vq_encoder", *DRAW, "text_head", "vq_decoder"]
        if self.model.diffusion:
            names += [name for stage in PAINTED["repaint"] for name in stage if name not in names]
        self.star.loaded.open_at_once(*names, use=use)

    def warm_up(self, *, images: int) -> None:
        """Take one step of the largest batch, and decode an image.

        What is wrong shows before anyone asks, and executors have taken the memory that they keep.
        """

        def stop(known: np.ndarray, ids: Callable[[], np.ndarray]) -> None:
            raise _Warm

        settings = self.model.sampling.generate
        with contextlib.suppress(_Warm):
            self.draw(
                [self.generation("warm up")] * images,
                range(images),
                guidance=settings.guidance,
                top_k=settings.top_k,
                top_p=settings.top_p,
                watch=stop,
            )
        self.images(np.zeros((1, self.model.image_tokens), np.int64))

    def generation(
        self,
        prompt: str,
        *,
        reason: bool = False,
        max_new_tokens: int = 256,
        on_token: Callable[[int], None] | None = None,
        painting: Painting | None = None,
    ) -> Prepared:
        """Prepare an image of `prompt`, as `Star.generate` does. Raises InputError."""
        chat, answer = self.star.chat, None
        painted = self._painted(painting, prompt)
        if reason:
            question = chat.question_prompt(prompt)
            answer = self._answered(question, max_new_tokens, on_token).text
            drawn = chat.reason_prompt(prompt, answer, num_images=1)
            painted = self._painted(painting, prompt, answer=answer)
        else:
            drawn = chat.generate_prompt(prompt, num_images=1)
        self._check(drawn, image=0)
        return Prepared(self.star.embedded(drawn), drawn.position_ids, answer=answer, **painted)

    def editing(self, image: np.ndarray, instruction: str, *, painting: Painting | None = None) -> Prepared:
        """Prepare an edit of `image`, uint8 [H, W, 3], as `Star.edit` does. Raises InputError."""
        painted = self._painted(painting, instruction, image=image)
        text = len(self.star.chat.ids(instruction))
        pixels = self._pixels(text + 2 * self.model.image_tokens)
        vision, square = edit_inputs(image, self.model, max_pixels=pixels)
        prompt = self.star.chat.edit_prompt(instruction, grid_h=vision.grid_h, grid_w=vision.grid_w)
        tokens = vision.grid_h * vision.grid_w + self.model.image_tokens
        self._check(prompt, image=tokens)
        embeds = self.star.embedded(prompt, vision=vision, square=square)
        return Prepared(embeds, prompt.position_ids, picture_tokens=tokens, **painted)

    def draw(
        self,
        prepared: Sequence[Prepared],
        seeds: Sequence[int] | None,
        *,
        guidance: float,
        top_k: int,
        top_p: float,
        window: int | None = None,
        watch: Watch | None = None,
    ) -> Drawn:
        """Draw an image of each prompt, with its own seed of `seeds`, or without noise if there are none.

        What `watch` raises ends the draw. Raises MissingError where the memory is too small.
        """
        lengths = np.array([one.embeds.shape[1] for one in prepared])
        new = self.model.image_tokens - 1
        room = -(-(int(lengths.max()) + new) // CAPACITY_STEP) * CAPACITY_STEP - new
        tokens = self.model.image_tokens
        use = self.star.use("base_ar", rows=2 * len(prepared), length=room, tokens=tokens, window=window)
        self.star.loaded.check(prepared[0].task, use)
        loop = self.star.image_loop(num_images=len(prepared), length=room, tokens=tokens, window=window)
        longest = int(lengths.max())
        embeds = np.concatenate([_padded(one.embeds, longest, axis=1) for one in prepared])
        positions = np.concatenate([_padded(one.position_ids, longest, axis=2) for one in prepared], axis=1)
        ids = loop.draw(
            embeds,
            positions,
            guidance=guidance,
            top_k=top_k,
            top_p=top_p,
            seed=None if seeds is None else list(seeds),
            lengths=lengths,
            watch=watch,
        )
        return Drawn(ids, 1 + loop.forwards)

    def text(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        return self.star.chat.text(ids)

    def images(self, image_ids: np.ndarray) -> np.ndarray:
        """The images uint8 [N, R, R, 3] of ids int64 [N, T]."""
        return images_from_decoded(run(self.star.session("vq_decoder"), {"image_ids": image_ids})["image"])

    def paint(
        self,
        prepared: Prepared,
        image_ids: np.ndarray,
        *,
        seed: int,
        progress: Progress = silent,
        preview: Preview | None = None,
    ) -> np.ndarray:
        """Paint ids int64 [1, T], with noise of `seed`, as was prepared: uint8 [1, R, R, 3].

        What `progress`, called after each step, or `preview` raises ends it.
        """
        assert prepared.painter
        return prepared.painter(seed, preview).paint(image_ids, progress)

    def answer(
        self,
        image: np.ndarray | None,
        question: str,
        *,
        max_new_tokens: int,
        on_token: Callable[[int], None] | None = None,
    ) -> Said:
        """Answer `question`, about `image`, uint8 [H, W, 3], if there is one. Raises InputError.

        The answer has at most `max_new_tokens`, and no more than the model has positions for.
        """
        chat = self.star.chat
        if image is None:
            return self._answered(chat.question_prompt(question), max_new_tokens, on_token)
        pixels = self._pixels(len(chat.ids(question)))
        vision = ask_inputs(image, self.model, max_pixels=pixels)
        prompt = chat.ask_prompt(question, grid_h=vision.grid_h, grid_w=vision.grid_w)
        return self._answered(prompt, max_new_tokens, on_token, vision=vision)

    def _answered(self, prompt: Prompt, max_new_tokens: int, on_token, *, vision=None) -> Said:
        length = prompt.input_ids.shape[1]
        most = max(1, min(max_new_tokens, self.model.max_positions - length + 1))
        answer = self.star.answered(prompt, most, silent, vision=vision, on_token=on_token)
        stopped = answer.ids[-1] in self.model.tokens.eos
        return Said(answer.text, answer.ids, prompt_tokens=length, stopped=bool(stopped))

    def _painted(self, painting: Painting | None, prompt: str, **given: Any) -> dict[str, Any]:
        """What `Prepared` has of a painting, checked; nothing without one."""
        if painting is None:
            return {}

        def painter(seed: int, preview: Preview | None) -> Painter:
            how = replace(painting, preview=preview)
            return Painter(self.star.loaded, self.star.captions, how, prompt, seed=seed, **given)

        checked = painter(0, None)
        return {"painter": painter, "cut_tokens": checked.cut_tokens, "task": checked.task}

    def _check(self, prompt: Prompt, *, image: int) -> None:
        text, new = prompt.input_ids.shape[1] - image, self.model.image_tokens - 1
        self.star.check_room("base_ar", "stacked_ar", text=text, image=image, new=new)

    def _pixels(self, other_tokens: int) -> int:
        """The largest input of the vision encoder beside so many tokens, in pixels."""
        side = self.model.vision.patch_size * self.model.vision.spatial_merge_size
        room = self.model.max_positions - other_tokens - SPARE_TOKENS
        return max(MIN_PIXELS, min(MAX_PIXELS, room * side * side))


def _padded(array: np.ndarray, length: int, *, axis: int) -> np.ndarray:
    """`array` with its last entry along `axis` repeated up to `length`."""
    padding = [(0, 0)] * array.ndim
    padding[axis] = (0, length - array.shape[axis])
    return np.pad(array, padding, mode="edge")
