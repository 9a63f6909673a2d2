"""Facts about this machine and what it can build and run, for the command line to print."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable
from dataclasses import dataclass

from . import plugins
from .errors import MissingError, StarError, install
from .targets import RTX_PLATFORMS, TARGETS, Target, host_platform
from .tensorrt.build import check_buildable
from .tensorrt.device import Gpu, driver_version, gpus
from .tensorrt.graphs import loop_facts
from .tensorrt.module import check_runnable, tensorrt_of

RUNTIME = ("numpy", "pillow", "tokenizers", "jinja2", "tqdm")
ORT = ("onnxruntime", "onnxruntime-gpu")
TENSORRT = ("tensorrt-rtx-cu13", "tensorrt", "cuda-python")
EXPORT = ("torch", "onnx", "onnx-ir", "onnxscript", "safetensors", "transformers")
PACKAGES = RUNTIME + ORT + TENSORRT + EXPORT


@dataclass(frozen=True)
class TargetFacts:
    """Why plans of a target cannot be built or run here, on one line; None where they can."""

    name: str
    device: str
    no_build: str | None
    no_run: str | None


@dataclass(frozen=True)
class Facts:
    """All facts that `doctor` reports.

    `packages` maps names to versions, or to None for packages that are not installed. `driver` is the newest
    CUDA version that the driver supports. `no_gpu` tells why `gpus` is empty. `loop` tells how the
    image-token loop of TensorRT plans runs, None without a GPU. `advice` tells what to do.
    """

    python: str
    platform: str
    system: str
    packages: dict[str, str | None]
    driver: str | None
    gpus: tuple[Gpu, ...]
    no_gpu: str | None
    loop: str | None
    targets: tuple[TargetFacts, ...]
    advice: tuple[str, ...]


def facts() -> Facts:
    """Inspect this machine. Imports executors but loads no model, and never raises for a missing part."""
    packages = {name: installed_version(name) for name in PACKAGES}
    devices: tuple[Gpu, ...] = ()
    no_gpu, driver = None, None
    try:
        driver = driver_version()
        devices = gpus()
    except MissingError as error:
        no_gpu = one_line(error)
    targets = tuple(
        TargetFacts(
            t.name,
            t.device,
            no_build=refusal(t, check_buildable, check_plugin),
            no_run=refusal(t, check_runnable, check_plugin),
        )
        for t in TARGETS.values()
    )
    return Facts(
        python=platform.python_version(),
        platform=host_platform(),
        system=platform.platform(),
        packages=packages,
        driver=driver,
        gpus=devices,
        no_gpu=no_gpu,
        loop=loop_facts() if devices else None,
        targets=targets,
        advice=advice(packages, targets, has_gpu=bool(devices)),
    )


def installed_version(name: str) -> str | None:
    """Version of a distribution, or None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_plugin(target: Target) -> None:
    """Raise StarError if a classic target's plugin library is missing or built for another TensorRT."""
    if target.dialect == "classic":
        version = tensorrt_of(target).__version__
        plugins.check_library(plugins.find_library(), abi=plugins.ABI, tensorrt=version)


def refusal(target: Target, *checks: Callable[[Target], None]) -> str | None:
    """The message of the first of `checks` that fails for `target`, on one line; None if all pass."""
    try:
        for check in checks:
            check(target)
    except StarError as error:
        return one_line(error)
    return None


def one_line(error: StarError) -> str:
    return f"{error.what} ({error.where})"


def advice(
    packages: dict[str, str | None], targets: tuple[TargetFacts, ...], *, has_gpu: bool
) -> tuple[str, ...]:
    """What to install or remove so that this machine can run a bundle."""
    lines = []
    if all(packages[name] for name in ORT):
        lines.append("onnxruntime and onnxruntime-gpu overwrite each other: uninstall both, then install one")
    runs_plans = any(target.no_run is None for target in targets)
    if not any(packages[name] for name in ORT) and not runs_plans:
        lines.append(
            f"no installed executor runs a bundle: {install('cpu')} (or [cuda], [rtx], [jetpack], [tensorrt])"
        )
    if not packages["tensorrt-rtx-cu13"] and host_platform() in RTX_PLATFORMS:
        lines.append(f"to build plans for RTX GPUs, which needs no GPU: {install('rtx')}")
    if has_gpu and not runs_plans:
        lines.append(
            "this GPU cannot run plans yet: install the TensorRT of its target "
            "(RTX: [rtx]; JetPack before 7.2: [jetpack] and the plugin; else [tensorrt])"
        )
    return tuple(lines)
