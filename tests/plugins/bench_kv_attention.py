"""Time and share of memory bandwidth of the kernels beside torch's attention, on a GPU:
`python tests/plugins/bench_kv_attention.py`.

Peers: `index_copy_` into the cache and `scaled_dot_product_attention` over the used slots (torch chooses the backend), and
FlashAttention with its KV cache where the package is installed. The bandwidth is that of a device copy of 1 GiB.
One line of JSON per measurement, the machine first.
"""
from __future__ import annotations

import json
import statistics

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from torch_kernels import Attention

HEADS = {"STAR-3B": (16, 2), "STAR-7B": (28, 4)}  # heads, key heads; head dim 128
ROUNDS, COLD_BYTES = 50, 512 << 20


def milliseconds(call) -> float:
    """Median over ROUNDS, the caches of the GPU flushed before each."""
    flush = torch.empty(COLD_BYTES // 4, dtype=torch.int32, device="cuda")
    times = []
    for _ in range(ROUNDS + 5):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[5:])


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a device copy."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (milliseconds(lambda: target.copy_(source)) / 1e3)


def measure(name: str, *, rows: int, heads: int, kv_heads: int, new: int, capacity: int, first: int, bandwidth: float,
            int8: bool = False) -> None:
    """Print one line for the kernels and for each peer."""
    def normal(*shape):
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    query, key, value = normal(rows, heads, new, 128), normal(rows, kv_heads, new, 128), normal(rows, kv_heads, new, 128)
    caches = [normal(rows, kv_heads, capacity, 128) for _ in range(2)]
    ours = [torch.zeros(rows, kv_heads, capacity, 132, dtype=torch.int8, device="cuda") for _ in range(2)] if int8 else caches
    slots, used = torch.arange(first, first + new, device="cuda"), first + new
    bias = causal_lower_right(new, used)

    def with_sdpa():
        for cache, x in zip(caches, (key, value)):
            cache.index_copy_(2, slots, x)
        keys, values = (cache[:, :, :used] for cache in caches)
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=None if new == 1 else bias, enable_gqa=True)

    calls = {"star": Attention(query, key, value, *ours, torch.full((rows,), first, device="cuda")), "sdpa": with_sdpa}
    if flash := _flash(query, key, value, caches, first):
        calls["flash-attn"] = flash
    for peer, call in calls.items():
        moved = 2 * rows * kv_heads * used * (132 if int8 and peer == "star" else 256)  # a cache row in bytes
        time = milliseconds(call)
        share = round(moved / (time / 1e3) / bandwidth, 3)
        print(json.dumps({"case": name, "peer": peer, "rows": rows, "new": new, "used": used, "cache_bytes": moved,
                          "ms": round(time, 4), "share_of_copy_bandwidth": share}), flush=True)


def _flash(query, key, value, caches, first):
    try:
        from flash_attn import flash_attn_with_kvcache
    except ImportError:
        return None
    tokens_first = [x.transpose(1, 2).contiguous() for x in (query, key, value, *caches)]
    lengths = torch.full((query.shape[0],), first, dtype=torch.int32, device="cuda")
    q, k, v, key_cache, value_cache = tokens_first
    return lambda: flash_attn_with_kvcache(q, key_cache, value_cache, k, v, cache_seqlens=lengths, causal=True)


def main() -> None:
    bandwidth = copy_bandwidth()
    print(json.dumps({"gpu": torch.cuda.get_device_name(), "capability": torch.cuda.get_device_capability(),
                      "torch": torch.__version__, "cuda": torch.version.cuda, "copy_bytes_per_s": round(bandwidth)}), flush=True)
    for model, (heads, kv_heads) in HEADS.items():
        sizes = {"heads": heads, "kv_heads": kv_heads, "bandwidth": bandwidth}
        for used in (640, 960, 1280):
            measure(f"{model} decode", rows=2, new=1, capacity=1280, first=used - 1, **sizes)
        measure(f"{model} decode, int8", rows=2, new=1, capacity=1280, first=1279, int8=True, **sizes)
        for new in (64, 1250):
            measure(f"{model} prefill", rows=2, new=new, capacity=1280, first=0, **sizes)
    for rows in (4, 8):  # caches of 64 MB and 128 MB: bandwidth, not latency
        measure("large cache", rows=rows, heads=32, kv_heads=8, new=1, capacity=4096, first=4095, bandwidth=bandwidth)
    measure("large cache, int8", rows=8, heads=32, kv_heads=8, new=1, capacity=4096, first=4095, bandwidth=bandwidth, int8=True)


if __name__ == "__main__":
    main()
