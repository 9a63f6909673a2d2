"""The device table: what a plan is built for, by whom, in which dialect, and what the device can hold and read per second.

Everything that differs between targets is a row here. Memory and bandwidth are the vendors' nominal figures. The precisions of
SM 7.5, 8.6, 8.9 and 12.0 were built with TensorRT for RTX 1.7.1; the others' are in NVIDIA's support matrices.
"""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass

from .errors import UsageError

RTX_PLATFORMS = ("linux-x86_64", "windows-x86_64")
ARM = ("linux-aarch64",)
TURING = ("fp16",)
AMPERE = ("fp16", "bf16", "int8", "int4")
ADA = (*AMPERE, "fp8")
BLACKWELL = (*ADA, "nvfp4")
_PROCESSORS = {"amd64": "x86_64", "arm64": "aarch64"}


@dataclass(frozen=True)
class Target:
    """One device. A plan belongs to its `compute_capability`, its TensorRT and its platform.

    `builder` is the module that builds and runs its plans: `tensorrt_rtx` builds on any CPU of `platforms`, `tensorrt` only on
    the device. `tensorrt` is the oldest version of that module that will do. `precisions` are the bundle precisions it takes.
    """

    name: str
    device: str
    compute_capability: tuple[int, int]
    builder: str  # tensorrt_rtx tensorrt
    tensorrt: str
    dialect: str  # modern classic
    precisions: tuple[str, ...]
    platforms: tuple[str, ...]
    memory_bytes: int
    bandwidth_bytes_per_s: int
    jetpack: str | None = None

    @property
    def sm(self) -> str:
        """The architecture in NVIDIA's short form: `sm_86`."""
        return sm_from_capability(self.compute_capability)


def _rtx(name, device, capability, precisions, memory_gb, bandwidth_gb, platforms=RTX_PLATFORMS) -> Target:
    return Target(
        name=name,
        device=device,
        compute_capability=capability,
        builder="tensorrt_rtx",
        tensorrt="1.7",
        dialect="modern",
        precisions=precisions,
        platforms=platforms,
        memory_bytes=memory_gb * 10**9,
        bandwidth_bytes_per_s=round(bandwidth_gb * 10**9),
    )


def _on_device(
    name, device, capability, tensorrt, dialect, precisions, memory_gb, bandwidth_gb, jetpack=None
) -> Target:
    return Target(
        name=name,
        device=device,
        compute_capability=capability,
        builder="tensorrt",
        tensorrt=tensorrt,
        dialect=dialect,
        precisions=precisions,
        platforms=ARM if jetpack else RTX_PLATFORMS,
        memory_bytes=memory_gb * 10**9,
        bandwidth_bytes_per_s=round(bandwidth_gb * 10**9),
        jetpack=jetpack,
    )


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        _rtx("rtx-2080-ti", "GeForce RTX 2080 Ti", (7, 5), TURING, 11, 616),
        _rtx("a100", "A100 80 GB", (8, 0), AMPERE, 80, 2039),
        _rtx("rtx-3060", "GeForce RTX 3060 12 GB", (8, 6), AMPERE, 12, 360),
        _rtx("rtx-3090", "GeForce RTX 3090", (8, 6), AMPERE, 24, 936),
        _rtx("rtx-4060", "GeForce RTX 4060", (8, 9), ADA, 8, 272),
        _rtx("rtx-4090", "GeForce RTX 4090", (8, 9), ADA, 24, 1008),
        _rtx("rtx-5070", "GeForce RTX 5070", (12, 0), BLACKWELL, 12, 672),
        _rtx("rtx-5090", "GeForce RTX 5090", (12, 0), BLACKWELL, 32, 1792),
        _rtx("dgx-spark", "DGX Spark (GB10)", (12, 1), BLACKWELL, 128, 273, ARM),
        _on_device("h100", "H100 SXM", (9, 0), "10.15", "modern", ADA, 80, 3350),
        _on_device("h200", "H200 SXM", (9, 0), "10.15", "modern", ADA, 141, 4800),
        _on_device(
            "orin-nano-jp62", "Jetson Orin Nano Super 8 GB", (8, 7), "10.3", "classic", AMPERE, 8, 68, "6.2"
        ),
        _on_device(
            "orin-nx-jp62", "Jetson Orin NX 16 GB", (8, 7), "10.3", "classic", AMPERE, 16, 102.4, "6.2"
        ),
        _on_device(
            "orin-agx-jp62", "Jetson AGX Orin 64 GB", (8, 7), "10.3", "classic", AMPERE, 64, 204.8, "6.2"
        ),
        _on_device(
            "orin-agx-jp72", "Jetson AGX Orin 64 GB", (8, 7), "11.4", "modern", AMPERE, 64, 204.8, "7.2.2"
        ),
        _on_device("thor-jp71", "Jetson AGX Thor", (11, 0), "10.13", "classic", BLACKWELL, 128, 273, "7.1"),
        _on_device("thor-jp72", "Jetson AGX Thor", (11, 0), "11.4", "modern", BLACKWELL, 128, 273, "7.2.2"),
    )
}


def target_from_name(name: str) -> Target:
    """The row `name`. Raises UsageError listing the valid names."""
    if name not in TARGETS:
        raise UsageError(
            "No such target",
            where=f"target: expected one of {', '.join(TARGETS)}, got {name!r}",
            fix="use one of these names; `star-export targets` describes them",
        )
    return TARGETS[name]


def sm_from_capability(capability: tuple[int, int]) -> str:
    """`sm_120` for (12, 0)."""
    return f"sm_{capability[0]}{capability[1]}"


def host_platform() -> str:
    """System and processor of this machine in the table's words: `linux-x86_64`, `windows-x86_64`, `linux-aarch64`."""
    system = "windows" if sys.platform == "win32" else sys.platform
    machine = platform.machine().lower()
    return f"{system}-{_PROCESSORS.get(machine, machine)}"
