"""The KV cache: the reference of one decoder layer's cache update and attention in numpy, and the slot count.

Caches are static buffers of a fixed capacity, written in place at an index. Executors do not report a write
beyond the capacity, so the runtime checks it here first.
"""

from __future__ import annotations

import numpy as np

from ..bundle.tensors import present_name, shape_from_symbols
from ..errors import InputError
from ..sessions import Buffer, Session


def kv_cache_attention(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    past_key: np.ndarray,
    past_value: np.ndarray,
    write_indices: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`star::KVCacheAttention` in numpy: write S new positions at `write_indices`, then attend to the visible
    slots.

    query [B, h, S, D], key and value [B, KV, S, D], past_key and past_value [B, KV, C, D], write_indices
    int64 [B] -> output [B, h, S, D], present_key, present_value. Slot j is visible to query i iff j <=
    write_index + i. The contents of other slots, even NaN, do not matter. h / KV query heads share one key
    head. Raises InputError for a write beyond C.
    """
    (rows, heads, tokens, size), (_, kv_heads, capacity, _) = query.shape, past_key.shape
    for index in write_indices:
        check_capacity(int(index), tokens, capacity)
    slots = write_indices[:, None] + np.arange(tokens)  # [B, S]
    present_key, present_value = past_key.copy(), past_value.copy()
    for row in range(rows):
        present_key[row, :, slots[row]] = key[row].transpose(1, 0, 2)
        present_value[row, :, slots[row]] = value[row].transpose(1, 0, 2)
    visible = np.arange(capacity) <= slots[..., None]  # [B, S, C]
    used = np.expand_dims(visible.any(1), (1, 3))  # [B, 1, C, 1]
    shared = heads // kv_heads
    keys, values = (np.where(used, x, 0).repeat(shared, axis=1) for x in (present_key, present_value))
    scores = query @ keys.swapaxes(-1, -2) / np.sqrt(size).astype(query.dtype)  # [B, h, S, C]
    scores = np.where(visible[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ values, present_key, present_value


def codes_from_rows(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantise rows for an int8 cache: x [..., D] -> codes int8 [..., D] and one scale per row, float32
    [...].

    scale = max |x| / 127 and code = x / scale, rounded half to even, all in float32. A row of zeros has scale
    0.
    """
    x = x.astype(np.float32)
    scales = np.abs(x).max(-1) / np.float32(127)
    return np.rint(x / np.where(scales > 0, scales, 1)[..., None]).astype(np.int8), scales


def int8_cache_from_rows(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Pack codes [B, KV, C, D] and scales [B, KV, C] into the plugin's cache, int8 [B, KV, C, D + 4].

    The shape gives only the size: each [B, KV] is a plane of C * D codes followed by C scales, which keeps
    both aligned.
    """
    (rows, heads, capacity, size) = codes.shape
    scale_bytes = np.ascontiguousarray(scales, np.float32).view(np.int8)
    planes = np.concatenate([codes.reshape(rows, heads, -1), scale_bytes.reshape(rows, heads, -1)], -1)
    return planes.reshape(rows, heads, capacity, size + 4)


def rows_from_int8_cache(cache: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `int8_cache_from_rows`: (codes, scales).

    A row's values are codes * scale, rounded to the compute type.
    """
    rows, heads, capacity, wide = cache.shape
    planes, split = cache.reshape(rows, heads, -1), capacity * (wide - 4)
    codes, scales = planes[..., :split].reshape(rows, heads, capacity, wide - 4), planes[..., split:]
    return codes, np.ascontiguousarray(scales).view(np.float32)


def cache_buffers(session: Session, *, rows: int, capacity_tokens: int) -> dict[str, Buffer]:
    """Allocate zeroed buffers for all caches of a decoder `session`, by their `past_key_values.` names."""
    symbols = {"B": rows, "C": capacity_tokens}
    buffers: dict[str, Buffer] = {}
    for tensor in session.spec.inputs:
        if present_name(tensor.name):
            buffers[tensor.name] = session.buffer(shape_from_symbols(tensor.shape, symbols), tensor.dtype)
    return buffers


class Slots:
    """Counts the written slots of `capacity_tokens`. All rows and all decoders of a task advance together."""

    def __init__(self, capacity_tokens: int):
        self.capacity_tokens, self.used_tokens = capacity_tokens, 0

    def take(self, tokens: int) -> int:
        """Claim the next `tokens` slots and return the first, the write index.

        Raises InputError if they do not fit.
        """
        check_capacity(self.used_tokens, tokens, self.capacity_tokens)
        first, self.used_tokens = self.used_tokens, self.used_tokens + tokens
        return first

    def rewind(self, used_tokens: int) -> None:
        """Free all slots from `used_tokens` on, to be written again.

        Raises InputError if they were never written.
        """
        if not 0 <= used_tokens <= self.used_tokens:
            raise InputError(
                "The cache cannot be rewound to this slot",
                where=f"cache: expected 0 to {self.used_tokens} tokens, got {used_tokens}",
                fix="rewind to a slot that has been written",
            )
        self.used_tokens = used_tokens


def check_capacity(first: int, tokens: int, capacity_tokens: int) -> None:
    """Raise InputError with both numbers unless `tokens` slots from `first` on fit the capacity."""
    if first < 0 or tokens < 1 or first + tokens > capacity_tokens:
        raise InputError(
            "The cache is too small",
            where=f"cache: expected slots within 0 to {capacity_tokens}, got {tokens} from {first} on "
            f"({first + tokens} tokens)",
            fix="shorten the prompt, or build with a larger capacity",
        )
