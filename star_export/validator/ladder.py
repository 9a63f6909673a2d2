"""The parity ladder: does a bundle compute, on this device, what the reference computed when it was exported?

Each rung builds on the last: files and graphs; what the host prepares for them; every component against its
golden tensors, in every dialect; the decoders step by step against their own prefill; the ids of whole runs,
also in other ways; and for a model whose tasks can be judged, how many it gets right. A rung that fails ends
the validation. The numbers go into a certificate.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from engines.bundle.files import write_atomic
from engines.bundle.reader import Bundle
from engines.bundle.typed_paths import output_file
from engines.errors import MissingError, ParityError, UsageError
from engines.interpreter import BUILDERS
from engines.progress import Progress, silent
from engines.sessions import check_backend, check_threads
from engines.targets import target_from_name
from engines.tensorrt.module import check_runnable, tensorrt_of

from ..choice import formats_of
from ..golden.compare import Comparison, excess, verdict
from ..golden.tolerances import compute_of
from ..scores import SCORE
from .certificate import (
    Certificate,
    Row,
    Rung,
    certificate_path,
    device_name,
    json_from_certificate,
    new_certificate,
)
from .dialects import dialects
from .evidence import Evidence
from .interpreted import interpreted
from .other_ways import other_ways
from .paintings import paintings
from .prepared_inputs import prepared_inputs
from .rungs import (
    decoder_steps,
    fast_path,
    files_and_graphs,
    golden_tensors,
    whole_runs,
)
from .subject import RUNS, Subject


def validate(
    bundle: str | Path,
    *,
    backend: str = "onnxruntime-exact",
    target: str | None = None,
    report: str | Path | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> Certificate:
    """Validate the ONNX of `bundle` on `backend`, or the plans of `target` on this machine's GPU.

    `onnxruntime-exact` proves the bundle to rounding level, and says how far `onnxruntime` is from it.
    On a machine that cannot run the plans, the interpreter evaluates the networks that they were compiled
    from on the CPU instead, and the certificate says so. `report` names an HTML page to write as well, and
    `threads` how many of the processor's threads ONNX Runtime computes with.

    An old certificate of the same backend and device is removed first and a new one is written at the end,
    passed or not, so a certificate that says `passed` is always from the last run. Raises ParityError for the
    result that exceeds its tolerance most, InputError for files, graphs and golden sets that cannot prove
    anything, and MissingError without the executor or device.
    """
    page = None if report is None else output_file(report)
    opened = Bundle.open(bundle)
    backend = _backend_of(target) if target else backend
    check_backend(backend)
    check_threads(threads, backend=backend)
    evidence = Evidence() if page is not None else None
    compute = compute_of(backend, opened.manifest.precision)
    subject = Subject(opened, backend, compute, evidence, threads)
    path = certificate_path(opened.path, backend, device_name(backend))
    path.unlink(missing_ok=True)
    certificate = run_ladder(subject, progress)
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, json_from_certificate(certificate).encode())
    if page is not None and evidence is not None:
        from .formats_report import html_from_formats
        from .report import html_from_certificate

        formats = formats_of(opened)
        more = html_from_formats(formats) if formats else ""
        html = html_from_certificate(certificate, evidence, bundle=str(bundle), more=more)
        write_atomic(page, html.encode())
    check_certificate(certificate, path)
    return certificate


def run_ladder(subject: Subject, progress: Progress) -> Certificate:
    """Run all rungs up to the first that fails."""
    rungs: list[Rung] = []
    scored = {SCORE, RUNS} <= set(subject.bundle.manifest.files)
    paints = subject.bundle.manifest.model.diffusion is not None
    for name, rung in rungs_of(subject.backend, scored=scored, paints=paints).items():
        started = time.monotonic()
        rows, note = rung(subject, progress)
        rungs.append(Rung(name, tuple(rows), round(time.monotonic() - started, 3), note))
        if not rungs[-1].passed:
            break
    return new_certificate(subject.bundle, subject.backend, subject.compute, tuple(rungs))


def rungs_of(backend: str, *, scored: bool, paints: bool) -> Mapping[str, Callable]:
    """The rungs of a validation on `backend`, by name.

    Networks are interpreted for a target; without its device, nothing else can run. Tasks are `scored` if the
    bundle holds the reference's score, and it `paints` if it has a diffusion decoder.
    """
    if backend.startswith("interpreter"):
        return {name: RUNGS[name] for name in ("files and graphs", "prepared inputs", "interpreted")}
    left_out = {
        "interpreted": not backend.startswith("tensorrt:"),
        "dialects": backend != "onnxruntime-exact",
        "fast path": backend != "onnxruntime-exact",
        "score": not scored,
        "paintings": not paints,
    }
    return {name: rung for name, rung in RUNGS.items() if not left_out.get(name)}


def _backend_of(target: str) -> str:
    """`tensorrt:TARGET` if its plans run here, else `interpreter:TARGET`.

    Raises MissingError or UsageError if neither can run.
    """
    row = target_from_name(target)
    try:
        check_runnable(row)
    except (MissingError, UsageError):
        if row.builder not in BUILDERS:
            raise
        tensorrt_of(row)
        return f"interpreter:{target}"
    return f"tensorrt:{target}"


def check_certificate(certificate: Certificate, path: Path) -> None:
    """Raise ParityError for the row that exceeds its tolerance by the largest factor."""
    failing = [(rung, row) for rung in certificate.rungs for row in rung.rows if not row.worst.passed]
    if failing:
        rung, row = max(failing, key=lambda pair: excess(pair[1].worst))
        more = f"; {len(failing) - 1} more in {path}" if len(failing) > 1 else ""
        raise ParityError(
            "The outputs differ from the reference",
            where=f"{row.component}: {row.check}: {verdict(row.worst)}{more}",
            fix="do not use this bundle here; export or build it again",
        )


def score_of_tasks(subject: Subject, progress: Progress) -> tuple[list[Row], str]:
    """Compare the small task benchmark with the reference's score: `star_export.validator.score`."""
    from reference.nano.benchmark.identity import line

    from .score import score, shortfalls, shown  # it imports STAR-Nano's tasks, which no other model needs

    found = score(subject.bundle, backend=subject.backend, threads=subject.threads, progress=progress)
    assert found.reference is not None  # this rung runs only for bundles with the reference's score
    rows = []
    for task, (value, tolerance) in shortfalls(found.score, found.reference).items():
        check = f"{task}: {shown(found.score, task)}, the reference {shown(found.reference, task)}"
        rows.append(Row("runtime", check, Comparison("shortfall", value, tolerance), 1))
    if subject.evidence:
        from .shown_tasks import show_tasks

        show_tasks(subject.evidence, subject.bundle, found, backend=subject.backend, threads=subject.threads)
    first = found.first_differences
    others = Comparison("image_ids", sum(token is not None for token in first) / len(first), 1.0)
    return [
        *rows,
        Row("runtime", line(first), others, len(first)),
    ], "images that differ are reported, not bounded"


RUNGS: dict[str, Callable[[Subject, Progress], tuple[list[Row], str]]] = {
    "files and graphs": files_and_graphs,
    "prepared inputs": prepared_inputs,
    "interpreted": interpreted,
    "golden tensors": golden_tensors,
    "dialects": dialects,
    "decoder steps": decoder_steps,
    "whole runs": whole_runs,
    "paintings": paintings,
    "other ways": other_ways,
    "fast path": fast_path,
    "score": score_of_tasks,
}
