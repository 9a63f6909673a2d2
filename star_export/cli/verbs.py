"""The verbs of the command line, as functions with the same keyword names; each returns an Outcome.

A verb imports what it needs when it runs, so a device without torch, onnx or TensorRT still has all the other
verbs.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from engines.bundle.reader import Bundle
from engines.bundle.typed_paths import typed_path
from engines.errors import MissingError, UsageError, install

from .benching import bench
from .completion import completion
from .drawing import ask, edit, generate
from .outputs import Outcome, table, text_from_bytes
from .planning import plan
from .progress_bar import ProgressBar
from .proofs import certificate, validate
from .scoring import score
from .serving import serve

if TYPE_CHECKING:
    from engines.tensorrt.build import BuiltPlan


__all__ = [
    "ask",
    "bench",
    "build",
    "certificate",
    "completion",
    "doctor",
    "edit",
    "export",
    "generate",
    "inspect",
    "plan",
    "score",
    "serve",
    "targets",
    "validate",
]
EXPORT_PACKAGES = ("torch", "onnx", "onnx_ir", "onnxscript", "safetensors", "ml_dtypes", "huggingface_hub")


def export(
    source: str,
    *,
    out: str,
    precision: str = "fp32",
    checkpoint: str | None = None,
    base: str | None = None,
    vq: str | None = None,
    lumina: str | None = None,
    from_folder: str | None = None,
    revision: str | None = None,
    components: list[str] | None = None,
    rope: str = "bf16",
    part_bytes: int | None = None,
    calibrate: int | None = None,
    calibration: str | None = None,
    bits: float | None = None,
    target: str | None = None,
    progress: bool = True,
) -> Outcome:
    """Export a checkpoint to a bundle with `star_export.exporter.export.export`.

    Raises MissingError where the packages of the extra `[export]` are not installed.
    """
    missing = [name for name in EXPORT_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingError(
            "The packages that export needs are not installed",
            where=f"expected {', '.join(EXPORT_PACKAGES)}; missing: {', '.join(missing)}",
            fix=install("export"),
        )
    from ..exporter.export import PART_BYTES
    from ..exporter.export import export as export_bundle
    from ..exporter.publish import abandoned

    with ProgressBar("export", shown=progress) as bar:
        path = export_bundle(
            source,
            out=out,
            precision=precision,
            checkpoint=checkpoint,
            base=base,
            vq=vq,
            lumina=lumina,
            from_folder=from_folder,
            revision=revision,
            components=components,
            rope_bf16=rope == "bf16",
            part_bytes=part_bytes or PART_BYTES,
            calibrate=calibrate,
            calibration=calibration,
            bits=bits,
            target=target,
            progress=bar,
        )
    files = Bundle.open(path).manifest.files
    size = sum(file.size for file in files.values())
    left = {str(stage): found for stage, found in abandoned(path).items()}
    return Outcome(
        {"bundle": str(path), "precision": precision, "files": len(files), "bytes": size, "unfinished": left},
        f"{path}: {precision}, {len(files)} files, {text_from_bytes(size)}"
        + "".join(
            f"\n{stage}: {text_from_bytes(found)} of an unfinished export; repeat that, or remove the folder"
            for stage, found in left.items()
        ),
    )


def build(
    bundle: str,
    *,
    target: list[str],
    components: list[str] | None = None,
    capacity_tokens: int | None = None,
    prefill_tokens: int | None = None,
    rows: int | None = None,
    progress: bool = True,
) -> Outcome:
    """Build TensorRT plans from a bundle's ONNX with `engines.tensorrt.build.build_plans`."""
    from engines.tensorrt.build import build_plans
    from engines.tensorrt.profiles import ROWS

    opened = Bundle.open(bundle)
    with ProgressBar("build", shown=progress) as bar:
        plans = build_plans(
            opened,
            target,
            components=components,
            capacity_tokens=capacity_tokens,
            prefill_tokens=prefill_tokens,
            rows=rows or ROWS,
            progress=bar,
        )
    data = {"plans": [_data_from_plan(plan) for plan in plans]}
    lines = [
        (
            plan.target,
            plan.component,
            text_from_bytes(plan.spec.plan.size),
            f"{plan.spec.seconds:.1f} s",
            "unchanged" if plan.skipped else "built",
        )
        for plan in plans
    ]
    return Outcome(data, table(("target", "component", "plan", "took", ""), lines))


def _data_from_plan(plan: BuiltPlan) -> dict:
    return {
        "target": plan.target,
        "component": plan.component,
        "plan": str(plan.path),
        "bytes": plan.spec.plan.size,
        "seconds": plan.spec.seconds,
        "kv_cache_updates": plan.spec.kv_cache_updates,
        "skipped": plan.skipped,
    }


def inspect(
    path: str, *, target: str | None = None, component: str | None = None, polygraphy: str | None = None
) -> Outcome:
    """Describe a bundle, an ONNX file or a plan with `star_export.cli.inspect`.

    With a target, describe instead a bundle's layers as that target's TensorRT parses them; with
    `polygraphy`, write a bundle's golden tensors to that folder for `polygraphy run`. Raises UsageError for
    both, or for a component with neither. Plans and certificates that are damaged are shown as such; the
    outcome's error names them.
    """
    from .inspect import describe, describe_networks, fault_of, files_for_polygraphy, text_from_description

    wanted = [name for name in (target, polygraphy) if name is not None]
    if len(wanted) == 2 or (component and not wanted):
        raise UsageError(
            "This needs either a target or a folder",
            where="inspect: expected one of --target and --polygraphy, got "
            + ("both" if wanted else "--component alone"),
            fix=f"star-export inspect {path} --target T --component A, "
            f"or star-export inspect {path} --polygraphy FOLDER --component A",
        )
    if polygraphy is not None:
        data = files_for_polygraphy(Path(path), typed_path(polygraphy), component)
        lines = [(case["component"], case["case"], case["command"]) for case in data["cases"]]
        return Outcome(data, table(("component", "case", "command"), lines))
    data = describe_networks(Path(path), target, component) if target is not None else describe(Path(path))
    return Outcome(data, text_from_description(data), error=fault_of(data, path))


def targets() -> Outcome:
    """List the device table, `engines.targets.TARGETS`."""
    from engines.targets import TARGETS

    head = ("target", "device", "gpu", "memory", "bandwidth", "builder", "dialect", "precisions")
    lines = [
        (
            target.name,
            target.device,
            target.sm,
            f"{target.memory_bytes // 10**9} GB",
            f"{target.bandwidth_bytes_per_s / 1e9:.0f} GB/s",
            f"{target.builder} >= {target.tensorrt}",
            target.dialect,
            " ".join(target.precisions),
        )
        for target in TARGETS.values()
    ]
    data = {name: dataclasses.asdict(target) for name, target in TARGETS.items()}
    return Outcome(data, table(head, lines))


def doctor() -> Outcome:
    """Report what this machine has, can build and can run, with `engines.doctor.facts`."""
    from engines.doctor import facts

    found = facts()
    packages = [(name, version or "not installed") for name, version in found.packages.items()]
    places = [(t.name, _yes_or_no(t.no_build), _yes_or_no(t.no_run)) for t in found.targets]
    lines = [
        f"python {found.python} on {found.system}",
        "",
        table(("package", "version"), packages),
        "",
        f"driver for CUDA {found.driver}" if found.driver else f"no GPU: {found.no_gpu}",
        *(f"{gpu.name}: {gpu.sm}, {text_from_bytes(gpu.memory_bytes)}" for gpu in found.gpus),
        *([f"image-token loop of TensorRT plans: {found.loop}"] if found.loop else []),
        "",
        table(("target", "build here", "run here"), places),
        "",
        *(f"advice: {line}" for line in found.advice),
    ]
    return Outcome(dataclasses.asdict(found), "\n".join(lines).rstrip())


def _yes_or_no(refusal: str | None) -> str:
    """`yes`, or `no` and a short reason; `--json` has the whole reason."""
    return "yes" if refusal is None else f"no: {refusal.partition(' (')[0]}"
