"""The rungs for every model: files and graphs, golden tensors, decoder steps, whole runs, the fast path.

A rung is a function of a subject that returns its rows and a note on what it left out. This module knows
nothing of the ladder that orders the rungs.
"""

from __future__ import annotations

import functools
import importlib.util
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

from engines.bundle.held import real_path
from engines.bundle.manifest import component_of
from engines.bundle.tensors import HANDED_ON, handed_on, present_name
from engines.errors import InputError, MissingError
from engines.fit.machine import check_memory
from engines.fit.memory import task_memory
from engines.progress import Progress, adder
from engines.runtime.star import Star
from engines.sessions import free_memory, open_session
from engines.targets import target_from_name
from engines.tensorrt.plan import plan_spec
from engines.tensorrt.profiles import fits, limits_from_options

from ..golden.cases import Case, recorded_cases, recorded_runs
from ..golden.compare import compare
from ..golden.run_case import extended, run_case
from ..golden.tolerances import compute_of, largest_noise, tolerances_of
from .certificate import Row, rows_from_results
from .recorded_tasks import show_recorded_tasks
from .rollout import LONGEST, check_decoder, check_longest
from .run_golden import FORCED, NEWER, RUN, decoded_image, forced_rows, identity, run_ids
from .subject import RUNS, Subject

ROLLOUT_TOKENS = 64
NO_RUNS = "left out: the bundle holds no whole runs (it was exported with some components only)"


def files_and_graphs(subject: Subject, progress: Progress) -> tuple[list[Row], str]:
    """Check the SHA-256 of every file, then every graph with the ONNX checker and our lint.

    Raises InputError.
    """
    manifest = subject.bundle.manifest
    subject.bundle.verify(progress)
    done = f"{len(manifest.files)} files match their SHA-256"
    if not all(importlib.util.find_spec(name) for name in ("onnx", "onnx_ir")):
        return [], f"{done}; graphs not checked: onnx is not installed here (export checked them)"
    dialect = target_from_name(subject.target).dialect if subject.target else "modern"
    graphs: dict[str, tuple[str, str, str]] = {}  # -> the component, the dialect and whose rules hold
    for name, spec in manifest.components.items():
        if spec.twin:
            graphs[spec.twin] = name, "modern", ""  # for the CPU
        if spec.classic and not subject.target:
            graphs[spec.classic] = name, "classic", ""
        graphs[subject.bundle.graph_name(name, dialect=dialect)] = name, dialect, subject.target
    for i, (graph, (name, dialect, target)) in enumerate(graphs.items()):
        progress(f"check {graph}", i, len(graphs))
        with subject.bundle.loading_files(graph, subject.bundle.weights(name)) as path:
            check_onnx(path, dialect=dialect, target=target)
    return [], f"{done}; {len(graphs)} graphs pass the ONNX checker and the lint"


def check_onnx(path: Path, *, dialect: str, target: str) -> None:
    """Run the ONNX checker and the lint of `dialect` on one file, with the rules of `target` unless it is "".

    Raises InputError. The checker reads no weights, but refuses a link in their place, so it gets a copy of
    the graph beside empty files of their size. It infers types and shapes too, except in a classic graph:
    TensorRT supports bfloat16 in operators where the classic opset does not.
    """
    import onnx

    from ..graph.lint import check_graph

    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, path.name)
        copy.write_bytes(path.read_bytes())
        for weights in path.parent.glob("*.data"):
            with open(Path(folder, weights.name), "wb") as file:
                file.truncate(weights.stat().st_size)
        try:
            onnx.checker.check_model(str(copy), full_check=dialect == "modern")
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            place = str(real_path(path).parent)
            raise InputError(
                "This graph is not valid ONNX",
                where=f"{real_path(path)}: {str(error).strip().replace(folder, place)}",
                fix="export the bundle again",
            ) from None
    check_graph(path, dialect=dialect, target=target or None)


def golden_tensors(
    subject: Subject, progress: Progress, *, only: Callable[[str], bool] = lambda name: True
) -> tuple[list[Row], str]:
    """Compare every graph and table, or those whose names `only` accepts, with all their cases.

    Between two parts of a decoder, what one was recorded to hand on must be what the next was recorded with:
    so parts that are right one by one are right as a chain.
    """
    rows: list[Row] = []
    before: tuple[str, dict[str, Case]] = ("", {})
    left_out: list[str] = []
    manifest = subject.bundle.manifest
    components = [name for name in (*manifest.components, *manifest.tables) if only(name)]
    for i, name in enumerate(components):
        progress(f"{name} against its golden tensors", i, len(components))
        cases = recorded_cases(subject.bundle, name)
        if component_of(name) == component_of(before[0]):
            rows += _handed_on(name, cases, before[1])
        before = name, cases
        session = open_session(subject.bundle, name, backend=subject.backend, threads=subject.threads)
        try:
            outside = {case for case, given in cases.items() if not _fits(subject, name, session, given)}
            if len(outside) == len(cases):
                raise InputError(
                    "No golden case fits this plan",
                    where=f"{name}: expected profiles that hold one of {', '.join(cases)}",
                    fix="build the plans with more rows or a larger capacity",
                )
            left_out += [f"{name} {case}" for case in cases if case in outside]
            for case in sorted(cases.keys() - outside):
                results = run_case(
                    session,
                    cases[case],
                    tolerances=tolerances_of(name, subject.compute, cases[case].noise_in(subject.compute)),
                    capacity_tokens=session.capacity_tokens,
                    own_draws=subject.compute != "fp32",
                )
                rows += rows_from_results(name, f"case {case}", results)
                if subject.evidence:
                    subject.evidence.add(name, f"case {case}", results)
        finally:
            session.close()
    return (
        rows,
        f"not run, as the plans' profiles do not hold them: {', '.join(left_out)}" if left_out else "",
    )


def _handed_on(name: str, cases: dict[str, Case], before: dict[str, Case]) -> list[Row]:
    """Compare what the part `name` was recorded with and what the part before it was recorded to hand on."""
    rows: list[Row] = []
    for case, recorded in cases.items():
        taken = HANDED_ON.values()
        given = {name: array for name, array in recorded.inputs.items() if name in taken}
        wanted = handed_on(before[case].inputs, before[case].outputs) if case in before else {}
        results = compare(given, wanted, tolerances=dict.fromkeys(taken, 0.0))
        rows += rows_from_results(name, f"case {case}, handed on", results)
    return rows


def decoder_steps(
    subject: Subject,
    progress: Progress,
    *,
    tokens: int = ROLLOUT_TOKENS,
    chunk_tokens: int = ROLLOUT_TOKENS,
    seed: int = 0,
) -> tuple[list[Row], str]:
    """Compare single steps, a rewind and the last slot of every decoder with a prefill, at B=1 and B=2; and
    the longest prompt, with steps to the last slot of the full capacity, with the same in chunks.

    A decoder in parts is checked part by part. Unused slots hold poison. Where no plan fixes the full
    capacity, it is that which a plan has by default. `seed` and the decoder's name decide the inputs.
    """
    rows: list[Row] = []
    model = subject.bundle.manifest.model
    reached = model.max_positions
    decoders = [name for name in subject.bundle.manifest.components if component_of(name) in model.cache]
    for i, name in enumerate(decoders):
        progress(f"{name} step by step", i, len(decoders))
        cases = recorded_cases(subject.bundle, name)
        noise = largest_noise(cases.values(), subject.compute)
        tolerances = tolerances_of(name, subject.compute, noise)
        session = open_session(subject.bundle, name, backend=subject.backend, threads=subject.threads)
        try:
            capacity = session.capacity_tokens or min(tokens, model.max_positions)
            steps, chunk = (
                min(n, capacity, session.prefill_tokens or capacity) for n in (tokens, chunk_tokens)
            )
            tick = adder(progress, f"{name} step by step, in steps", 2 * steps)  # at B=1 and B=2
            checks = check_decoder(
                session,
                tokens=steps,
                chunk_tokens=chunk,
                capacity_tokens=capacity,
                tolerances=tolerances,
                seed=zlib.crc32(name.encode()) + seed,
                tick=functools.partial(tick, 1),
            )
            labels = dict.fromkeys(checks, f"{steps} steps, capacity {capacity}")
            full = session.capacity_tokens or limits_from_options(model).capacity_tokens
            longest = min(session.prefill_tokens or full, full)
            labels[LONGEST] = f"{longest} tokens, capacity {full}"
            checks[LONGEST] = check_longest(
                session,
                prompt_tokens=longest,
                capacity_tokens=full,
                chunk_tokens=min(chunk_tokens, longest),
                tolerances=tolerances,
                seed=zlib.crc32(name.encode()) + seed,
            )
        finally:
            session.close()
        reached = min(full, reached)
        for check, results in checks.items():
            if subject.evidence:
                subject.evidence.add(name, check, results)
            rows += rows_from_results(name, f"{check}: {labels[check]}", results)
    if not rows:
        return rows, "no decoder in this bundle"
    beyond = f"positions from {reached} on were not run: the model has {model.max_positions}"
    return rows, beyond if reached < model.max_positions else ""


def whole_runs(subject: Subject, progress: Progress) -> tuple[list[Row], str]:
    """Compare the ids of short runs of the runtime, greedy, sampled and answering, with the reference's.

    Where it was recorded, also the guided logits of the sampled run, teacher-forced; in 16 bits they are only
    shown.
    """
    cases = _recorded_runs(subject)
    if not cases:
        return [], NO_RUNS
    rows: list[Row] = []
    tolerance = 0.0 if subject.compute == "fp32" else 1.0
    with subject.star() as star:
        if refusal := no_room(star):
            return [], f"left out: {refusal}"
        for i, (case, recorded) in enumerate(cases.items()):
            progress(f"whole run: {case}", i, len(cases))
            if case == FORCED:
                rows += forced_rows(subject, star, recorded, drawn=cases["sample"])
                continue
            got = RUN[case](star, recorded)
            results = compare(got, recorded.outputs, tolerances=dict.fromkeys(recorded.outputs, tolerance))
            rows += rows_from_results("runtime", case, results)
            if subject.evidence:
                subject.evidence.ids.append(run_ids(star, case, got, recorded))
        if subject.evidence:
            subject.evidence.images.append(decoded_image(subject, star))
            show_recorded_tasks(subject.evidence, star)
    notes = [f"left out: {case}: export the bundle again to record it" for case in NEWER - set(cases)]
    if tolerance:
        notes.append(f"ids are reported, not bounded: in {subject.compute} a near tie may fall either way")
    return rows, "; ".join(notes)


def _recorded_runs(subject: Subject) -> dict[str, Case]:
    """The recorded whole runs by name, {} in a bundle without them. Raises InputError."""
    if RUNS not in subject.bundle.manifest.files:
        return {}
    cases = recorded_runs(subject.bundle, RUNS)
    if wrong := (set(cases) - {FORCED}) ^ set(RUN) - (NEWER - set(cases)):
        raise InputError(
            "The golden set cannot prove anything",
            where=f"{RUNS}: expected the cases {', '.join(RUN)}; "
            f"missing or unknown: {', '.join(sorted(wrong))}",
            fix="export the bundle again",
        )
    return cases


def fast_path(subject: Subject, progress: Progress) -> tuple[list[Row], str]:
    """What `onnxruntime` computes otherwise than `onnxruntime-exact`, the subject.

    Its graphs are compared with their golden tensors, within the recorded noise of int8 activations; and the
    ids of whole runs with the recorded ones, which the exact path gives.
    """
    bundle = subject.bundle
    compute = compute_of("onnxruntime", bundle.manifest.precision)
    fast = Subject(bundle, "onnxruntime", compute, threads=subject.threads)
    if fast.compute == subject.compute:
        return [], "onnxruntime and onnxruntime-exact are one path in this precision"
    rows, _ = golden_tensors(fast, progress, only=lambda name: name in bundle.manifest.components)
    cases = {name: case for name, case in _recorded_runs(subject).items() if name in RUN}
    if not cases:
        return rows, NO_RUNS
    try:
        with fast.star() as star:
            if refusal := no_room(star):
                return rows, f"left out: whole runs: {refusal}"
            for i, (case, recorded) in enumerate(cases.items()):
                progress(f"fast path: {case}", i, len(cases))
                (name, wanted), (got,) = (
                    next(iter(recorded.outputs.items())),
                    RUN[case](star, recorded).values(),
                )
                rows.append(identity(case, name, got.ravel(), wanted.ravel()))
    except MissingError as error:  # of memory, which others may have taken meanwhile
        return rows, f"left out: whole runs: {error.what}: {error.where}"
    return rows, "ids are reported, not bounded: with activations in int8 a near tie may fall either way"


def no_room(star: Star) -> str:
    """Why this machine cannot hold the decoders of `star` together, or "".

    Then its parts are still compared one by one, and what they hand on. A quarter more than they hold is for
    what loading and running them takes: 13 % with STAR-3B.
    """
    loaded = star.loaded
    use = loaded.use(rows=2, tokens=ROLLOUT_TOKENS, prompt_tokens=ROLLOUT_TOKENS)
    taken = task_memory(loaded.sizes, "generate", use)
    held = taken.resident_bytes if loaded.memory_bytes is None else taken.in_turn_bytes
    what, free = "run the decoders together", free_memory(star.backend)
    try:
        if free is not None:
            check_memory(held * 5 // 4, what=what, fix="", where=star.backend, free_bytes=free)
    except MissingError as error:
        return f"{error.what}: {error.where}"
    return ""


def _fits(subject: Subject, component: str, session, case: Case) -> bool:
    """Whether a plan's profiles or a network's capacity hold the case. ONNX takes every shape."""
    capacity = session.capacity_tokens
    if capacity is not None and any(
        present_name(name) and array.shape[2] > capacity for name, array in case.inputs.items()
    ):
        return False
    if not subject.backend.startswith("tensorrt:") or component in subject.bundle.manifest.tables:
        return True
    shapes = {
        name: (extended(array, capacity) if present_name(name) else array).shape
        for name, array in case.inputs.items()
    }
    _, plan = plan_spec(subject.bundle, subject.target, component)
    return any(fits(profile, shapes) for profile in plan.profiles)
