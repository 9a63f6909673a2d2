"""The rung "interpreted": the network that TensorRT parsed, evaluated in numpy. It needs no GPU.

It compares every component with its golden tensors, whole runs (teacher-forced and greedy), an answer and an
edit, both in float32 throughout, at rounding level, and in the network's own types; and in float32 the
decoders step by step, with poison in unused slots. It proves the meaning of the network, not the kernels.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import numpy as np

from engines.bundle.manifest import component_of
from engines.bundle.reader import Bundle
from engines.bundle.tensors import present_name
from engines.errors import InputError, UsageError
from engines.inputs.preprocess import edit_inputs
from engines.inputs.prompt import text_positions
from engines.interpreter import BUILDERS, Network
from engines.interpreter.parsed import Parsed
from engines.progress import Progress
from engines.runtime.kv_cache import Slots, cache_buffers
from engines.runtime.prefill import prefill
from engines.runtime.star import Star
from engines.sessions import Session, run
from engines.sessions.interpreter import InterpreterSession, open_session
from engines.targets import target_from_name
from engines.tensorrt.plan import plan_spec

from ..components import COMPONENTS, DIFFUSION, FLIPPED_IDS, FLIPPED_IDS_NVFP4
from ..golden.cases import Case, recorded_cases, recorded_runs
from ..golden.compare import check, compare
from ..golden.run_case import run_case
from ..golden.tolerances import compute_type, tolerances_of
from .certificate import Row, rows_from_results
from .rungs import decoder_steps, golden_tensors, whole_runs
from .subject import RUNS, Subject

STEPS, CHUNK_TOKENS = 16, 256  # single steps of each decoder; tokens at once to fill the whole capacity
LARGE_BYTES = 2 << 30  # a step of a larger bundle takes numpy minutes, and all of it at once too much memory
PART_BY_PART = (
    "left out at this size: single steps and whole runs; golden tensors hold every graph, and what a part "
    "hands on"
)
RUN_TOKENS = 8  # length of the answer and the edit
PROVES = "proves the meaning of the network, not the kernels"
USED = COMPONENTS.keys() - {"vq_decoder", *DIFFUSION}  # by an answer and an edit's ids
IMAGE = (56, 84, 3)
QUESTION, INSTRUCTION = "what is in the picture?", "make it blue"


def interpreted(subject: Subject, progress: Progress) -> tuple[list[Row], str]:
    """Run all checks of this module on the networks of `subject.target`.

    Returns one row per kind of result, and what was left out. Raises UsageError if nothing could be proven.
    """
    target, bundle = subject.target, subject.bundle
    builder = target_from_name(target).builder
    if builder not in BUILDERS and subject.backend.startswith("tensorrt:"):
        return [], f"left out: the interpreter does not support networks of {builder}"
    if builder not in BUILDERS:  # without the device, nothing at all would be proven
        raise UsageError(
            f"The interpreter does not support networks of {builder}",
            where=f"{subject.backend}: expected a target of {', '.join(BUILDERS)}, got one of {builder}",
            fix="validate on the device with --target",
        )
    precision = bundle.manifest.precision
    native, wide = compute_type(precision, twin=False), compute_type(precision, twin=True)
    rows: list[Row] = []
    large = sum(file.size for file in bundle.manifest.files.values()) > LARGE_BYTES
    notes = [PROVES, *_not_compared(bundle, target), *[PART_BY_PART] * large]
    for backend, compute in {f"interpreter-fp32:{target}": wide, f"interpreter:{target}": native}.items():
        if backend.startswith("interpreter:") and native == "fp32":
            continue
        inner = Subject(bundle, backend, compute)
        rungs = [golden_tensors, *[_steps] * (compute == wide), whole_runs, teacher_forced, images]
        for rung in rungs[:1] if large else rungs:
            found, note = rung(inner, progress)
            rows += [Row(row.component, f"{compute}: {row.check}", row.worst, row.compared) for row in found]
            notes += [f"{compute}: {note}"] if note else []
    return rows + ties(subject, progress), "; ".join(notes)


def _not_compared(bundle: Bundle, target: str) -> list[str]:
    """A note on the components whose plans do not record the network that they were compiled from."""
    names = [
        name for name in bundle.manifest.components if plan_spec(bundle, target, name)[1].network is None
    ]
    return [f"not compared with the networks that were compiled: {', '.join(names)}"] if names else []


def _steps(subject: Subject, progress: Progress) -> tuple[list[Row], str]:
    return decoder_steps(subject, progress, tokens=STEPS, chunk_tokens=CHUNK_TOKENS)


def teacher_forced(subject: Subject, progress: Progress) -> tuple[list[Row], str]:
    """Repeat the recorded greedy run, but feed each step the recorded id: compares the ids step by step."""
    if RUNS not in subject.bundle.manifest.files:
        return [], ""
    case = recorded_runs(subject.bundle, RUNS)["generate"]
    progress("teacher-forced run", 0, 1)
    with Star(subject.bundle, backend=subject.backend, window=1) as star:
        ids = forced_ids(star, case)
    flipped = FLIPPED_IDS_NVFP4 if subject.bundle.manifest.precision == "nvfp4" else FLIPPED_IDS
    tolerances = {"image_ids": 0.0 if subject.compute == "fp32" else flipped}
    results = compare({"image_ids": ids}, case.outputs, tolerances=tolerances)
    return rows_from_results("runtime", "teacher-forced", results), ""


def forced_ids(star: Star, case: Case) -> np.ndarray:
    """The arg-max ids [1,n] along the recorded ids of `case`, which has input_ids [2,L] and guidance [1]."""
    rows, guidance, recorded = case.inputs["input_ids"], case.inputs["guidance"], case.outputs["image_ids"][0]
    base, stacked, head = (star.session(name) for name in ("base_ar", "stacked_ar", "image_head"))
    capacity = base.capacity_tokens or rows.shape[1] + len(recorded) - 1
    slots = Slots(capacity)
    decoders = [(s, cache_buffers(s, rows=2, capacity_tokens=capacity)) for s in (base, stacked)]
    embeds = run(star.session("token_embedding"), {"input_ids": rows})["inputs_embeds"]
    positions = text_positions(*rows.shape)
    got = []
    for i, wanted in enumerate(recorded):
        feeds = {
            "hidden_states": prefill(decoders, embeds, positions, slots),
            "guidance": guidance,
            "top_k": np.array([1]),
            "top_p": np.ones(1, np.float32),
            "noise": np.zeros((1, 1, star.model.codebook_size), np.float32),
        }
        drawn = run(head, feeds)
        got.append(drawn["image_ids"][0, 0])
        if got[-1] != wanted:
            drawn = _drawn(head, feeds, drawn["logits"][0, 0], int(wanted), star.model.top_k_limit)
        embeds, positions = drawn["inputs_embeds"], np.full((3, 2, 1), rows.shape[1] + i)
    return np.array([got])


def _drawn(
    head: Session, feeds: dict[str, np.ndarray], logits: np.ndarray, wanted: int, top_k: int
) -> dict[str, np.ndarray]:
    """Run the image head with noise that draws `wanted`."""
    if (logits > logits[wanted]).sum() >= top_k:
        raise InputError(
            "The recorded run cannot be followed",
            where=f"image_head: expected id {wanted} among the {top_k} likeliest, which do not contain it",
            fix="the logits are far from the recorded ones: compare the golden tensors of image_head",
        )
    feeds["noise"][0, 0, wanted] = np.inf
    return run(head, feeds | {"top_k": np.array([top_k])})


def images(subject: Subject, progress: Progress) -> tuple[list[Row], str]:
    """Compare the ids of a greedy answer and edit of a made-up image with ONNX Runtime on the same bundle."""
    if not importlib.util.find_spec("onnxruntime") or not _components(subject.bundle) >= USED:
        return [], "left out: edit and ask, which are compared with ONNX Runtime on the whole bundle"
    tolerance = 0.0 if subject.compute == "fp32" else 1.0
    progress("ask and edit", 0, 1)
    with (
        Star(subject.bundle, backend="onnxruntime-exact", window=1) as oracle,
        Star(subject.bundle, backend=subject.backend, window=1) as star,
    ):
        found = []
        for name, ids in (("ask", asked_ids), ("edit", edited_ids)):
            wanted, got = ids(oracle), ids(star)
            if tolerance:  # answers of different lengths are compared up to the shorter one's end
                wanted, got = (array[..., : min(wanted.shape[-1], got.shape[-1])] for array in (wanted, got))
            results = compare({"ids": got}, {"ids": wanted}, tolerances={"ids": tolerance})
            found += rows_from_results("runtime", name, results)
    return found, ""


def _components(bundle: Bundle) -> set[str]:
    return {component_of(name) for name in bundle.manifest.components} | set(bundle.manifest.tables)


def asked_ids(star: Star) -> np.ndarray:
    """The ids of a short answer about the made-up image."""
    return star.ask(_image(), QUESTION, max_new_tokens=RUN_TOKENS).ids


def edited_ids(star: Star) -> np.ndarray:
    """The first image ids [1,n] of a greedy edit of the made-up image, like `Star.edit` stopped early."""
    vision, square = edit_inputs(_image(), star.model, min_pixels=_PIXELS, max_pixels=_PIXELS)
    rows = star.chat.edit_prompt(INSTRUCTION, grid_h=vision.grid_h, grid_w=vision.grid_w)
    embeds = star.embedded(rows, vision=vision, square=square)
    tokens = min(RUN_TOKENS, star.model.image_tokens)
    loop = star.image_loop(num_images=1, length=rows.input_ids.shape[1], tokens=tokens)
    return loop.draw(
        embeds,
        rows.position_ids,
        guidance=3.0,
        top_k=1,
        top_p=1.0,
        seed=None,
    )


_PIXELS = 4 * 28 * 28


def _image() -> np.ndarray:
    """A smooth, colourful image, uint8 [H,W,3]."""
    y, x, c = np.ogrid[: IMAGE[0], : IMAGE[1], :3]
    return (127.5 + 127.5 * np.sin(x / 9 + y / (7 + c) + 2 * c)).astype(np.uint8)


def ties(subject: Subject, progress: Progress) -> list[Row]:
    """Evaluate the components that rank elements with ties in reverse order.

    TensorRT does not define which of two equal elements comes first, so nothing may depend on it.
    """
    found: list[Row] = []
    components = subject.bundle.manifest.components
    wide = compute_type(subject.bundle.manifest.precision, twin=True)
    for i, name in enumerate(components):
        session = open_session(subject.bundle, name, target=subject.target, wide=True, ties="last")
        progress(f"{name} with ties reversed", i, len(components))
        if not session.ranks:
            continue
        for case, recorded in recorded_cases(subject.bundle, name).items():
            tolerances = tolerances_of(name, wide, recorded.noise_in(wide))
            results = run_case(session, recorded, tolerances=tolerances)
            found += rows_from_results(name, f"{wide}: case {case}, ties reversed", results)
    return found


def look_at_golden(bundle: Bundle) -> Callable[[str, Parsed], None]:
    """A callback for `engines.tensorrt.build.build_plans(look=...)` that checks networks before compilation.

    It compares the network with its golden tensors, in float32 throughout. It raises ParityError for a
    difference, and then no plan is written.
    """

    wide = compute_type(bundle.manifest.precision, twin=True)

    def look(component: str, parsed: Parsed) -> None:
        spec = bundle.component(component)
        session = InterpreterSession(Network(parsed, wide=True), spec)
        cases = recorded_cases(bundle, component)
        capacity = session.capacity_tokens
        fitting = {
            name: case
            for name, case in cases.items()
            if capacity is None
            or all(a.shape[2] <= capacity for n, a in case.inputs.items() if present_name(n))
        }
        if not fitting:
            raise InputError(
                "No golden case fits this network",
                where=f"{component}: expected a capacity for one of {', '.join(cases)}, got {capacity}",
                fix="build with a larger capacity, or without this check",
            )
        for case, recorded in fitting.items():
            tolerances = tolerances_of(component, wide, recorded.noise_in(wide))
            results = run_case(session, recorded, tolerances=tolerances, capacity_tokens=capacity)
            check(results, where=f"{component}, interpreted: case {case}")

    return look
