"""The shapes of bench_kv_attention.py, and a call for each: of the kernels, and of each of their peers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

from tests.helpers.torch_kernels import Attention

DIM = 128


@dataclass(frozen=True)
class Shape:
    name: str
    rows: int
    heads: int
    kv_heads: int
    new: int
    used: int  # slots after the call
    capacity: int = 1280
    int8: bool = False

    def moved_bytes(self, peer: str) -> int:
        """Of the caches, read once."""
        return (
            2 * self.rows * self.kv_heads * self.used * (DIM + 4 if self.int8 and peer == "star" else 2 * DIM)
        )


MODELS = (("STAR-3B", 16, 2), ("STAR-7B", 28, 4))  # heads, key heads
CALLS = ((1, 640), (1, 960), (1, 1280), (1, 1280, "int8"), (64, 64), (1250, 1250))  # new, used
LARGE = ((4, 8), (8, 8), (8, 16), (8, 32), (8, 8, "int8"), (8, 32, "int8"))  # rows, key heads
SHAPES = [
    Shape(
        ", ".join((f"{model} {'prefill' if new > 1 else 'decode'}", *int8)),
        2,
        h,
        kv,
        new,
        used,
        int8=bool(int8),
    )
    for model, h, kv in MODELS
    for new, used, *int8 in CALLS
]
SHAPES += [  # bandwidth, not latency
    Shape(", ".join(("large cache", *int8)), rows, 4 * kv, kv, 1, 4096, 4096, bool(int8))
    for rows, kv, *int8 in LARGE
]


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def inputs(shape: Shape) -> list[torch.Tensor]:
    """query, key, value, key cache, value cache"""
    sizes = [
        (shape.heads, shape.new),
        *[(shape.kv_heads, shape.new)] * 2,
        *[(shape.kv_heads, shape.capacity)] * 2,
    ]
    return [normal(shape.rows, heads, tokens, DIM) for heads, tokens in sizes]


def int8_cache(shape: Shape) -> torch.Tensor:
    """[B, KV, C, D + 4]: every plane its codes, then its scales."""
    planes = torch.randint(
        -127, 128, (shape.rows, shape.kv_heads, shape.capacity * (DIM + 4)), dtype=torch.int8, device="cuda"
    )
    planes[..., shape.capacity * DIM :].view(torch.float32).fill_(0.02)
    return planes.view(shape.rows, shape.kv_heads, shape.capacity, DIM + 4)


def star(shape: Shape, **layout):
    query, key, value, *caches = inputs(shape)
    caches = [int8_cache(shape) for _ in caches] if shape.int8 else caches
    return Attention(
        query, key, value, *caches, torch.full((shape.rows,), shape.used - shape.new, device="cuda"), **layout
    )


def sdpa(shape: Shape):
    query, key, value, *caches = inputs(shape)
    slots = torch.arange(shape.used - shape.new, shape.used, device="cuda")
    assert shape.new in (1, shape.used)  # is_causal means the upper left

    def call():
        for cache, x in zip(caches, (key, value)):
            cache.index_copy_(2, slots, x)
        keys, values = (cache[:, :, : shape.used] for cache in caches)
        return F.scaled_dot_product_attention(query, keys, values, is_causal=shape.new > 1, enable_gqa=True)

    return call


def flash_attn(shape: Shape):
    from flash_attn import flash_attn_with_kvcache

    q, k, v, key_cache, value_cache = (x.transpose(1, 2).contiguous() for x in inputs(shape))
    lengths = torch.full((shape.rows,), shape.used - shape.new, dtype=torch.int32, device="cuda")
    return lambda: flash_attn_with_kvcache(
        q, key_cache, value_cache, k, v, cache_seqlens=lengths, causal=True
    )


PEERS = {
    "star": (star, None),
    "sdpa": (sdpa, None),
    "sdpa flash": (sdpa, SDPBackend.FLASH_ATTENTION),
    "sdpa cudnn": (sdpa, SDPBackend.CUDNN_ATTENTION),
    "sdpa efficient": (sdpa, SDPBackend.EFFICIENT_ATTENTION),
    "flash-attn": (flash_attn, None),
}
