"""What an export and a build take: disk, memory and time, and their refusal before they start.

The constants are the model of `docs/figures.md`, "Plans"; what a refusal demands is less than the expected
need, because it must hold for every export and every build.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from .machine import check_disk, check_memory
from .sizes import Sizes

# Export: the peak is a base (torch, tracing) and copies of the largest tensor in float32. STAR-3B in int4
# took 2.6 GB and 425 seconds on two cores.
EXPORT_BASE_BYTES, EXPORT_TENSORS = 650_000_000, 1.6
EXPORT_BASE_S, EXPORT_S_PER_GB = 30, 16  # seconds, and per gigabyte of the weights in fp32
EXPORT_FLOOR_BYTES = 100_000_000  # what any export takes beyond the packages that it has imported
# Build: the peak is a base (TensorRT) and copies of the largest graph's weights. STAR-3B in int4 took 2.7 GB
# and 150 seconds beside other work.
BUILD_BASE_BYTES, BUILD_COPIES = 100_000_000, 2.1
BUILD_GRAPH_S, BUILD_S_PER_GB = 0.6, 25  # seconds for each graph, and per gigabyte of weights
# Size of a plan / that of its graph's weights: what is expected, and the least of any plan seen.
PLAN_SHARE, PLAN_FLOOR = 1.1, 1.0


def export_memory(largest_tensor_bytes: int) -> int:
    """Expected peak of an export whose largest tensor has this size in float32."""
    return EXPORT_BASE_BYTES + round(EXPORT_TENSORS * largest_tensor_bytes)


def export_seconds(fp32: Sizes) -> float:
    """Expected time of an export in any precision: each reads, rounds and checks the same tensors."""
    return EXPORT_BASE_S + EXPORT_S_PER_GB * fp32.weights_bytes / 1e9


def build_memory(sizes: Sizes) -> int:
    """Expected peak of a build of all components, one after the other."""
    return BUILD_BASE_BYTES + round(BUILD_COPIES * max(sizes.graphs.values()))


def build_seconds(sizes: Sizes) -> float:
    """Expected time of a build for one target."""
    return BUILD_GRAPH_S * len(sizes.graphs) + BUILD_S_PER_GB * sum(sizes.graphs.values()) / 1e9


def plans_bytes(sizes: Sizes) -> int:
    """Expected size of the plans for one target."""
    return round(PLAN_SHARE * sum(sizes.graphs.values()))


def check_export(sizes: Sizes, out: Path, *, converted_bytes: int, staged: Path | None = None) -> None:
    """Refuse an export whose weights alone are larger than the free disk, or whose work needs more memory.

    `converted_bytes` is the size in float32 of the largest tensor that is rounded or quantised. What lies in
    the folder `staged` is written already. Raises MissingError.
    """
    what = f"export {sizes.model.name} in {sizes.precision}"
    check_memory(
        EXPORT_FLOOR_BYTES + converted_bytes,
        what=what,
        fix="close other programs, or export on a machine with more memory",
    )
    check_disk(
        sizes.weights_bytes - (folder_bytes(staged) if staged else 0),
        out.parent,
        what=what,
        fix="free some space, give --out on another disk, or export with a smaller --precision",
    )


def check_build(sizes: Sizes, folder: Path, absent: Sequence[str]) -> None:
    """Refuse a build of the plans `absent` (a graph's name for each) whose disk in `folder`, or memory for
    the largest graph, is not free. Raises MissingError."""
    if not absent:
        return
    what = f"build {sizes.model.name} in {sizes.precision}"
    check_memory(
        max(sizes.graphs[name] for name in absent),
        what=what,
        fix="close other programs, or build on a machine with more memory",
    )
    check_disk(
        round(PLAN_FLOOR * sum(sizes.graphs[name] for name in absent)),
        folder,
        what=what,
        fix="free some space, or build fewer targets or --components",
    )


def folder_bytes(folder: Path) -> int:
    """Size of the files in a folder and below; 0 where there is none."""
    return sum(os.lstat(Path(here) / name).st_size for here, _, names in os.walk(folder) for name in names)
