"""Rotary embedding, KV-cache update and attention. Quotations are from TensorRT's NvInfer.h (11.1)."""

from __future__ import annotations

import numpy as np

from .parsed import Compute, Layer, Reader
from .reductions import softmax_of


def rotary_embedding(layer: Layer) -> Compute:
    """IRotaryEmbeddingLayer: rotate pairs (a, b) of the first R dimensions to (a cos - b sin, a sin + b cos).

    The input is [B,h,S,D]. Cosine and sine are [B,S,R/2], or [positions,R/2] and indexed by input 3,
    positionIds [B,S]. R is `rotary_embedding_dim`, or D where that is 0. The pairs are two halves, or
    neighbours if `interleaved`. The rotation is that of Su et al., 2021 (arXiv 2104.09864), which the layer
    cites.
    """
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
    """IKVCacheUpdateLayer, LINEAR: write the new positions in the cache's own memory.

    "output[i, :, writeIndices[i] + s, :] = update[i, :, s, :]"; "out-of-bound updates will be ignored
    silently".
    """
    mode, form, lengths = layer["cache_mode"], layer["update_form"], layer["update_lengths"]
    if (mode, form, lengths) != ("LINEAR", "PADDED_BHND", None):
        raise layer.refuse(f"{mode}, {form}, lengths {lengths}", "LINEAR, PADDED_BHND, no lengths")

    def compute(cache, update, write_indices):
        if (write_indices < 0).any():
            raise ValueError("a negative write index, which TensorRT does not define")
        for row, first in enumerate(write_indices.tolist()):
            count = max(min(update.shape[2], cache.shape[2] - first), 0)
            cache[row, :, first : first + count] = update[row, :, :count]
        return cache

    return compute


def attention_input(layer: Layer) -> Compute:
    """IAttention, all of it: BMM1, mask, normalisation and BMM2.

    The query is [B,h,S,D], key and value are [B,KV,C,D], and each KV head serves h/KV consecutive query
    heads; the result is [B,h,S,D]. There is no scale, because the parser multiplies query and key by it
    before. Inputs 3 to 6 are the mask, the quantisation scale, the query lengths and the key-value lengths.

    The mask is broadcast to [B,h,S,C]: "for a kBOOL mask, a True value indicates that the corresponding
    position is allowed to attend. For other data types, the mask values will be added". Causal UPPER_LEFT
    means "j <= i", LOWER_RIGHT "j <= i + (s_kv - s_q)". Lengths [B] are "per-batch lengths": slots beyond
    them are not keys.
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
        result = weights.reshape(rows, kv_heads, -1, slots) @ value
        return result.reshape(query.shape[:-1] + value.shape[-1:])

    return compute


def _visible(causal: str, tokens: int, slots: int) -> np.ndarray:
    """The keys that each query may see by its position: bool [S,C]."""
    offset = {"NONE": slots, "UPPER_LEFT": 0, "LOWER_RIGHT": slots - tokens}[causal]
    return np.arange(slots) <= np.arange(tokens)[:, None] + offset


def attention_output(layer: Layer) -> Compute:
    """IAttentionOutputLayer: the end of an attention, which its input layer has computed already."""
    return lambda x: x


def _check(layer: Layer) -> None:
    """Refuse attention that this module does not compute. Raises InputError."""
    causal, norm = layer["causal_kind"], layer["norm_op"]
    forms, query_lengths = (layer["query_form"], layer["key_value_form"]), layer["query_lengths"]
    if causal not in ("NONE", "UPPER_LEFT", "LOWER_RIGHT") or norm not in ("SOFTMAX", "NONE"):
        raise layer.refuse(f"causal kind {causal}, normalisation {norm}")
    if forms != ("PADDED_BHND", "PADDED_BHND") or query_lengths is not None or layer["num_ranks"] != 1:
        raise layer.refuse(
            f"forms {forms}, query lengths {query_lengths}, {layer['num_ranks']} ranks",
            "padded queries and keys",
        )
    if layer["normalization_quantize_scale"] is not None:
        raise layer.refuse("a quantised normalisation")
    if layer["key_value_lengths"] is not None and causal == "LOWER_RIGHT":
        raise layer.refuse("LOWER_RIGHT with lengths: TensorRT does not say which length counts")
    if layer["causal"] != (causal != "NONE"):
        raise layer.refuse(f"causal {layer['causal']} with causal kind {causal}")


READERS: dict[str, Reader] = {
    "ROTARY_EMBEDDING": rotary_embedding,
    "KV_CACHE_UPDATE": kv_cache_update,
    "ATTENTION_INPUT": attention_input,
    "ATTENTION_OUTPUT": attention_output,
}
