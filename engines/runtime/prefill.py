"""Running a prompt, whose tokens are all known, through the decoders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ..sessions import Buffer, Session
from .kv_cache import Slots


def prefill(
    decoders: Sequence[tuple[Session, dict[str, Buffer]]],
    inputs_embeds: np.ndarray,
    position_ids: np.ndarray,
    slots: Slots,
    *,
    ends: np.ndarray | None = None,
) -> np.ndarray:
    """Run a prompt through `decoders`, as `run_chunks` does: hidden states of the last position [B, 1, H].

    `ends` int64 [B] are the lengths of the rows' prompts where they are padded.
    """
    rows, _, size = inputs_embeds.shape
    found, at = np.empty((rows, 1, size), np.float32), 0
    for hidden in run_chunks(decoders, inputs_embeds, position_ids, slots):
        last = hidden
        if ends is not None:
            here = np.flatnonzero((ends > at) & (ends <= at + hidden.shape[1]))
            if len(here):
                found[here, 0] = hidden.read()[here, ends[here] - at - 1]
            at += hidden.shape[1]
    return np.ascontiguousarray(last.read()[:, -1:]) if ends is None else found


def run_chunks(
    decoders: Sequence[tuple[Session, dict[str, Buffer]]],
    inputs_embeds: np.ndarray,
    position_ids: np.ndarray,
    slots: Slots,
) -> Iterator[Buffer]:
    """Run known tokens through a chain of `decoders` (session, caches), each fed by the one before.

    inputs_embeds [B, L, H], position_ids [3, B, L] -> buffers with the hidden states [B, S, H] of consecutive
    positions. S is L, or less where a session takes fewer `prefill_tokens`. Raises InputError when `slots`
    has no room for them.
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
        yield buffers["hidden_states"]
