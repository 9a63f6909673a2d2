"""The parity ladder: does a bundle compute, on this device, what the reference computed when it was exported?

Rungs, each on top of the last: files and graphs; every component against its golden tensors; the decoders step by step against
their own prefill; the ids of whole runs; and for a model whose tasks can be judged, how many it does right. A rung that fails ends
the climb. The numbers go into a certificate.
"""
from __future__ import annotations

import importlib.util
import itertools
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engines.bundle.reader import Bundle
from engines.errors import InputError, MissingError, ParityError, UsageError
from engines.bundle.files import write_atomic
from engines.tensorrt.plan import plan_spec
from engines.interpreter import BUILDERS
from engines.tensorrt.profiles import fits
from engines.sessions import check_backend, open_session
from engines.bundle.tensors import present_name
from engines.targets import target_from_name
from engines.tensorrt.module import check_runnable, tensorrt_of

from .certificate import Certificate, Row, Rung, certificate_path, device_name, json_from_certificate, new_certificate
from ..golden.cases import Case, cases_from_file, component_cases
from ..golden.tolerances import compute_type, largest_noise, limits_of
from ..golden.run_case import extended, run_case
from ..golden.compare import Result, compare, excess, verdict
from ..cli.progress_bar import Progress, silent
from .rollout import check_decoder
from .score import SCORE, score, shortfalls, shown

ROLLOUT_TOKENS = 64
RUNS = "golden.safetensors"


@dataclass(frozen=True)
class Subject:
    """What is validated: the components of `bundle` on `backend`, computing in `compute` (fp32, fp16, bf16)."""

    bundle: Bundle
    backend: str
    compute: str

    @property
    def target(self) -> str | None:
        return self.backend.partition(":")[2] or None


def validate(bundle: str | Path, *, backend: str = "onnxruntime", target: str | None = None, report: str | Path | None = None,
             progress: Progress = silent) -> Certificate:
    """Climb the ladder with the ONNX of `bundle` on `backend`, or with the plans of `target` on the GPU at hand. On a machine that
    cannot run them, the networks that they were compiled from are read back on the CPU instead, and the certificate says so.

    An old certificate of the same backend and device is removed first, and a new one is written at the end, whether it passed or not:
    one that says `passed` is always of the last run. `report` names an HTML page to write too. Raises ParityError for the result
    furthest beyond its limit, InputError for files, graphs and golden sets that cannot prove anything, MissingError without the
    executor or device.
    """
    opened = Bundle.open(bundle)
    backend = _backend_of(target) if target else backend
    check_backend(backend)
    subject = Subject(opened, backend, compute_type(opened.manifest.precision, twin=backend == "onnxruntime"))
    path = certificate_path(opened.path, backend, device_name(backend))
    path.unlink(missing_ok=True)
    certificate = climb(subject, progress)
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, json_from_certificate(certificate).encode())
    if report is not None:
        from .report import html_from_certificate

        write_atomic(Path(report), html_from_certificate(certificate).encode())
    check_certificate(certificate, path)
    return certificate


def climb(subject: Subject, progress: Progress) -> Certificate:
    """All rungs up to the first that fails."""
    rungs: list[Rung] = []
    for name, rung in rungs_of(subject.backend, scored=SCORE in subject.bundle.manifest.files).items():
        started = time.monotonic()
        rows, note = rung(subject, progress)
        rungs.append(Rung(name, tuple(rows), round(time.monotonic() - started, 3), note))
        if not rungs[-1].passed:
            break
    return new_certificate(subject.bundle, subject.backend, subject.compute, tuple(rungs))


def rungs_of(backend: str, *, scored: bool) -> Mapping[str, Callable]:
    """The rungs of a climb: networks are read back where there is a target, and nothing else can be where its device is not; tasks
    are scored where the bundle holds the reference's score."""
    if backend.startswith("readback"):
        return {name: RUNGS[name] for name in ("files and graphs", "read-back")}
    left_out = {"read-back": not backend.startswith("tensorrt:"), "score": not scored}
    return {name: rung for name, rung in RUNGS.items() if not left_out.get(name)}


def _backend_of(target: str) -> str:
    """`tensorrt:TARGET` where its plans run here, else `readback:TARGET`; the first thing that is missing where neither can be."""
    row = target_from_name(target)
    try:
        check_runnable(row)
    except (MissingError, UsageError):
        if row.builder not in BUILDERS:
            raise
        tensorrt_of(row)
        return f"readback:{target}"
    return f"tensorrt:{target}"


def check_certificate(certificate: Certificate, path: Path) -> None:
    """Raise ParityError for the failing row furthest beyond its limit: component, check, tensor, limit and value."""
    failing = [(rung, row) for rung in certificate.rungs for row in rung.rows if not row.worst.passed]
    if failing:
        rung, row = max(failing, key=lambda pair: excess(pair[1].worst))
        more = f"; {len(failing) - 1} more in {path}" if len(failing) > 1 else ""
        raise ParityError("What runs is not what the reference computes", fix="do not use it here; export or build it again",
                          where=f"{row.component}: {row.check}: {verdict(row.worst)}{more}")


def files_and_graphs(subject: Subject, progress: Progress) -> tuple[list[Row], str]:
    """SHA-256 of every file, then the ONNX checker and our lint on every graph. Raises InputError."""
    manifest = subject.bundle.manifest
    progress("hash every file", 0, 1)
    subject.bundle.verify()
    done = f"{len(manifest.files)} files have their SHA-256"
    if not all(importlib.util.find_spec(name) for name in ("onnx", "onnx_ir")):
        return [], f"{done}; graphs not checked: onnx is not installed here (they were, when they were exported)"
    graphs = {subject.bundle.graph_name(name, dialect=_dialect(subject.target)): subject.target for name in manifest.components}
    graphs |= {spec.twin: None for spec in manifest.components.values() if spec.twin}  # twins are for ONNX Runtime alone
    for i, (graph, target) in enumerate(graphs.items()):
        progress(f"check {graph}", i, len(graphs))
        check_onnx(subject.bundle.path / graph, target=target)
    return [], f"{done}; {len(graphs)} graphs pass the ONNX checker and the lint"


def _dialect(target: str | None) -> str:
    return target_from_name(target).dialect if target else "modern"


def check_onnx(path: Path, *, target: str | None) -> None:
    """The ONNX checker and the lint on one file. Raises InputError. Types and shapes are checked too, but not of a classic graph:
    its opset has no bfloat16 in some operators where TensorRT has."""
    import onnx

    from ..graph.lint import check_graph

    try:
        onnx.checker.check_model(str(path), full_check=_dialect(target) == "modern")
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise InputError("The ONNX checker refuses this graph", where=f"{path}: {str(error).strip()}",
                         fix="export the bundle again") from None
    check_graph(path, target=target)


def golden_tensors(subject: Subject, progress: Progress) -> tuple[list[Row], str]:
    """Every component against every case that was recorded for it."""
    rows, left_out, components = [], [], subject.bundle.manifest.components
    for i, (name, spec) in enumerate(components.items()):
        progress(f"{name} against its golden tensors", i, len(components))
        cases = component_cases(subject.bundle.file(spec.golden), spec)
        session = open_session(subject.bundle, name, backend=subject.backend)
        try:
            outside = [case for case, recorded in cases.items() if not _fits(subject, name, session, recorded)]
            if len(outside) == len(cases):
                raise InputError("No golden case fits this plan", where=f"{name}: expected profiles that hold one of {', '.join(cases)}",
                                 fix="build the plans with more rows, or a larger capacity")
            left_out += [f"{name} {case}" for case in outside]
            for case in sorted(cases.keys() - set(outside)):
                limits = limits_of(name, subject.compute, cases[case].noise)
                results = run_case(session, cases[case], limits=limits, capacity_tokens=session.capacity_tokens,
                                   own_draws=subject.compute != "fp32")
                rows += rows_from_results(name, f"case {case}", results)
        finally:
            session.close()
    return rows, f"outside the plans' profiles, not run: {', '.join(left_out)}" if left_out else ""


def read_back(subject: Subject, progress: Progress) -> tuple[list[Row], str]:
    """The networks that TensorRT parsed, evaluated on the CPU: `star_export.validator.interpreted`."""
    from .interpreted import read_back as climb_rung

    rows, note = climb_rung(subject, progress)
    return rows, "; ".join(filter(None, ["proves the meaning of the network, not the kernels", note]))


def decoder_steps(subject: Subject, progress: Progress, *, tokens: int = ROLLOUT_TOKENS,
                  chunk_tokens: int = ROLLOUT_TOKENS) -> tuple[list[Row], str]:
    """Single steps against a prefill, rewind and last slot, with poison in unused slots, at B=1 and B=2."""
    rows, model = [], subject.bundle.manifest.model
    decoders = [name for name in model.cache if name in subject.bundle.manifest.components]
    for i, name in enumerate(decoders):
        spec = subject.bundle.component(name)
        limits = limits_of(name, subject.compute, largest_noise(component_cases(subject.bundle.file(spec.golden), spec).values()))
        session = open_session(subject.bundle, name, backend=subject.backend)
        try:
            capacity = session.capacity_tokens or min(tokens, model.max_positions)
            steps, chunk = (min(n, capacity, session.prefill_tokens or capacity) for n in (tokens, chunk_tokens))
            checks = check_decoder(session, tokens=steps, chunk_tokens=chunk, capacity_tokens=capacity, limits=limits, seed=zlib.crc32(name.encode()), tick=_ticker(progress, name, steps, i, len(decoders)))
        finally:
            session.close()
        for check, results in checks.items():
            rows += rows_from_results(name, f"{check}: {steps} steps, capacity {capacity}", results)
    return rows, "" if rows else "no decoder in this bundle"


def whole_runs(subject: Subject, progress: Progress) -> tuple[list[Row], str]:
    """Ids of short runs through the runtime, greedy and sampled, and of an answer, against the reference's."""
    if RUNS not in subject.bundle.manifest.files:
        return [], "left out: the bundle holds no whole runs (it was exported with some components only)"
    from engines.runtime.star import Star

    cases = cases_from_file(subject.bundle.file(RUNS))
    if wrong := set(cases) ^ set(RUN):
        raise InputError("The golden set cannot prove anything", fix="export the bundle again",
                         where=f"{RUNS}: expected the cases {', '.join(RUN)}; missing or unknown: {', '.join(sorted(wrong))}")
    rows, limit = [], 0.0 if subject.compute == "fp32" else 1.0
    with Star(subject.bundle, backend=subject.backend) as star:
        for i, (case, recorded) in enumerate(cases.items()):
            progress(f"whole run: {case}", i, len(cases))
            results = compare(RUN[case](star, recorded), recorded.outputs, limits=dict.fromkeys(recorded.outputs, limit))
            rows += rows_from_results("runtime", case, results)
    return rows, "" if limit == 0 else "ids are reported, not bounded: in 16 bits a near tie may fall either way"


def _generate(star, case: Case) -> Mapping[str, np.ndarray]:
    given, (images, tokens) = case.inputs, case.outputs["image_ids"].shape
    greedy = np.zeros((tokens, images), np.float32)
    ids = star.generate_ids(given["input_ids"], guidance=float(given["guidance"][0]), top_k=int(given.get("top_k", [1])[0]),
                            top_p=float(given.get("top_p", [1.0])[0]), uniforms=given.get("uniforms", greedy))
    return {"image_ids": ids}


def _answer(star, case: Case) -> Mapping[str, np.ndarray]:
    return {"ids": star.answer_ids(case.inputs["input_ids"], case.inputs["position_ids"], max_new_tokens=len(case.outputs["ids"]))}


def score_of_tasks(subject: Subject, progress: Progress) -> tuple[list[Row], str]:
    """The small task benchmark beside the score that the reference reached: `star_export.validator.score`."""
    found = score(subject.bundle, backend=subject.backend, progress=progress)
    rows = [Row("runtime", f"{task}: {shown(found.score, task)}, the reference {shown(found.reference, task)}",
                Result("shortfall", value, limit), 1) for task, (value, limit) in shortfalls(found.score, found.reference).items()]
    return rows, ""


RUN = {"generate": _generate, "sample": _generate, "answer": _answer}
RUNGS: dict[str, Callable[[Subject, Progress], tuple[list[Row], str]]] = {
    "files and graphs": files_and_graphs, "read-back": read_back, "golden tensors": golden_tensors, "decoder steps": decoder_steps, "whole runs": whole_runs,
    "score": score_of_tasks}


def rows_from_results(component: str, check: str, results: Iterable[Result]) -> list[Row]:
    """One row per kind of tensor and limit: its worst result. A cache's written slots and the others have two limits."""
    kinds: dict[tuple, list[Result]] = {}
    for result in results:
        kinds.setdefault((result.tensor.partition(".")[0], result.limit), []).append(result)
    return [Row(component, check, max(group, key=excess), len(group)) for group in kinds.values()]


def _fits(subject: Subject, component: str, session, case: Case) -> bool:
    """Whether a plan's profiles hold the case, or a parsed network's capacity; anything else takes every shape."""
    capacity = session.capacity_tokens
    if capacity is not None and any(present_name(name) and array.shape[2] > capacity for name, array in case.inputs.items()):
        return False
    if not subject.backend.startswith("tensorrt:"):
        return True
    shapes = {name: (extended(array, capacity) if present_name(name) else array).shape for name, array in case.inputs.items()}
    return any(fits(profile, shapes) for profile in plan_spec(subject.bundle, subject.target, component)[1].profiles)


def _ticker(progress: Progress, name: str, tokens: int, index: int, decoders: int) -> Callable[[], None]:
    """Counts the steps of the decoder `index`: `tokens` of them at B=1, and as many at B=2."""
    steps = itertools.count(2 * tokens * index + 1)
    return lambda: progress(f"{name} step by step", next(steps), 2 * tokens * decoders)
