"""Rotary embedding, KV-cache update and attention. Quotations are of TensorRT's NvInfer.h (11.1)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .parsed import Layer
from .reductions import softmax_of

Compute = Callable[..., np.ndarray]


def rotary_embedding(layer: Layer) -> Compute:
    """IRotaryEmbeddingLayer: input [B,h,S,D], cosine and sine [B,S,R/2], or [positions,R/2] read at input 3, positionIds
    [B,S]; the first R dimensions turn, all of them where `rotary_embedding_dim` is 0. Pairs are two halves, or neighbours if
    `interleaved`. Turned by Su et al., 2021 (arXiv 2104.09864), which the layer names: (a cos - b sin, a sin + b cos)."""
    interleaved, size = layer["interleaved"], layer["rotary_embedding_dim"]

    def compute(x, cos, sin, positions=None):
        cos, sin = ((t if positions is None else t[positions])[:, None] for t in (cos, sin))  # [B,1,S,R/2]
        turning, rest = np.split(x, [size or x.shape[-1]], axis=-1)
        a, b = (turning[..., 0::2], turning[..., 1::2]) if interleaved else np.split(turning, 2, axis=-1)
        pair = a * cos - b * sin, a * sin + b * cos
        turned = np.stack(pair, -1).reshape(turning.shape) if interleaved else np.concatenate(pair, -1)
        return np.concatenate([turned, rest], -1)

    return compute


def kv_cache_update(layer: Layer) -> Compute:
    """IKVCacheUpdateLayer, LINEAR: "output[i, :, writeIndices[i] + s, :] = update[i, :, s, :]", in the cache's own memory;
    "out-of-bound updates will be ignored silently"."""
    if (layer["cache_mode"], layer["update_form"], layer["update_lengths"]) != (
        "LINEAR",
        "PADDED_BHND",
        None,
    ):
        raise layer.refuse(
            f"{layer['cache_mode']}, {layer['update_form']}, lengths {layer['update_lengths']}",
            "LINEAR, PADDED_BHND, no lengths",
        )

    def compute(cache, update, write_indices):
        if (write_indices < 0).any():
            raise ValueError("a negative write index, which TensorRT does not define")
        for row, first in enumerate(write_indices.tolist()):
            count = max(min(update.shape[2], cache.shape[2] - first), 0)
            cache[row, :, first : first + count] = update[row, :, :count]
        return cache

    return compute


def attention_input(layer: Layer) -> Compute:
    """IAttention, whole: BMM1, mask, normalisation, BMM2. Query [B,h,S,D], key and value [B,KV,C,D], each KV head for h/KV query
    heads in a row -> [B,h,S,D]. There is no scale: the parser multiplies query and key before.

    Mask, broadcast to [B,h,S,C]: "for a kBOOL mask, a True value indicates that the corresponding position is allowed to
    attend. For other data types, the mask values will be added". Causal: UPPER_LEFT "j <= i", LOWER_RIGHT "j <= i + (s_kv -
    s_q)". Lengths [B]: "per-batch lengths", the slots beyond are not keys. Inputs 3 to 6: mask, quantisation scale, query
    lengths, key-value lengths.
    """
    _check(layer)
    causal, softmax = layer["causal_kind"], layer["norm_op"] == "SOFTMAX"

    def compute(query, key, value, mask=None, scale=None, query_lengths=None, lengths=None):
        (rows, heads, tokens, size), (_, kv_heads, slots, _) = query.shape, key.shape
        grouped = query.reshape(rows, kv_heads, heads // kv_heads * tokens, size)
        scores = (grouped @ key.swapaxes(-1, -2)).reshape(rows, heads, tokens, slots)
        if mask is not None:
            scores = np.where(mask, scores, -np.inf) if mask.dtype == np.bool_ else scores + mask
        visible = _visible(causal, tokens, slots)
        if lengths is not None:
            visible = visible & (np.arange(slots) < lengths.reshape(-1, 1, 1, 1))
        scores = np.where(visible, scores, -np.inf if softmax else 0).astype(np.float32)
        weights = softmax_of(scores) if softmax else scores
        return (weights.reshape(rows, kv_heads, -1, slots) @ value).reshape(
            query.shape[:-1] + value.shape[-1:]
        )

    return compute


def _visible(causal: str, tokens: int, slots: int) -> np.ndarray:
    """Which keys each query may see by position: bool [S,C]."""
    last = (
        np.arange(tokens)[:, None] + {"NONE": slots, "UPPER_LEFT": 0, "LOWER_RIGHT": slots - tokens}[causal]
    )
    return np.arange(slots) <= last


def attention_output(layer: Layer) -> Compute:
    """IAttentionOutputLayer: the end of the attention that the input layer begins, which computes all of it."""
    return lambda x: x


def _check(layer: Layer) -> None:
    """Refuse what this module does not compute."""
    forms = layer["query_form"], layer["key_value_form"]
    lengths = layer["key_value_lengths"] is not None
    if layer["causal_kind"] not in ("NONE", "UPPER_LEFT", "LOWER_RIGHT") or layer["norm_op"] not in (
        "SOFTMAX",
        "NONE",
    ):
        raise layer.refuse(f"causal kind {layer['causal_kind']}, normalisation {layer['norm_op']}")
    if (
        forms != ("PADDED_BHND", "PADDED_BHND")
        or layer["query_lengths"] is not None
        or layer["num_ranks"] != 1
    ):
        raise layer.refuse(
            f"forms {forms}, query lengths {layer['query_lengths']}, {layer['num_ranks']} ranks",
            "padded queries and keys",
        )
    if layer["normalization_quantize_scale"] is not None:
        raise layer.refuse("a quantised normalisation")
    if lengths and layer["causal_kind"] == "LOWER_RIGHT":
        raise layer.refuse("LOWER_RIGHT with lengths: TensorRT does not say which length counts")
    if layer["causal"] != (layer["causal_kind"] != "NONE"):
        raise layer.refuse(f"causal {layer['causal']} with causal kind {layer['causal_kind']}")


READERS = {
    "ROTARY_EMBEDDING": rotary_embedding,
    "KV_CACHE_UPDATE": kv_cache_update,
    "ATTENTION_INPUT": attention_input,
    "ATTENTION_OUTPUT": attention_output,
}
