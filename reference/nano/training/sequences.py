"""Decoders on whole sequences with gradients, where several rows may share a prompt, computed once.

The release's decoder writes into a cache of fixed capacity (`reference/decoder.py`); here past keys and
values are passed on as new tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...decoder import Decoder

# Of a layer: keys and values of the prompt, [P, KV, L, D], and of what came after it, [B, KV, T, D].
Past = tuple[Tensor, ...]


def through(
    decoder: Decoder,
    x: Tensor,
    positions: Tensor,
    past: list[Past] | None = None,
    shown: Tensor | None = None,
) -> tuple[list[Tensor], list[Past]]:
    """Run a decoder with `grouped_attention`.

    x [B, S, H], positions [3, B, S], `shown` as there -> hidden states [B, S, H] after each layer and after
    the final norm, and the new past.
    """
    cos, sin = (t.to(x.dtype) for t in decoder.rotary(positions))
    states, now = [], []
    for layer, layer_past in zip(decoder.layers, past or empty_past(decoder, x), strict=True):
        x, present = layer(x, cos, sin, layer_past, x, shown)
        states.append(x)
        now.append(present)
    return [*states, decoder.norm(x)], now


def empty_past(decoder: Decoder, like: Tensor) -> list[Past]:
    """An empty past for each layer."""
    config = decoder.config
    nothing = like.new_zeros(len(like), config.num_kv_heads, 0, config.head_dim)
    return [(nothing,) * 4] * len(decoder.layers)


def behind_prompt(past: list[Past], times: int) -> list[Past]:
    """The past as the prompt of `times` rows each."""
    return [
        (key, value, *(key.new_zeros(len(key) * times, key.shape[1], 0, key.shape[3]),) * 2)
        for _, _, key, value in past
    ]


def grouped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    _: Tensor,
    shown: Tensor | None,
) -> tuple[Tensor, ...]:
    """`decoder.kv_cache_attention` for groups of rows that share a prompt, or have none.

    query [B, heads, S, D], key and value [B, KV, S, D], prompt_key and prompt_value [P, KV, L, D], past_key
    and past_value [B, KV, T, D], shown [P, L]: 0, or -inf where the prompt has ended, or None if no prompt is
    padded -> output [B, heads, S, D] and the new past.

    It is written out because on a CPU, in bfloat16 and at these lengths, the gradient of torch's fused
    attention takes three times as long.
    """
    batch, heads, length, width = query.shape
    groups, kv_heads, before, _ = prompt_key.shape
    each, ahead = batch // groups, past_key.shape[2]
    if ahead:
        key, value = torch.cat([past_key, key], dim=2), torch.cat([past_value, value], dim=2)
    grouped = (query * width**-0.5).reshape(batch * kv_heads, heads // kv_heads * length, width)
    scores = grouped @ key.reshape(batch * kv_heads, ahead + length, width).transpose(1, 2)
    if length > 1:
        hidden = torch.full((length, ahead + length), float("-inf"), dtype=scores.dtype, device=scores.device)
        scores = scores.view(batch * kv_heads, -1, length, ahead + length) + hidden.triu(ahead + 1)
        scores = scores.view(batch * kv_heads, -1, ahead + length)
    if before:
        alike = grouped.view(groups, each, kv_heads, -1, width).transpose(1, 2)
        alike = alike.reshape(groups * kv_heads, -1, width)
        to_prompt = alike @ prompt_key.reshape(groups * kv_heads, before, width).transpose(1, 2)
        to_prompt = to_prompt.view(groups, kv_heads, -1, before)
        if shown is not None:
            to_prompt = to_prompt + shown[:, None, None].to(scores.dtype)
        to_prompt = to_prompt.view(groups, kv_heads, each, -1, before).transpose(1, 2)
        scores = torch.cat([to_prompt.reshape(batch * kv_heads, -1, before), scores], dim=-1)
    weights = scores.softmax(-1).to(value.dtype)
    found = weights[..., before:] @ value.reshape(batch * kv_heads, ahead + length, width)
    if before:
        of_prompt = weights[..., :before].reshape(groups, each, kv_heads, -1, before).transpose(1, 2)
        of_prompt = of_prompt.reshape(groups * kv_heads, -1, before)
        of_prompt = of_prompt @ prompt_value.reshape(groups * kv_heads, before, width)
        found = found + of_prompt.view(groups, kv_heads, each, -1, width).transpose(1, 2).reshape(found.shape)
    return found.view(batch, heads, length, width), prompt_key, prompt_value, key, value
