"""The two decode loops: image tokens through both decoders, and text through the base decoder.

The loops work on open sessions and arrays, and know nothing of prompts or images. Steps are bound once and
run many times. Buffers are chained, so nothing is copied between sessions: with one token per step, the image
head's embedding is the next input of the base decoder, whose hidden states are the input of the stacked one.
In each image step the host writes write indices, positions and noise. It reads nothing with one token per
step, and the drawn ids with more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from ..bundle.tensors import shape_from_symbols
from ..errors import UsageError
from ..progress import Progress, silent
from ..sessions import Buffer, Session
from ..sessions.device_loop import Decoders, DeviceLoop, Head, refusal
from .gumbel import Noise, quantiles
from .kv_cache import Slots, cache_buffers, check_capacity
from .prefill import prefill
from .sampler import penalise_repetition
from .windows import Windows

Seed: TypeAlias = "int | Sequence[int] | None"  # of all images, or one of each image; None is no noise
# Called after each step with how many tokens of each image are known [N], and a function that returns all ids
# int64 [N, T], guesses among them. What it raises ends the draw.
Watch: TypeAlias = "Callable[[np.ndarray, Callable[[], np.ndarray]], None]"


class ImageLoop:
    """Draws `tokens` image tokens for N images on sessions of base_ar, stacked_ar, image_head and
    image_embedding, `window` tokens per step.

    `base_step`, `stacked_step` and `head_steps` are the bound steps; with one token per step, there is one
    head step per token, with its own buffer in `image_ids`. `tensors` holds what is bound to each of the
    first three sessions by name, except the ids. Raises UsageError for a window that a plan does not hold.
    """

    def __init__(
        self,
        base: Session,
        stacked: Session,
        head: Session,
        embedding: Session,
        *,
        num_images: int,
        tokens: int,
        capacity_tokens: int,
        window: int = 1,
    ):
        check_window(window, base, stacked, head)
        self.tokens, self.images, self.slots = tokens, num_images, Slots(capacity_tokens)
        self.window = max(1, min(window, tokens - 1))
        rows, width = 2 * num_images, self.window
        base_caches, stacked_caches = (
            cache_buffers(s, rows=rows, capacity_tokens=capacity_tokens) for s in (base, stacked)
        )
        self.decoders = [(base, base_caches), (stacked, stacked_caches)]
        self.write_indices = base.buffer((rows,), "int64")
        self.position_ids = base.buffer((3, rows, width), "int64")
        hidden = shape_from_symbols(base.spec.outputs[0].shape, {"B": rows, "S": width})  # [2N, W, H]
        self.embeds, base_hidden, self.hidden_states = (base.buffer(hidden, "float32") for _ in range(3))
        where = {"write_indices": self.write_indices, "position_ids": self.position_ids}
        base_tensors = base_caches | where | {"inputs_embeds": self.embeds, "hidden_states": base_hidden}
        stacked_tensors = stacked_caches | where
        stacked_tensors |= {"inputs_embeds": base_hidden, "hidden_states": self.hidden_states}
        self.base_step, self.stacked_step = base.bind(base_tensors), stacked.bind(stacked_tensors)
        self.settings = {
            "guidance": head.buffer((1,), "float32"),
            "top_k": head.buffer((1,), "int64"),
            "top_p": head.buffer((1,), "float32"),
        }
        logits = head.spec.outputs[2].shape
        self.codebook_size = int(logits[-1])

        def bound(hidden_states: Buffer, embeds: Buffer) -> dict[str, Buffer]:
            """What the head is bound to for as many positions as its inputs have."""
            sizes = {"N": num_images, "S": hidden_states.shape[1]}
            shape = shape_from_symbols(logits, sizes)
            return self.settings | {
                "hidden_states": hidden_states,
                "noise": head.buffer(shape, "float32"),
                "inputs_embeds": embeds,
                "logits": head.buffer(shape, "float32"),
            }

        one = (rows, 1, hidden[-1])
        if self.window == 1:
            self.last_hidden, head_tensors = self.hidden_states, bound(self.hidden_states, self.embeds)
            self.first_tensors = head_tensors
            self.image_ids = [head.buffer((num_images, 1), "int64") for _ in range(tokens)]
        else:
            self.last_hidden = head.buffer(one, "float32")
            head_tensors = bound(self.hidden_states, head.buffer(hidden, "float32"))
            self.first_tensors = bound(self.last_hidden, head.buffer(one, "float32"))
            self.image_ids = [head.buffer((num_images, n), "int64") for n in (1, self.window)]
            self.fed = embedding.buffer((num_images, width), "int64")
            self.rows = embedding.buffer((num_images, width, hidden[-1]), "float32")
            self.embed_step = embedding.bind({"image_ids": self.fed, "inputs_embeds": self.rows})
        self.head_steps = [
            head.bind((head_tensors if i else self.first_tensors) | {"image_ids": ids})
            for i, ids in enumerate(self.image_ids)
        ]
        self.tensors = base_tensors, stacked_tensors, head_tensors
        heads = [
            Head(self.head_steps[i], tensors["noise"], self.image_ids[i], tensors["inputs_embeds"])
            for i, tensors in ((0, self.first_tensors), (min(1, self.window - 1), head_tensors))
        ]
        self.on_device: DeviceLoop | None = None
        self.on_host_because = refusal(self.embeds, tokens=tokens)
        if self.on_host_because is None:
            steps = self.base_step, self.stacked_step
            self.on_device = DeviceLoop(
                (base, stacked, head),
                Decoders(steps, self.embeds, self.write_indices, self.position_ids),
                first=heads[0],
                head=heads[1],
                tokens=tokens,
                quantiles=quantiles(),
            )

    def draw(
        self,
        inputs_embeds: np.ndarray,
        position_ids: np.ndarray,
        *,
        guidance: float,
        top_k: int,
        top_p: float,
        seed: Seed,
        lengths: np.ndarray | None = None,
        progress: Progress = silent,
        watch: Watch | None = None,
    ) -> np.ndarray:
        """Draw image ids int64 [N, T] from inputs_embeds [2N, L, H] and position_ids [3, 2N, L].

        One prefill runs, and then the decode steps. Positions continue from the prompt's last. `seed` decides
        the draws (`gumbel.py`). Prompts of several lengths are padded at their ends, and `lengths` int64 [N]
        says where each ends: an image's tokens take the places of its padding. Raises InputError when L + T
        - 1 tokens exceed the capacity.
        """
        for name, value, dtype in (
            ("guidance", guidance, np.float32),
            ("top_k", top_k, np.int64),
            ("top_p", top_p, np.float32),
        ):
            self.settings[name].write(np.array([value], dtype))
        self.slots.rewind(0)
        check_capacity(0, inputs_embeds.shape[1] + self.tokens - 1, self.slots.capacity_tokens)
        if lengths is None:
            self.last_hidden.write(prefill(self.decoders, inputs_embeds, position_ids, self.slots))
            return self.decode(int(position_ids.max()) + 1, seed, progress=progress, watch=watch)
        hidden = prefill(self.decoders, inputs_embeds, position_ids, self.slots, ends=lengths.repeat(2))
        self.last_hidden.write(hidden)
        first = [int(position_ids[:, 2 * i, :end].max()) + 1 for i, end in enumerate(lengths)]
        return self.decode(np.array(first), seed, slots=lengths, progress=progress, watch=watch)

    def decode(
        self,
        position: int | np.ndarray,
        seed: Seed,
        *,
        slots: np.ndarray | None = None,
        progress: Progress = silent,
        watch: Watch | None = None,
    ) -> np.ndarray:
        """Run the decode steps after the prefill: returns image ids int64 [N, T].

        `position` is that of the first image token, on all three axes, and `slots` its slot in the caches,
        by default the first free one; int64 [N] where images differ. The loop on the device has one of each,
        and one seed, and nobody watches it; so the host runs what it cannot.
        """
        if self.on_device and isinstance(position, int) and isinstance(seed, int | None) and not watch:
            ids = self.on_device.decode(
                first_slot=self.slots.used_tokens, position=position, seed=seed, progress=progress
            )
            self.forwards = self.on_device.forwards
            return ids
        windows = self._first(seed)
        write_noise = self._noise(seed, self.tensors[2]["noise"])
        places = np.arange(self.window)
        first_slot = np.broadcast_to(self.slots.used_tokens if slots is None else slots, self.images).repeat(
            2
        )
        first_position = np.broadcast_to(position, self.images).repeat(2)  # [2N]
        progress("draw, in tokens", 1, self.tokens)
        while not windows.done:
            starts = windows.starts.repeat(2)  # [2N]
            self.write_indices.write(first_slot + starts)
            at = (first_position + starts)[:, None] + places  # [2N, W]
            self.position_ids.write(np.ascontiguousarray(np.broadcast_to(at, (3, *at.shape))))
            write_noise(windows.starts + 1)
            if self.window > 1:
                self._feed(windows.fed())
            self.base_step()
            self.stacked_step()
            self.head_steps[windows.forwards + 1 if self.window == 1 else 1]()
            windows.advance(None if self.window == 1 else self.image_ids[1].read())
            known = int(windows.known.min())
            note = "" if self.window == 1 else f", {known / (1 + windows.forwards):.1f} a forward"
            progress(f"draw, in tokens{note}", known, self.tokens)
            if watch:
                watch(windows.known, lambda: self._ids(windows))
        self.forwards = windows.forwards
        return self._ids(windows)

    def _ids(self, windows: Windows) -> np.ndarray:
        """The known ids int64 [N, T], and guesses in the places of the others."""
        if self.window > 1:
            return windows.ids
        known = [ids.read() for ids in self.image_ids[: int(windows.known.min())]]
        return np.concatenate(known + known[-1:] * (self.tokens - len(known)), axis=1)

    def _first(self, seed: Seed) -> Windows:
        """Draw the first token of each image from the prefill's hidden states."""
        self._noise(seed, self.first_tensors["noise"])(np.zeros(self.images, np.int64))
        self.head_steps[0]()
        first = self.image_ids[0].read()[:, 0] if self.window > 1 else np.zeros(self.images, np.int64)
        return Windows(first, tokens=self.tokens, window=self.window)

    def _noise(self, seed: Seed, buffer: Buffer) -> Callable[[np.ndarray], None]:
        """A function that writes the noise for the steps from [N] on to `buffer`."""
        images, window, size = buffer.shape
        if seed is None:
            buffer.write(np.zeros(buffer.shape, np.float32))
            return lambda steps: None
        noise = Noise(seed, images=images, window=window, size=size)
        return lambda steps: buffer.write(noise.at(steps))

    def _feed(self, ids: np.ndarray) -> None:
        """Give the base decoder the embeddings of ids [N, W], in two rows per image."""
        self.fed.write(ids)
        self.embed_step()
        self.embeds.write(np.repeat(self.rows.read(), 2, axis=0))


def check_window(window: int, *sessions: Session) -> None:
    """Raise UsageError unless every session takes `window` new positions in one step."""
    for session in sessions:
        limit = session.prefill_tokens
        if window < 1 or limit is not None and window > limit:
            raise UsageError(
                "window is out of range",
                where=f"window: expected 1 to {limit or 'the number of image tokens'}, got {window}"
                + (f", as the plan of {session.spec.graph} was built" if limit else ""),
                fix="use a smaller window, or omit it to use the default",
            )


class TextLoop:
    """Generates a text answer greedily, one row, on sessions of token_embedding, base_ar and text_head."""

    def __init__(self, embedding: Session, base: Session, head: Session, *, capacity_tokens: int):
        self.slots = Slots(capacity_tokens)
        caches = cache_buffers(base, rows=1, capacity_tokens=capacity_tokens)
        self.decoders = [(base, caches)]
        self.write_indices, self.position_ids, self.input_ids = (
            base.buffer(shape, "int64") for shape in ((1,), (3, 1, 1), (1, 1))
        )
        hidden = shape_from_symbols(base.spec.outputs[0].shape, {"B": 1, "S": 1})  # [1, 1, H]
        embeds, self.hidden_states = (base.buffer(hidden, "float32") for _ in range(2))
        self.logits = head.buffer(shape_from_symbols(head.spec.outputs[0].shape, {"B": 1}), "float32")
        self.embed_step = embedding.bind({"input_ids": self.input_ids, "inputs_embeds": embeds})
        self.base_step = base.bind(
            caches
            | {
                "inputs_embeds": embeds,
                "position_ids": self.position_ids,
                "write_indices": self.write_indices,
                "hidden_states": self.hidden_states,
            }
        )
        self.head_step = head.bind({"hidden_states": self.hidden_states, "logits": self.logits})

    def answer(
        self,
        input_ids: np.ndarray,
        inputs_embeds: np.ndarray,
        position_ids: np.ndarray,
        *,
        max_new_tokens: int,
        eos: tuple[int, ...],
        repetition_penalty: float,
        progress: Progress = silent,
        on_token: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Answer the prompt input_ids [1, L], inputs_embeds [1, L, H], position_ids [3, 1, L] -> new ids
        int64 [n].

        Each id is the arg-max after the repetition penalty on prompt and answer. n <= max_new_tokens, and the
        id of `eos` that ends the answer is included. `on_token` is given each id as it comes; what it raises
        ends the answer.
        """
        length, position = input_ids.shape[1], int(position_ids.max()) + 1
        seen = np.concatenate([input_ids[0], np.zeros(max_new_tokens, np.int64)])
        self.hidden_states.write(prefill(self.decoders, inputs_embeds, position_ids, self.slots))
        for i in range(max_new_tokens):
            if i:
                self.input_ids.write(seen[length + i - 1].reshape(1, 1))
                self.write_indices.write(np.array([self.slots.take(1)]))
                self.position_ids.write(np.full((3, 1, 1), position + i - 1))
                self.embed_step()
                self.base_step()
            self.head_step()
            logits = self.logits.read()[0].copy()
            penalise_repetition(logits, seen[: length + i], repetition_penalty)
            seen[length + i] = logits.argmax()
            progress("answer, in tokens", i + 1, max_new_tokens)
            if on_token:
                on_token(int(seen[length + i]))
            if seen[length + i] in eos:
                break
        return seen[length : length + i + 1]
