"""The device table: for each target its builder, dialect, precisions, memory and bandwidth.

Everything that differs between targets is a row here. Memory, bandwidth and operations are the vendors'
nominal figures.
The precisions of SM 7.5, 8.6, 8.9 and 12.0 were built with TensorRT for RTX 1.7.1; those of the others come
from NVIDIA's support matrices.
"""

from __future__ import annotations

import difflib
import platform
import re
import sys
from dataclasses import dataclass
from typing import NamedTuple

from .errors import UsageError

RTX_PLATFORMS = ("linux-x86_64", "windows-x86_64")
ARM = ("linux-aarch64",)
TURING = ("fp16",)
AMPERE = ("fp16", "bf16", "int8", "int4")
ADA = (*AMPERE, "fp8")
BLACKWELL = (*ADA, "nvfp4")  # nvfp4 in the modern dialect only
MIXED = ("int8", "int4")  # the formats of a bundle in mixed precision
_PROCESSORS = {"amd64": "x86_64", "arm64": "aarch64"}


@dataclass(frozen=True)
class Target:
    """One device. A plan is valid for its `compute_capability`, TensorRT version and platform.

    `builder` is the module that builds and runs its plans: `tensorrt_rtx` builds on any CPU of `platforms`,
    `tensorrt` only on the device. `tensorrt` is the oldest version of that module that works. `precisions`
    are the bundle precisions that the device supports. `operations_per_s` is what its tensor cores do in 16
    bits at most, with sums in float32 and dense weights.
    """

    name: str
    device: str
    compute_capability: tuple[int, int]
    builder: str  # tensorrt_rtx or tensorrt
    tensorrt: str
    dialect: str  # modern or classic
    precisions: tuple[str, ...]
    platforms: tuple[str, ...]
    memory_bytes: int
    bandwidth_bytes_per_s: int
    operations_per_s: int
    jetpack: str | None = None

    @property
    def sm(self) -> str:
        """The architecture in NVIDIA's short form: `sm_86`."""
        return sm_from_capability(self.compute_capability)

    def runs(self, precision: str) -> bool:
        """Whether the device supports a bundle of this precision; `mixed` needs all of its formats."""
        return set(MIXED if precision == "mixed" else (precision,)) <= set(self.precisions)


class _Software(NamedTuple):
    builder: str
    tensorrt: str
    dialect: str
    platforms: tuple[str, ...]
    jetpack: str | None = None


def _row(
    name, device, capability, software: _Software, precisions, memory_gb, gigabytes_per_s, teraflops
) -> Target:
    return Target(
        name=name,
        device=device,
        compute_capability=capability,
        precisions=precisions,
        memory_bytes=memory_gb * 10**9,
        bandwidth_bytes_per_s=round(gigabytes_per_s * 10**9),
        operations_per_s=round(teraflops * 10**12),
        **software._asdict(),
    )


_RTX = _Software("tensorrt_rtx", "1.7", "modern", RTX_PLATFORMS)
_SPARK = _Software("tensorrt_rtx", "1.7", "modern", ARM)
_SERVER = _Software("tensorrt", "10.15", "modern", RTX_PLATFORMS)
_JETPACK_62 = _Software("tensorrt", "10.3", "classic", ARM, "6.2")
_JETPACK_71 = _Software("tensorrt", "10.13", "classic", ARM, "7.1")
_JETPACK_72 = _Software("tensorrt", "11.4", "modern", ARM, "7.2.2")

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        _row("rtx-2080-ti", "GeForce RTX 2080 Ti", (7, 5), _RTX, TURING, 11, 616, 53.8),
        _row("a100", "A100 80 GB", (8, 0), _RTX, AMPERE, 80, 2039, 312),
        _row("rtx-3060", "GeForce RTX 3060 12 GB", (8, 6), _RTX, AMPERE, 12, 360, 25.5),
        _row("rtx-3090", "GeForce RTX 3090", (8, 6), _RTX, AMPERE, 24, 936, 71),
        _row("rtx-4060", "GeForce RTX 4060", (8, 9), _RTX, ADA, 8, 272, 30.2),
        _row("rtx-4090", "GeForce RTX 4090", (8, 9), _RTX, ADA, 24, 1008, 165),
        _row("rtx-5070", "GeForce RTX 5070", (12, 0), _RTX, BLACKWELL, 12, 672, 61.7),
        _row("rtx-5090", "GeForce RTX 5090", (12, 0), _RTX, BLACKWELL, 32, 1792, 209.5),
        _row("dgx-spark", "DGX Spark (GB10)", (12, 1), _SPARK, BLACKWELL, 128, 273, 125),
        _row("h100", "H100 SXM", (9, 0), _SERVER, ADA, 80, 3350, 989),
        _row("h200", "H200 SXM", (9, 0), _SERVER, ADA, 141, 4800, 989),
        _row("orin-nano-jp62", "Jetson Orin Nano Super 8 GB", (8, 7), _JETPACK_62, AMPERE, 8, 68, 17),
        _row("orin-nx-jp62", "Jetson Orin NX 16 GB", (8, 7), _JETPACK_62, AMPERE, 16, 102.4, 19.4),
        _row("orin-agx-jp62", "Jetson AGX Orin 64 GB", (8, 7), _JETPACK_62, AMPERE, 64, 204.8, 43),
        _row("orin-agx-jp72", "Jetson AGX Orin 64 GB", (8, 7), _JETPACK_72, AMPERE, 64, 204.8, 43),
        _row("thor-jp71", "Jetson AGX Thor", (11, 0), _JETPACK_71, ADA, 128, 273, 258),
        _row("thor-jp72", "Jetson AGX Thor", (11, 0), _JETPACK_72, BLACKWELL, 128, 273, 258),
    )
}


def target_from_name(name: str) -> Target:
    """The row `name`. Raises UsageError with the valid names, and with those that look like it."""
    if name not in TARGETS:
        raise UsageError(
            "No such target",
            where=f"target: expected one of {', '.join(TARGETS)}, got {name!r:.80}",
            fix=_meant(name),
        )
    return TARGETS[name]


def _meant(name: str) -> str:
    """What to write instead of `name`."""

    def bare(text: str) -> str:
        return re.sub("[^a-z0-9]", "", text.lower())

    if bare(name) in ("cpu", "cuda", "gpu", "onnxruntime"):
        backend = "onnxruntime" if bare(name) == "cpu" else "onnxruntime-cuda"
        return f"name a device to build plans for it; without plans, use --backend {backend}"
    alike = [known for known in TARGETS if bare(name) and bare(name) in bare(known)]
    alike = alike or difflib.get_close_matches(name.lower(), TARGETS, 1)
    return f"did you mean {' or '.join(alike)}?" if alike else "`star-export targets` describes them"


def sm_from_capability(capability: tuple[int, int]) -> str:
    """`sm_120` for (12, 0)."""
    return f"sm_{capability[0]}{capability[1]}"


def host_platform() -> str:
    """This machine's platform as the table names it: `linux-x86_64`, `windows-x86_64` or `linux-aarch64`."""
    system = "windows" if sys.platform == "win32" else sys.platform
    machine = platform.machine().lower()
    return f"{system}-{_PROCESSORS.get(machine, machine)}"
