"""Time and share of memory bandwidth of the kernels beside torch's attention, on a GPU.

`python -m tests.plugins.bench_kv_attention [--profile | --configurations]`

Peers are `index_copy_` into the cache and `scaled_dot_product_attention` over the used slots, with the
backend that torch chooses ("sdpa") and with each one that takes the shape, and FlashAttention with its KV
cache where the package is installed. A line of JSON tells of the machine, of each measurement, and of each
shape's goals. `us` is one call whose caches are not in the GPU's own; `graph_us` is one of many in a CUDA
graph, each with other caches, as layers of a decoder follow each other.

`--profile` times every kernel of a call instead, and the whole call from the first kernel's start to the last
one's end. `--configurations` instead times the kernels in every configuration (kConfigs in kv_attention.h)
and number of splits that might suit, to choose by for another GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import statistics
from collections import Counter

import torch
from torch.nn.attention import sdpa_kernel

from tests.helpers.torch_kernels import library
from tests.plugins.bench_calls import PEERS, SHAPES, Shape, star

ROUNDS = 40
# read before each call: no cache keeps what the call needs, and the host gets ahead of the GPU meanwhile
COLD_BYTES = 1 << 30
GRAPH_BYTES, GRAPH_CALLS = 256 << 20, 128  # caches of a graph's calls, together; calls at most


def tell(line: dict) -> None:
    print(json.dumps(line), flush=True)


def timed(call, *, before) -> list[float]:
    """Microseconds of each of ROUNDS calls, with `before()` ahead of each and not counted."""
    times = []
    for _ in range(ROUNDS + 5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before()
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return times[5:]


def graph_of(calls: list) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # which makes the inputs
    with torch.cuda.stream(stream):
        calls[0]()  # what a first call sets up is not captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return graph


def measure(shape: Shape, *, bandwidth: float, flush) -> None:
    """A line for the kernels and for each peer, and one for the goals."""
    found = {}
    for peer, (make, backend) in PEERS.items():
        line = {
            "shape": shape.name,
            "peer": peer,
            "rows": shape.rows,
            "kv_heads": shape.kv_heads,
            "new": shape.new,
            "used": shape.used,
        }
        try:
            with sdpa_kernel(backend) if backend else contextlib.nullcontext():
                call, moved = make(shape), shape.moved_bytes(peer)
                rounds = timed(call, before=flush)
                found[peer] = statistics.median(rounds)
                calls = [make(shape) for _ in range(min(GRAPH_CALLS, 1 + GRAPH_BYTES // moved))]
                graph_rounds = [us / len(calls) for us in timed(graph_of(calls).replay, before=flush)]
                in_graph = statistics.median(graph_rounds)
        except (RuntimeError, ImportError) as error:
            tell(line | {"unavailable": str(error).splitlines()[0][:80]})
            continue
        plan = {"configuration": call.plan[0], "splits": call.plan[1]} if peer == "star" else {}
        tell(
            line
            | plan
            | {
                "cache_bytes": moved,
                "us": round(found[peer], 2),
                "graph_us": round(in_graph, 2),
                "share_of_copy_bandwidth": round(moved / found[peer] * 1e6 / bandwidth, 3),
                "graph_share": round(moved / in_graph * 1e6 / bandwidth, 3),
                "rounds_us": [round(us, 2) for us in rounds],
                "graph_rounds_us": [round(us, 3) for us in graph_rounds],
            }
        )
    ours = found.pop("star")
    best = min(found, key=found.get)
    share, speed = shape.moved_bytes("star") / ours * 1e6 / bandwidth, found[best] / ours
    goals = (
        {"0.7 of the best": speed >= 0.7}
        if shape.new > 1
        else {"not slower than sdpa": ours <= found["sdpa"]}
    )
    if shape.new == 1 and shape.moved_bytes("star") > 64e6:
        goals["0.8 of copy bandwidth"] = share >= 0.8
    tell(
        {
            "shape": shape.name,
            "used": shape.used,
            "best": best,
            "best_over_star": round(speed, 3),
            "sdpa_over_star": round(found["sdpa"] / ours, 3),
            "share": round(share, 3),
            "goals": goals,
        }
    )


def try_configurations(shape: Shape, *, bandwidth: float, flush) -> None:
    """A line for each layout of the call: decode by blocks per multiprocessor, prefill by configuration."""
    chosen = star(shape).plan
    per_split = shape.rows * shape.kv_heads
    processors = torch.cuda.get_device_properties().multi_processor_count
    several = [max(1, int(processors * blocks / per_split)) for blocks in (0.25, 0.5, 1, 2, 3, 4, 6)]
    plans = (
        [(0, splits) for splits in several]
        if shape.new == 1
        else [
            (configuration, splits)
            for configuration in range(1, library().star_configurations())
            for splits in (1, 2, 4)
        ]
    )
    seen = set()
    for plan in [chosen, *plans]:
        call = star(shape, plan=plan)
        if call.plan in seen:
            continue
        seen.add(call.plan)
        us = statistics.median(timed(call, before=flush))
        tell(
            {
                "shape": shape.name,
                "new": shape.new,
                "used": shape.used,
                "cache_bytes": shape.moved_bytes("star"),
                "configuration": call.plan[0],
                "splits": call.plan[1],
                "chosen": call.plan == chosen,
                "us": round(us, 2),
                "share_of_copy_bandwidth": round(shape.moved_bytes("star") / us * 1e6 / bandwidth, 3),
            }
        )


def profile(shape: Shape, *, flush) -> None:
    """A line for the kernels and one for torch's choice:
    microseconds by the driver's records, medians over ROUNDS."""
    for peer in ("star", "sdpa"):
        call = PEERS[peer][0](shape)
        call()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as records:
            for _ in range(ROUNDS):
                flush()
                call()
            torch.cuda.synchronize()
        events = sorted(
            (e for e in records.events() if e.device_type == torch.autograd.DeviceType.CUDA),
            key=lambda event: event.time_range.start,
        )
        rounds: list[list] = []
        for event in events:
            if "reduce_kernel" in event.name:
                rounds.append([])
            elif rounds and "Memset" not in event.name:  # the next flush's
                rounds[-1].append(event)
        totals = [Counter() for _ in rounds]
        for total, round_ in zip(totals, rounds):
            for event in round_:
                total[short(event.name)] += event.time_range.elapsed_us()
        spans = [r[-1].time_range.end - r[0].time_range.start for r in rounds if r]
        tell(
            {
                "shape": shape.name,
                "peer": peer,
                "new": shape.new,
                "used": shape.used,
                "span_us": median(spans),
                "kernels": {name: median(total[name] for total in totals) for name in totals[-1]},
            }
        )


def median(numbers) -> float:
    return round(statistics.median(numbers), 2)


def short(name: str) -> str:
    """A kernel's name without its arguments; of ours the work that it does."""
    ours = re.search(r"star::(Write|Attend|Merge)<", name)
    return ours[1] if ours else re.sub(r"^void |[<(].*", "", name)[-60:]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", action="store_true", help="time every kernel instead")
    parser.add_argument(
        "--configurations", action="store_true", help="time the kernels in other configurations instead"
    )
    chosen = parser.parse_args()
    cold = torch.ones(COLD_BYTES // 4, device="cuda")
    target = torch.empty_like(cold)

    def flush():  # by reading: after writing, the GPU would be busy with it for a while
        cold.sum()

    copies = [2 * COLD_BYTES / us * 1e6 for us in timed(lambda: target.copy_(cold), before=flush)]
    bandwidth = statistics.median(copies)
    tell(
        {
            "gpu": torch.cuda.get_device_name(),
            "capability": torch.cuda.get_device_capability(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "copy_bytes_per_s": round(bandwidth),
            "copies_bytes_per_s": [round(copy) for copy in copies],
        }
    )
    for shape in SHAPES:
        if chosen.profile:
            profile(shape, flush=flush)
        elif chosen.configurations:
            try_configurations(shape, bandwidth=bandwidth, flush=flush)
        else:
            measure(shape, bandwidth=bandwidth, flush=flush)


if __name__ == "__main__":
    main()
