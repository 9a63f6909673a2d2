"""The verbs of the command line as functions of the same keyword names. Each returns an Outcome: data for machines, text for people.

What a verb needs is imported when it runs, so that a device without torch, onnx or TensorRT has all the others.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engines.bundle.files import write_atomic
from engines.bundle.reader import Bundle
from engines.errors import InputError, MissingError, UsageError

from .progress_bar import ProgressBar

EXPORT_PACKAGES = ("torch", "onnx", "onnx_ir", "onnxscript", "safetensors", "ml_dtypes")


@dataclass(frozen=True)
class Outcome:
    """What a verb did: `data` as JSON would hold it, `text` as it is printed."""

    data: dict
    text: str


def export(
    source: str,
    *,
    out: str,
    precision: str = "fp32",
    checkpoint: str | None = None,
    base: str | None = None,
    vq: str | None = None,
    components: list[str] | None = None,
    rope: str = "bf16",
    progress: bool = True,
) -> Outcome:
    """A checkpoint to a bundle: `star_export.exporter.export.export`. Raises MissingError without the host's packages."""
    missing = [name for name in EXPORT_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingError(
            "Exporting is not installed here",
            fix='pip install "star-export[export]"',
            where=f"expected {', '.join(EXPORT_PACKAGES)}; missing: {', '.join(missing)}",
        )
    from ..exporter.export import export as export_bundle

    with ProgressBar("export", shown=progress) as bar:
        path = export_bundle(
            source,
            out=out,
            precision=precision,
            checkpoint=checkpoint,
            base=base,
            vq=vq,
            components=components,
            rope_bf16=rope == "bf16",
            progress=bar,
        )
    files = Bundle.open(path).manifest.files
    size = sum(file.size for file in files.values())
    return Outcome(
        {"bundle": str(path), "precision": precision, "files": len(files), "bytes": size},
        f"{path}: {precision}, {len(files)} files, {_bytes(size)}",
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
    """A bundle's ONNX to plans: `engines.tensorrt.build.build_plans`."""
    from engines.tensorrt.build import build_plans
    from engines.tensorrt.profiles import ROWS

    opened = Bundle.open(bundle)
    with ProgressBar("build", shown=progress) as bar:
        results = build_plans(
            opened,
            target,
            components=components,
            capacity_tokens=capacity_tokens,
            prefill_tokens=prefill_tokens,
            rows=rows or ROWS,
            progress=bar,
        )
    data = [
        {
            "target": r.target,
            "component": r.component,
            "plan": str(r.path),
            "bytes": r.spec.plan.size,
            "seconds": r.spec.seconds,
            "kv_cache_updates": r.spec.kv_cache_updates,
            "skipped": r.skipped,
        }
        for r in results
    ]
    rows_ = [
        (
            d["target"],
            d["component"],
            _bytes(d["bytes"]),
            f"{d['seconds']:.1f} s",
            "unchanged" if d["skipped"] else "built",
        )
        for d in data
    ]
    return Outcome({"plans": data}, table(("target", "component", "plan", "took", ""), rows_))


def validate(
    bundle: str,
    *,
    target: str | None = None,
    backend: str = "onnxruntime",
    report: str | None = None,
    progress: bool = True,
) -> Outcome:
    """The parity ladder: `star_export.validator.ladder.validate`. Raises ParityError when it fails."""
    from ..validator.certificate import certificate_path, json_from_certificate
    from ..validator.ladder import validate as climb

    _check_parent(report)
    with ProgressBar("validate", shown=progress) as bar:
        certificate = climb(bundle, backend=backend, target=target, report=report, progress=bar)
    path = certificate_path(Path(bundle), certificate.backend, certificate.device)
    rows = [
        (
            rung.name,
            "passed",
            f"{sum(row.compared for row in rung.rows)} tensors" if rung.rows else "",
            f"{rung.seconds:.1f} s",
            _nearest(rung) or rung.note,
        )
        for rung in certificate.rungs
    ]
    gaps = "\n".join(f"  not proven: {gap}" for gap in certificate.not_proven)
    return Outcome(
        json.loads(json_from_certificate(certificate)) | {"certificate": str(path)},
        f"{table(('rung', '', 'compared', 'took', 'nearest to its tolerance'), rows)}\n{gaps}\ncertificate: {path}",
    )


def generate(
    bundle: str,
    prompt: str,
    *,
    output: str,
    cfg: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 100,
    num_images: int = 1,
    greedy: bool = False,
    reason: bool = False,
    max_new_tokens: int = 256,
    save_ids: str | None = None,
    backend: str = "onnxruntime",
    progress: bool = True,
) -> Outcome:
    """Draw a prompt: `engines.runtime.star.Star.generate`; N images are F.png, F-1.png, F-2.png, ..."""
    names = [Path(output)] + [
        Path(output).with_name(f"{Path(output).stem}-{i}{Path(output).suffix}") for i in range(1, num_images)
    ]
    _check_parent(output, save_ids)
    with _star(bundle, backend) as star, ProgressBar("generate", shown=progress) as bar:
        drawn = star.generate(
            prompt,
            cfg=cfg,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            num_images=num_images,
            greedy=greedy,
            reason=reason,
            max_new_tokens=max_new_tokens,
            progress=bar,
        )
    return _written(names, drawn, save_ids)


def edit(
    bundle: str,
    image: str,
    instruction: str,
    *,
    output: str,
    cfg: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 100,
    greedy: bool = False,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    save_ids: str | None = None,
    backend: str = "onnxruntime",
    progress: bool = True,
) -> Outcome:
    """Change an image: `engines.runtime.star.Star.edit`."""
    _check_parent(output, save_ids)
    with _star(bundle, backend) as star, ProgressBar("edit", shown=progress) as bar:
        drawn = star.edit(
            image,
            instruction,
            cfg=cfg,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            greedy=greedy,
            progress=bar,
            **_pixels(min_pixels, max_pixels),
        )
    return _written([Path(output)], drawn, save_ids)


def ask(
    bundle: str,
    image: str,
    question: str,
    *,
    max_new_tokens: int = 256,
    greedy: bool = True,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    save_ids: str | None = None,
    backend: str = "onnxruntime",
    progress: bool = True,
) -> Outcome:
    """Answer a question about an image: `engines.runtime.star.Star.ask`. It is always greedy; the flag says so."""
    _check_parent(save_ids)
    with _star(bundle, backend) as star, ProgressBar("ask", shown=progress) as bar:
        answer = star.ask(
            image, question, max_new_tokens=max_new_tokens, progress=bar, **_pixels(min_pixels, max_pixels)
        )
    _save(save_ids, answer.ids)
    return Outcome({"answer": answer.text, "ids": answer.ids.tolist()}, answer.text)


def bench(bundle: str, *, backend: str = "onnxruntime", progress: bool = True) -> Outcome:
    """Milliseconds per step and its share of the memory bandwidth: `engines.bench.bench`."""
    from engines.bench import bench as measure

    with _star(bundle, backend) as star, ProgressBar("bench", shown=progress) as bar:
        measured = measure(star, progress=bar)
    rows = [
        (
            s.name,
            f"{s.ms:.3f}",
            _bytes(s.read_bytes) if s.read_bytes else "",
            f"{s.share:.0%}" if s.share else "",
        )
        for s in measured.timings
    ]
    head = f"{measured.model}, {measured.precision}, {backend} on {measured.device}; measured read bandwidth {measured.bandwidth / 1e9:.1f} GB/s"
    return Outcome(
        dataclasses.asdict(measured),
        f"{head}\n{table(('stage', 'ms', 'must read', 'of the limit'), rows)}\n"
        f"one image of {measured.tokens} tokens: {measured.seconds_per_image:.3f} s\n"
        + "\n".join(f"decode step over {name}: {ratio:.2f}" for name, ratio in measured.ratios.items()),
    )


def score(
    bundle: str,
    *,
    full: bool = False,
    pictures: str | None = None,
    backend: str = "onnxruntime",
    progress: bool = True,
) -> Outcome:
    """The task benchmark of STAR-Nano: `star_export.validator.score.score`."""
    from reference.nano.benchmark.score import json_from_score

    from ..validator.score import score as measure

    _check_folder(pictures)
    with ProgressBar("score", shown=progress) as bar:
        measured = measure(bundle, backend=backend, full=full, images=pictures, progress=bar)
    return Outcome(
        {
            "score": json_from_score(measured.score),
            "reference": measured.reference and json_from_score(measured.reference),
        },
        measured.text,
    )


def inspect(path: str, *, target: str | None = None, component: str | None = None) -> Outcome:
    """What is in a bundle, an ONNX file or a plan; with a target, a bundle's layers as TensorRT sees them: `star_export.cli.inspect`."""
    from .inspect import describe, describe_networks, text_from_description

    if component and not target:
        raise UsageError(
            "A component is shown as a target reads it",
            where="--component: expected --target as well",
            fix=f"star-export inspect {path} --target T --component {component}",
        )
    data = describe_networks(Path(path), target, component) if target else describe(Path(path))
    return Outcome(data, text_from_description(data))


def targets() -> Outcome:
    """The device table: `engines.targets.TARGETS`."""
    from engines.targets import TARGETS

    rows = [
        (
            t.name,
            t.device,
            t.sm,
            f"{t.memory_bytes // 10**9} GB",
            f"{t.bandwidth_bytes_per_s / 1e9:.0f} GB/s",
            f"{t.builder} >= {t.tensorrt}",
            t.dialect,
            " ".join(t.precisions),
        )
        for t in TARGETS.values()
    ]
    return Outcome(
        {name: dataclasses.asdict(target) for name, target in TARGETS.items()},
        table(("target", "device", "gpu", "memory", "bandwidth", "builder", "dialect", "precisions"), rows),
    )


def doctor() -> Outcome:
    """What this machine has, can build and can run: `engines.doctor.facts`."""
    from engines.doctor import facts

    found = facts()
    lines = [f"python {found.python} on {found.system}", ""]
    lines += [
        table(
            ("package", "version"),
            [(name, version or "not installed") for name, version in found.packages.items()],
        ),
        "",
    ]
    lines += [f"driver for CUDA {found.driver}" if found.driver else f"no GPU: {found.no_gpu}"]
    lines += [f"{gpu.name}: {gpu.sm}, {_bytes(gpu.memory_bytes)}" for gpu in found.gpus]
    lines += [
        "",
        table(
            ("target", "build here", "run here"),
            [(t.name, _yes_or_no(t.no_build), _yes_or_no(t.no_run)) for t in found.targets],
        ),
    ]
    lines += ["", *(f"advice: {line}" for line in found.advice)]
    return Outcome(dataclasses.asdict(found), "\n".join(lines).rstrip())


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Rows as columns of equal width, two spaces apart."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in [head, *rows]
    )


def _star(bundle: str, backend: str):
    from engines.runtime.star import Star

    return Star(bundle, backend=backend)


def _pixels(min_pixels: int | None, max_pixels: int | None) -> dict[str, int]:
    limits = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    return {name: value for name, value in limits.items() if value is not None}


def _written(names: list[Path], drawn, save_ids: str | None) -> Outcome:
    from engines.inputs.image_io import write_png

    for name, image in zip(names, drawn.images, strict=True):
        write_png(name, image)
    _save(save_ids, drawn.image_ids)
    data = {"images": [str(name) for name in names], "image_ids": drawn.image_ids.tolist()}
    text = "\n".join(str(name) for name in names)
    if drawn.answer is not None:
        data, text = data | {"answer": drawn.answer}, f"{drawn.answer}\n{text}"
    return Outcome(data, text)


def _save(path: str | None, ids: np.ndarray) -> None:
    if path is not None:
        buffer = io.BytesIO()
        np.save(buffer, ids)
        write_atomic(Path(path), buffer.getvalue())


def _check_parent(*paths: str | None) -> None:
    """Refuse, before any work, to write where there is no folder. Raises InputError."""
    for path in filter(None, paths):
        if not Path(path).absolute().parent.is_dir() or Path(path).is_dir():
            raise InputError(
                "This file cannot be written",
                fix="create the folder first, or give another name",
                where=f"{path}: expected a file name in a folder that exists",
            )


def _check_folder(path: str | None) -> None:
    """Refuse, before any work, to write into a folder that is not there. Raises InputError."""
    if path is not None and not Path(path).is_dir():
        raise InputError("There is no such folder", where=f"{path}: expected a folder", fix="create it first")


def _yes_or_no(refusal: str | None) -> str:
    """`yes`, or `no` and why in a few words; the whole reason is in the data."""
    return "yes" if refusal is None else f"no: {refusal.partition(' (')[0]}"


def _nearest(rung) -> str:
    """The result of a rung that uses most of its tolerance."""
    from ..golden.compare import excess

    if not rung.rows:
        return ""
    row = max(rung.rows, key=lambda row: excess(row.worst))
    return f"{row.component} {row.worst.tensor}: {row.worst.value:.3g} of {row.worst.tolerance:.3g}"


def _bytes(size: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"
