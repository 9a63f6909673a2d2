"""STAR on a device: generate, edit and answer. `Star` and its results are the public API of `engines`.

Prompts and images become arrays, and components run in sessions of one backend, which are opened on first use
(`loaded.py`). This needs neither torch nor transformers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle.reader import Bundle
from ..bundle.tensors import check_array
from ..fit.memory import ANSWER, DRAW, Use
from ..inputs.caption import Captions
from ..inputs.image_io import GivenImage, checked_image
from ..inputs.preprocess import (
    MAX_PIXELS,
    MIN_PIXELS,
    VisionInputs,
    ask_inputs,
    edit_inputs,
    images_from_decoded,
)
from ..inputs.prompt import Chat, Prompt, check_ids, check_length
from ..progress import Progress, silent
from ..ranges import between
from ..sessions import Session, check_backend, check_threads, run
from .decode import ImageLoop, TextLoop
from .gumbel import check_seed
from .loaded import Loaded
from .painter import Painter
from .painting import Painting
from .results import Answer, Images
from .sampler import check_sampling
from .settings import sampling_settings


class Star:
    """A bundle, ready to run on `backend`: `onnxruntime` (CPU), `onnxruntime-cuda` or `tensorrt:TARGET`.

    A context manager, for one thread at a time. `memory` is a budget in bytes for weights, caches and
    buffers: components are then loaded in turn where they do not fit together. `window` is how many tokens of
    an image a forward draws (`windows.py`); it changes the time that an image takes, and not the image. By
    default it follows from backend and model (`engines.fit.window`). `threads` is how many of the processor's
    threads the sessions of a CPU backend compute with, by default one per core.

    Raises InputError for an invalid bundle, and UsageError for an unknown backend, a window that is no number
    of image tokens or a number of threads that is out of range. The first use raises MissingError when the
    executor or device is missing, and a task when its memory is.
    """

    def __init__(
        self,
        bundle: str | Path | Bundle,
        *,
        backend: str = "onnxruntime",
        memory: int | None = None,
        window: int | None = None,
        threads: int | None = None,
    ):
        check_backend(backend)
        check_threads(threads, backend=backend)
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        self.backend, self.model = backend, self.bundle.manifest.model
        self.chat = Chat.from_bundle(self.bundle)
        self.loaded = Loaded(self.bundle, backend=backend, memory_bytes=memory, threads=threads)
        if window is not None:
            between("window", window, self.model.image_tokens)
        self.window = window

    def __enter__(self) -> Star:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Close all sessions. The object cannot be used again."""
        self.loaded.close()

    def session(self, component: str) -> Session:
        """The session of `component`, which is opened on first use. Raises InputError after `close`."""
        (session,) = self.loaded.sessions(component)
        return session

    def generate(
        self,
        prompt: str,
        *,
        cfg: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 100,
        num_images: int = 1,
        greedy: bool = False,
        reason: bool = False,
        max_new_tokens: int = 256,
        painting: Painting | None = None,
        progress: Progress = silent,
    ) -> Images:
        """Draw `num_images` images of `prompt` (docs/star.md 3.3).

        With `reason`, the base model first answers the prompt in at most `max_new_tokens`, and the answer is
        drawn (3.5). The same seed draws the same images; `greedy` takes the arg-max after guidance. `cfg`,
        `top_k` and `top_p` default to the model's settings. With a `painting`, the diffusion decoder paints
        the image tokens. Raises UsageError for settings out of range, and
        InputError for a prompt that is empty or too long.
        """
        settings = sampling_settings(
            self.model.sampling.generate,
            self.model,
            cfg=cfg,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            greedy=greedy,
            num_images=num_images,
        )
        between("max_new_tokens", max_new_tokens, self.model.max_positions)
        painter = self._painter(painting, prompt, seed=seed, num_images=num_images)
        answer = None
        if reason:
            least = self.loaded.use(rows=2 * num_images, tokens=self.model.image_tokens, prompt_tokens=1)
            self.loaded.check("reason", least)
            answer = self.answered(self.chat.question_prompt(prompt), max_new_tokens, progress).text
            drawn = self.chat.reason_prompt(prompt, answer, num_images=num_images)
            painter = self._painter(painting, prompt, seed=seed, num_images=num_images, answer=answer)
        else:
            drawn = self.chat.generate_prompt(prompt, num_images=num_images)
        return self._drawn(drawn, settings, progress, answer=answer, painter=painter)

    def edit(
        self,
        image: GivenImage,
        instruction: str,
        *,
        cfg: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 100,
        greedy: bool = False,
        min_pixels: int = MIN_PIXELS,
        max_pixels: int = MAX_PIXELS,
        painting: Painting | None = None,
        progress: Progress = silent,
    ) -> Images:
        """Edit `image`, a file, a Pillow image or uint8 [H, W, 3], as `instruction` says (docs/star.md 3.6).

        The settings are those of `generate`; `min_pixels` and `max_pixels` bound the vision encoder's input.
        """
        settings = sampling_settings(
            self.model.sampling.edit,
            self.model,
            cfg=cfg,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            greedy=greedy,
            num_images=1,
        )
        given = checked_image(image)
        painter = self._painter(painting, instruction, seed=seed, image=given)
        vision, square = edit_inputs(given, self.model, min_pixels=min_pixels, max_pixels=max_pixels)
        prompt = self.chat.edit_prompt(instruction, grid_h=vision.grid_h, grid_w=vision.grid_w)
        return self._drawn(prompt, settings, progress, vision=vision, square=square, painter=painter)

    def ask(
        self,
        image: GivenImage,
        question: str,
        *,
        max_new_tokens: int = 256,
        min_pixels: int = MIN_PIXELS,
        max_pixels: int = MAX_PIXELS,
        progress: Progress = silent,
    ) -> Answer:
        """Answer `question` about `image`, given as in `edit` (docs/star.md 3.2).

        The answer is greedy, with the checkpoint's repetition penalty.
        """
        vision = ask_inputs(checked_image(image), self.model, min_pixels=min_pixels, max_pixels=max_pixels)
        prompt = self.chat.ask_prompt(question, grid_h=vision.grid_h, grid_w=vision.grid_w)
        return self.answered(prompt, max_new_tokens, progress, vision=vision)

    def generate_ids(
        self,
        input_ids: np.ndarray,
        *,
        guidance: float,
        top_k: int,
        top_p: float,
        seed: int | None,
        tokens: int,
    ) -> np.ndarray:
        """Draw image ids int64 [N, `tokens`] from a prompt of ids, as `generate` does between text and image.

        `input_ids` is int64 [2N, L] in rows conditional, unconditional, .... Without a `seed` there is no
        noise; with a `top_k` of 1 that is the arg-max.
        """
        check_ids(input_ids, vocab_size=self.model.vocab_size)
        check_sampling(guidance=guidance, top_k=top_k, top_p=top_p, top_k_limit=self.model.top_k_limit)
        between("tokens", tokens, self.model.image_tokens)
        if seed is not None:
            check_seed(seed)
        self.check_room("base_ar", "stacked_ar", text=input_ids.shape[1], new=tokens - 1)
        prompt = Prompt.of_text(input_ids)
        embeds, length = self.embedded(prompt), input_ids.shape[1]
        loop = self.image_loop(num_images=len(input_ids) // 2, length=length, tokens=tokens)
        return loop.draw(embeds, prompt.position_ids, guidance=guidance, top_k=top_k, top_p=top_p, seed=seed)

    def answer_ids(
        self,
        input_ids: np.ndarray,
        position_ids: np.ndarray,
        *,
        max_new_tokens: int,
        repetition_penalty: float | None = None,
    ) -> np.ndarray:
        """Answer a text prompt of ids: input_ids int64 [1, L], position_ids int64 [3, 1, L] -> new ids int64
        [n].

        n is at most `max_new_tokens`. `repetition_penalty` is by default the checkpoint's.
        """
        check_ids(input_ids, vocab_size=self.model.vocab_size)
        check_array(position_ids, shape=(3, 1, input_ids.shape[1]), dtype="int64")
        prompt = Prompt(input_ids, position_ids)
        return self.answered(prompt, max_new_tokens, silent, repetition_penalty=repetition_penalty).ids

    def image_loop(
        self, *, num_images: int, length: int, tokens: int, window: int | None = None
    ) -> ImageLoop:
        """A decode loop, with its own buffers, for `tokens` image tokens after prompts of `length` tokens."""
        window = window or self.window
        use = self.use("base_ar", rows=2 * num_images, length=length, tokens=tokens, window=window)
        sessions = self.loaded.sessions(*DRAW, use=use)
        limits = [session.prefill_tokens or tokens for session in sessions]  # a plan may hold fewer
        return ImageLoop(
            *sessions,
            num_images=num_images,
            tokens=tokens,
            capacity_tokens=use.capacity_tokens,
            window=window or min(use.window_tokens, *limits),
        )

    def embedded(
        self, prompt: Prompt, *, vision: VisionInputs | None = None, square: np.ndarray | None = None
    ) -> np.ndarray:
        """Embeddings of the prompt, float32 [B, L, H].

        The encoders' rows replace the placeholders of an image: `vision` holds the inputs of
        `vision_encoder`, and `square`, float32 [1, 3, R, R], is that of `vq_encoder`.
        """
        embeds = run(self.session("token_embedding"), {"input_ids": prompt.input_ids})["inputs_embeds"]
        if square is not None:
            ids = run(self.session("vq_encoder"), {"image": square})
            embeds[:, prompt.vq_tokens] = run(self.session("image_embedding"), ids)["inputs_embeds"]
        if vision is not None:
            encoded = run(self.session("vision_encoder"), vision.feeds())
            embeds[:, prompt.vision_tokens] = encoded["image_embeds"]
        return embeds

    def _drawn(
        self,
        prompt: Prompt,
        settings: dict[str, Any],
        progress: Progress,
        *,
        vision: VisionInputs | None = None,
        square: np.ndarray | None = None,
        answer: str | None = None,
        painter: Painter | None = None,
    ) -> Images:
        rows, length = prompt.input_ids.shape
        tokens = self.model.image_tokens
        seen = 0 if vision is None else vision.grid_h * vision.grid_w + tokens
        self.check_room("base_ar", "stacked_ar", text=length - seen, image=seen, new=tokens - 1)
        use = self.use("base_ar", rows=rows, length=length, tokens=tokens)
        self.loaded.check(painter.task if painter else "edit" if vision else "generate", use)
        self.loaded.open_at_once("token_embedding", *DRAW, use=use)
        embeds = self.embedded(prompt, vision=vision, square=square)
        loop = self.image_loop(num_images=rows // 2, length=length, tokens=tokens)
        ids = loop.draw(embeds, prompt.position_ids, **settings, progress=progress)
        if painter:
            return Images(ids, painter.paint(ids, progress), answer, painter.cut_tokens)
        decoded = run(self.session("vq_decoder"), {"image_ids": ids})["image"]
        return Images(ids, images_from_decoded(decoded), answer)

    @functools.cached_property
    def captions(self) -> Captions | None:
        """The tokenizer of the diffusion decoder; None without one."""
        return Captions.from_bundle(self.bundle)

    def _painter(self, painting: Painting | None, prompt: str, **given: Any) -> Painter | None:
        """What paints the image ids, checked before there are any; None where the VQ decoder draws."""
        return Painter(self.loaded, self.captions, painting, prompt, **given) if painting else None

    def answered(
        self,
        prompt: Prompt,
        max_new_tokens: int,
        progress: Progress,
        *,
        vision: VisionInputs | None = None,
        repetition_penalty: float | None = None,
        on_token: Callable[[int], None] | None = None,
    ) -> Answer:
        """Answer a prompt that was made of text, or of text and the inputs of `vision_encoder`.

        `on_token` is given each id as it comes.
        """
        between("max_new_tokens", max_new_tokens, self.model.max_positions)
        length = prompt.input_ids.shape[1]
        seen = 0 if vision is None else vision.grid_h * vision.grid_w
        self.check_room("base_ar", text=length - seen, image=seen, new=max_new_tokens - 1)
        use = self.use("base_ar", rows=1, length=length, tokens=max_new_tokens)
        if vision:
            self.loaded.check("ask", use)
        self.loaded.open_at_once("token_embedding", *ANSWER, use=use)
        embeds = self.embedded(prompt, vision=vision)
        sessions = self.loaded.sessions(*ANSWER, use=use)
        ids = TextLoop(*sessions, capacity_tokens=use.capacity_tokens).answer(
            prompt.input_ids,
            embeds,
            prompt.position_ids,
            max_new_tokens=max_new_tokens,
            eos=self.model.tokens.eos,
            repetition_penalty=self.model.repetition_penalty
            if repetition_penalty is None
            else repetition_penalty,
            progress=progress,
            on_token=on_token,
        )
        return Answer(self.chat.text(ids), ids)

    def use(self, decoder: str, *, rows: int, length: int, tokens: int, window: int | None = None) -> Use:
        """What a loop takes that draws `tokens` tokens after a prompt: the last token takes no slot."""
        slots = self.loaded.capacity(decoder) or length + tokens - 1
        window = window or self.window or self.loaded.window(rows=rows)
        return self.loaded.use(rows=rows, tokens=slots, prompt_tokens=length, window_tokens=window)

    def check_room(self, *decoders: str, text: int, new: int, image: int = 0) -> None:
        """Raise InputError if the model, or the caches of a plan, hold fewer tokens."""
        held = [capacity for name in decoders if (capacity := self.loaded.capacity(name))]
        limit = min([self.model.max_positions, *held])
        check_length(text=text, image=image, new=new, limit_tokens=limit)
