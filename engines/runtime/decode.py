"""The two decode loops: image tokens through both decoders, and text through the base decoder.

The loops work on open sessions and arrays, and know nothing of prompts or images. Steps are bound once and
run many times. Buffers are chained, so nothing is copied between sessions: the image head's embedding is the
next input of the base decoder, whose hidden states are the input of the stacked decoder. In each image step
the host writes the write index, the position and the uniform numbers, and reads nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..bundle.tensors import shape_from_symbols
from ..progress import Progress, silent
from ..sessions import Buffer, Session
from .kv_cache import Slots, cache_buffers
from .sampler import penalise_repetition


class ImageLoop:
    """Draws `tokens` image tokens for N images on sessions of base_ar, stacked_ar and image_head.

    `base_step`, `stacked_step` and `head_steps` are the bound steps; there is one head step per token, with
    its own buffer in `image_ids`. `tensors` holds what is bound to each of the three sessions by name, except
    the ids.
    """

    def __init__(
        self,
        base: Session,
        stacked: Session,
        head: Session,
        *,
        num_images: int,
        tokens: int,
        capacity_tokens: int,
    ):
        rows = 2 * num_images
        self.tokens, self.slots = tokens, Slots(capacity_tokens)
        base_caches, stacked_caches = (
            cache_buffers(s, rows=rows, capacity_tokens=capacity_tokens) for s in (base, stacked)
        )
        self.decoders = [(base, base_caches), (stacked, stacked_caches)]
        self.write_indices = base.buffer((rows,), "int64")
        self.position_ids = base.buffer((3, rows, 1), "int64")
        hidden = shape_from_symbols(base.spec.outputs[0].shape, {"B": rows, "S": 1})  # [2N, 1, H]
        embeds, base_hidden, self.hidden_states = (base.buffer(hidden, "float32") for _ in range(3))
        where = {"write_indices": self.write_indices, "position_ids": self.position_ids}
        base_tensors = base_caches | where | {"inputs_embeds": embeds, "hidden_states": base_hidden}
        stacked_tensors = stacked_caches | where
        stacked_tensors |= {"inputs_embeds": base_hidden, "hidden_states": self.hidden_states}
        self.base_step, self.stacked_step = base.bind(base_tensors), stacked.bind(stacked_tensors)
        self.settings = {
            "guidance": head.buffer((1,), "float32"),
            "top_k": head.buffer((1,), "int64"),
            "top_p": head.buffer((1,), "float32"),
            "uniform": head.buffer((num_images,), "float32"),
        }
        logits = head.buffer(shape_from_symbols(head.spec.outputs[2].shape, {"N": num_images}), "float32")
        head_tensors = self.settings | {
            "hidden_states": self.hidden_states,
            "inputs_embeds": embeds,
            "logits": logits,
        }
        self.image_ids = [head.buffer((num_images,), "int64") for _ in range(tokens)]
        self.head_steps = [head.bind(head_tensors | {"image_ids": ids}) for ids in self.image_ids]
        self.tensors = base_tensors, stacked_tensors, head_tensors

    def draw(
        self,
        inputs_embeds: np.ndarray,
        position_ids: np.ndarray,
        *,
        guidance: float,
        top_k: int,
        top_p: float,
        uniforms: np.ndarray,
        progress: Progress = silent,
    ) -> np.ndarray:
        """Draw image ids int64 [N, T] from inputs_embeds [2N, L, H], position_ids [3, 2N, L] and uniforms [T,
        N].

        One prefill and T - 1 decode steps run. Positions continue from the prompt's last. Raises InputError
        when L + T - 1 tokens exceed the capacity.
        """
        for name, value, dtype in (
            ("guidance", guidance, np.float32),
            ("top_k", top_k, np.int64),
            ("top_p", top_p, np.float32),
        ):
            self.settings[name].write(np.array([value], dtype))
        self.slots.rewind(0)
        self.hidden_states.write(prefill(self.decoders, inputs_embeds, position_ids, self.slots))
        self.decode(int(position_ids.max()) + 1, uniforms, progress=progress)
        return np.stack([ids.read() for ids in self.image_ids], axis=1)

    def decode(self, position: int, uniforms: np.ndarray, *, progress: Progress = silent) -> None:
        """Run the decode steps after the prefill, and leave the ids in `image_ids`.

        `position` is that of the first image token, on all three axes.
        """
        base_step, stacked_step, rows = self.base_step, self.stacked_step, self.write_indices.shape[0]
        write_index, write_position = self.write_indices.write, self.position_ids.write
        write_uniform = self.settings["uniform"].write
        steps = np.arange(self.tokens - 1)
        indices = np.repeat((self.slots.used_tokens + steps)[:, None], rows, axis=1)  # [T-1, 2N]
        positions = np.tile((position + steps)[:, None, None, None], (1, 3, rows, 1))  # [T-1, 3, 2N, 1]
        for i, head_step in enumerate(self.head_steps):
            if i:
                self.slots.take(1)
                write_index(indices[i - 1])
                write_position(positions[i - 1])
                base_step()
                stacked_step()
            write_uniform(uniforms[i])
            head_step()
            progress("draw, in tokens", i + 1, self.tokens)


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
    ) -> np.ndarray:
        """Answer the prompt input_ids [1, L], inputs_embeds [1, L, H], position_ids [3, 1, L] -> new ids
        int64 [n].

        Each id is the arg-max after the repetition penalty on prompt and answer. n <= max_new_tokens, and the
        id of `eos` that ends the answer is included.
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
            if seen[length + i] in eos:
                break
        return seen[length : length + i + 1]


def prefill(
    decoders: Sequence[tuple[Session, dict[str, Buffer]]],
    inputs_embeds: np.ndarray,
    position_ids: np.ndarray,
    slots: Slots,
) -> np.ndarray:
    """Run a prompt through a chain of `decoders` (session, caches), each fed by the one before.

    inputs_embeds [B, L, H], position_ids [3, B, L] -> hidden states of the last position [B, 1, H]. A prompt
    longer than a session's `prefill_tokens` is run in chunks.
    """
    rows, length, _ = inputs_embeds.shape
    chunk = min(session.prefill_tokens or length for session, _ in decoders)
    for at in range(0, length, chunk):
        embeds, positions = inputs_embeds[:, at : at + chunk], position_ids[:, :, at : at + chunk]
        host = {
            "inputs_embeds": embeds,
            "position_ids": positions,
            "write_indices": np.full(rows, slots.take(embeds.shape[1])),
        }
        buffers = {name: decoders[0][0].buffer(array.shape, array.dtype.name) for name, array in host.items()}
        for name, buffer in buffers.items():
            buffer.write(np.ascontiguousarray(host[name]))
        for session, caches in decoders:
            buffers["hidden_states"] = session.buffer(embeds.shape, "float32")
            session.bind(caches | buffers)()
            buffers["inputs_embeds"] = buffers["hidden_states"]
    return np.ascontiguousarray(buffers["hidden_states"].read()[:, -1:])
