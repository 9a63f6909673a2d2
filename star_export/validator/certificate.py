"""What a validation proved, where, and what it did not: `certificates/<backend>-<device>.json` in the bundle.

A certificate is for one bundle (the SHA-256 of its manifest, which lists that of every file), the plans that
ran, one backend and one device, and says whether it passed. Its own SHA-256 tells a change by hand; `chain`
reads it back and checks it. It proves equality on the recorded inputs. It does not prove good intent, because
whoever can write the bundle can also write the certificate.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import math
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from engines.bundle.files import MANIFEST, sha256_of
from engines.bundle.reader import Bundle
from engines.bundle.seal import sealed_json
from engines.sessions import ON_CPU

from ..golden.compare import Comparison, excess

FOLDER = "certificates"
SCHEMA = 3  # 1 had `limit` for `tolerance`; 2 had no hash of its own and no driver
PACKAGES = ("star-export", "numpy", "onnxruntime", "onnxruntime-gpu", "tensorrt-rtx-cu13", "tensorrt", "onnx")


@dataclass(frozen=True)
class Row:
    """The worst of `compared` results of one kind: the one with the largest share of its tolerance."""

    component: str
    check: str
    worst: Comparison
    compared: int


@dataclass(frozen=True)
class Rung:
    """One step of the ladder. `note` says what was left out, or what was done if it measured nothing."""

    name: str
    rows: tuple[Row, ...]
    seconds: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return all(row.worst.passed for row in self.rows)

    @property
    def left_out(self) -> bool:
        """Whether nothing was compared, and the note says why."""
        return not self.rows and self.note.startswith("left out")


@dataclass(frozen=True)
class Certificate:
    """The contents of a certificate.

    `compute` is the type of the executor's arithmetic; `plans` maps components to the SHA-256 of the plans
    that ran, and `driver` is the newest CUDA version that the device's driver supports, "" on the CPU.
    """

    schema: int
    passed: bool
    bundle: str
    manifest_sha256: str
    precision: str
    backend: str
    compute: str
    device: str
    driver: str
    versions: dict[str, str]
    plans: dict[str, str]
    made_at: str
    rungs: tuple[Rung, ...]
    not_proven: tuple[str, ...]


def rows_from_results(component: str, check: str, results: Iterable[Comparison]) -> list[Row]:
    """Keep the worst result per kind of tensor and tolerance.

    A cache has two tolerances, one for its written slots and one for the others.
    """
    kinds: dict[tuple, list[Comparison]] = {}
    for result in results:
        kinds.setdefault((result.tensor.partition(".")[0], result.tolerance), []).append(result)
    return [Row(component, check, max(group, key=excess), len(group)) for group in kinds.values()]


def new_certificate(bundle: Bundle, backend: str, compute: str, rungs: tuple[Rung, ...]) -> Certificate:
    """Make the certificate of a validation that ended on this machine just now."""
    return Certificate(
        schema=SCHEMA,
        passed=all(rung.passed for rung in rungs),
        bundle=bundle.manifest.model.name,
        manifest_sha256=sha256_of(bundle.path / MANIFEST),
        precision=bundle.manifest.precision,
        backend=backend,
        compute=compute,
        device=device_name(backend),
        driver=driver_of(backend),
        versions=versions(),
        plans=plan_hashes(bundle, backend),
        made_at=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        rungs=rungs,
        not_proven=tuple(not_proven(bundle, backend, compute, rungs)),
    )


def not_proven(bundle: Bundle, backend: str, compute: str, rungs: tuple[Rung, ...]) -> list[str]:
    """What a reader might think was proven, but was not."""
    gaps = [
        "inputs other than the recorded ones, and the quality of answers and images",
        "that rounding the checkpoint to this precision does no harm: the reference has the same rounded "
        "weights",
    ]
    if bundle.manifest.precision != "fp32" and compute in ("fp32", "int8", "fp4"):
        gaps.append(
            f"the arithmetic of {bundle.manifest.precision}: the graphs' fp32 twins ran, "
            "with the same rounded weights"
        )
    if compute != "fp32":
        gaps.append(f"the ids of long runs: in {compute} a near tie may fall either way")
    if backend.startswith("interpreter"):
        gaps.append(
            "the kernels, and everything else on the device: "
            "the CPU evaluated the networks that the plans were compiled from"
        )
    elif not backend.startswith("tensorrt"):
        gaps.append("TensorRT plans, which are validated with --target on their device")
    return gaps + [
        f"{rung.name}: {rung.note}" for rung in rungs if "left out" in rung.note or "not " in rung.note
    ]


def json_from_certificate(certificate: Certificate) -> str:
    """Format as JSON text with the hash of the rest as its last entry; numbers that are not finite become
    null."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return sealed_json(plain(dataclasses.asdict(certificate)))


def certificate_path(bundle: Path, backend: str, device: str) -> Path:
    """For example `certificates/tensorrt-rtx-4090-nvidia-geforce-rtx-4090.json` in `bundle`."""
    return bundle / FOLDER / f"{_slug(backend)}-{_slug(device)}.json"


def device_name(backend: str) -> str:
    """The device of `backend`: `cpu`, or the first GPU's name. Raises MissingError without a GPU."""
    if backend in ON_CPU or backend.startswith("interpreter"):
        return "cpu"
    from engines.tensorrt.device import gpus

    return gpus()[0].name


def driver_of(backend: str) -> str:
    """The newest CUDA version that the driver of `backend`'s device supports, or "" for the CPU."""
    if device_name(backend) == "cpu":
        return ""
    from engines.tensorrt.device import driver_version

    return driver_version() or ""


def plan_hashes(bundle: Bundle, backend: str) -> dict[str, str]:
    """The SHA-256 of the plans that `backend` runs, by component; {} for backends that run the ONNX."""
    target = backend.partition(":")[2]
    if not target:
        return {}
    from engines.tensorrt.plan import read_build

    return {name: spec.plan.sha256 for name, spec in read_build(bundle, target).components.items()}


def versions() -> dict[str, str]:
    """Versions of the packages that compute and check, and of Python, the system and the processor."""
    found = {"python": platform.python_version(), "system": platform.platform(), "processor": _processor()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text.lower()).strip("-")
