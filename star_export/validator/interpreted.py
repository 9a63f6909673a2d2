"""The rung "interpreted": the network that TensorRT parsed, evaluated in numpy, against the reference. Needs no GPU.

Every component against its golden tensors, whole runs teacher-forced and greedy, an answer and an edit; in float32 throughout,
which is held to rounding level, and in the network's own types. The decoders step by step, with poison in unused slots, in
float32. It proves the meaning of the network, not the kernels.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping

import numpy as np

from engines.bundle.reader import Bundle
from engines.errors import InputError, UsageError
from engines.inputs.preprocess import edit_inputs
from engines.inputs.prompt import text_positions
from engines.interpreter import BUILDERS, Network
from engines.interpreter.parsed import Parsed
from engines.progress import Progress
from engines.runtime.decode import prefill
from engines.runtime.kv_cache import Slots, cache_buffers
from engines.runtime.star import Star
from engines.sessions import run
from engines.sessions.interpreter import InterpreterSession, open_session
from engines.targets import target_from_name
from engines.tensorrt.plan import plan_spec

from ..components import FLIPPED_IDS
from ..golden.cases import Case, cases_from_file, component_cases
from ..golden.compare import check, compare
from ..golden.run_case import run_case
from ..golden.tolerances import compute_type, tolerances_of
from .certificate import Row
from .rungs import decoder_steps, golden_tensors, rows_from_results, whole_runs
from .subject import RUNS, Subject

STEPS, CHUNK_TOKENS = 16, 256  # of each decoder one by one, and at once where the whole capacity is filled
RUN_TOKENS = 8  # of the answer and the edit
IMAGE = (56, 84, 3)
QUESTION, INSTRUCTION = "what is in the picture?", "make it blue"


def interpreted(subject: Subject, progress: Progress) -> tuple[list[Row], str]:
    """All of this module on the networks of `subject.target`, one row per kind of result, and what was left out."""
    target, bundle = subject.target, subject.bundle
    builder = target_from_name(target).builder
    if builder not in BUILDERS and subject.backend.startswith("tensorrt:"):
        return [], f"left out: networks of {builder} are not read back"
    if builder not in BUILDERS:  # then nothing at all would be proven
        raise UsageError(
            f"Networks of {builder} are not read back",
            fix="validate on the device: --target",
            where=f"{subject.backend}: expected a target of {', '.join(BUILDERS)}, got one of {builder}",
        )
    native = compute_type(bundle.manifest.precision, twin=False)
    rows, notes = [], [*_not_compared(bundle, target)]
    for backend, compute in {f"interpreter-fp32:{target}": "fp32", f"interpreter:{target}": native}.items():
        if backend.startswith("interpreter:") and native == "fp32":
            continue
        inner = Subject(bundle, backend, compute)
        for rung in (golden_tensors, *[_steps] * (compute == "fp32"), whole_runs, teacher_forced, images):
            found, note = rung(inner, progress)
            rows += [Row(row.component, f"{compute}: {row.check}", row.worst, row.compared) for row in found]
            notes += [f"{compute}: {note}"] if note else []
    return rows + ties(subject, progress), "; ".join(notes)


def _not_compared(bundle: Bundle, target: str) -> list[str]:
    """The components whose plan does not say which network it was compiled from."""
    names = [
        name for name in bundle.manifest.components if plan_spec(bundle, target, name)[1].network is None
    ]
    return [f"not compared with the networks that were compiled: {', '.join(names)}"] if names else []


def _steps(subject: Subject, progress: Progress) -> tuple[list[Row], str]:
    return decoder_steps(subject, progress, tokens=STEPS, chunk_tokens=CHUNK_TOKENS)


def teacher_forced(subject: Subject, progress: Progress) -> tuple[list[Row], str]:
    """The recorded greedy run, each step fed with the recorded id whatever was drawn: how many ids differ step by step."""
    if RUNS not in subject.bundle.manifest.files:
        return [], ""
    case = cases_from_file(subject.bundle.file(RUNS))["generate"]
    progress("teacher-forced run", 0, 1)
    with Star(subject.bundle, backend=subject.backend) as star:
        ids = forced_ids(star, case)
    tolerances = {"image_ids": 0.0 if subject.compute == "fp32" else FLIPPED_IDS}
    return rows_from_results(
        "runtime", "teacher-forced", compare({"image_ids": ids}, case.outputs, tolerances=tolerances)
    ), ""


def forced_ids(star: Star, case: Case) -> np.ndarray:
    """Arg-max ids [1,n] along the recorded ids of `case` (input_ids [2,L], guidance [1] -> image_ids [1,n])."""
    rows, guidance, recorded = case.inputs["input_ids"], case.inputs["guidance"], case.outputs["image_ids"][0]
    base, stacked, head = (star.session(name) for name in ("base_ar", "stacked_ar", "image_head"))
    capacity = base.capacity_tokens or rows.shape[1] + len(recorded) - 1
    slots, decoders = (
        Slots(capacity),
        [(s, cache_buffers(s, rows=2, capacity_tokens=capacity)) for s in (base, stacked)],
    )
    embeds, positions = (
        run(star.session("token_embedding"), {"input_ids": rows})["inputs_embeds"],
        text_positions(*rows.shape),
    )
    got = []
    for i, wanted in enumerate(recorded):
        feeds = {
            "hidden_states": prefill(decoders, embeds, positions, slots),
            "guidance": guidance,
            "top_k": np.array([1]),
            "top_p": np.ones(1, np.float32),
            "uniform": np.zeros(1, np.float32),
        }
        drawn = run(head, feeds)
        got.append(drawn["image_ids"][0])
        if drawn["image_ids"][0] != wanted:
            drawn = _drawn(head, feeds, drawn["logits"][0], int(wanted), star.model.top_k_limit)
        embeds, positions = drawn["inputs_embeds"], np.full((3, 2, 1), rows.shape[1] + i)
    return np.array([got])


def _drawn(
    head, feeds: Mapping[str, np.ndarray], logits: np.ndarray, wanted: int, top_k: int
) -> Mapping[str, np.ndarray]:
    """`feeds` with the uniform number that draws `wanted`: the middle of its share of the cumulative probability."""
    order = np.argsort(-logits, kind="stable")[:top_k]
    shares = np.exp(logits[order].astype(np.float64) - logits.max())
    ((rank,),) = (np.nonzero(order == wanted),)
    if not len(rank):
        raise InputError(
            "The recorded run cannot be followed",
            where=f"image_head: expected id {wanted} among the first {top_k}, got none",
            fix="the logits are far from the recorded ones: see the golden tensors of image_head",
        )
    middle = (shares[: rank[0]].sum() + shares[rank[0]] / 2) / shares.sum()
    return run(head, feeds | {"top_k": np.array([top_k]), "uniform": np.array([middle], np.float32)})


def images(subject: Subject, progress: Progress) -> tuple[list[Row], str]:
    """An answer and an edit of a made-up image, greedy: the ids of ONNX Runtime on the same bundle."""
    names = subject.bundle.manifest.components
    needed = {
        "vision_encoder",
        "vq_encoder",
        "base_ar",
        "stacked_ar",
        "token_embedding",
        "text_head",
        "image_head",
    }
    if not importlib.util.find_spec("onnxruntime") or not needed <= set(names):
        return [], "left out: edit and ask, which are compared with ONNX Runtime on the whole bundle"
    tolerance = 0.0 if subject.compute == "fp32" else 1.0
    progress("ask and edit", 0, 1)
    with (
        Star(subject.bundle, backend="onnxruntime") as oracle,
        Star(subject.bundle, backend=subject.backend) as star,
    ):
        found = []
        for name, ids in (("ask", asked_ids), ("edit", edited_ids)):
            wanted, got = ids(oracle), ids(star)
            if tolerance:  # an answer that ends earlier than the other is compared as far as both go
                wanted, got = (array[..., : min(wanted.shape[-1], got.shape[-1])] for array in (wanted, got))
            found += rows_from_results(
                "runtime", name, compare({"ids": got}, {"ids": wanted}, tolerances={"ids": tolerance})
            )
    return found, ""


def asked_ids(star: Star) -> np.ndarray:
    """Ids of a short answer about the made-up image."""
    return star.ask(_image(), QUESTION, max_new_tokens=RUN_TOKENS).ids


def edited_ids(star: Star) -> np.ndarray:
    """The first image ids [1,n] of an edit of the made-up image, greedy: what `Star.edit` does, stopped early."""
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
        uniforms=np.zeros((tokens, 1), np.float32),
    )


_PIXELS = 4 * 28 * 28


def _image() -> np.ndarray:
    """A smooth colourful image, uint8 [H,W,3]."""
    y, x, c = np.ogrid[: IMAGE[0], : IMAGE[1], :3]
    return (127.5 + 127.5 * np.sin(x / 9 + y / (7 + c) + 2 * c)).astype(np.uint8)


def ties(subject: Subject, progress: Progress) -> list[Row]:
    """Components that rank, with equal elements in the other order: TensorRT does not say which comes first, so nothing may
    depend on it."""
    found, components = [], subject.bundle.manifest.components
    for i, (name, spec) in enumerate(components.items()):
        session = open_session(subject.bundle, name, target=subject.target, wide=True, ties="last")
        progress(f"{name} with ties the other way", i, len(components))
        if not session.ranks:
            continue
        for case, recorded in component_cases(subject.bundle.file(spec.golden), spec).items():
            found += rows_from_results(
                name,
                f"fp32: case {case}, ties the other way",
                run_case(session, recorded, tolerances=tolerances_of(name, "fp32", {})),
            )
    return found


def look_at_golden(bundle: Bundle) -> Callable[[str, Parsed], None]:
    """For `engines.tensorrt.build.build_plans(look=...)`: every network is held to its golden tensors in the call that compiles it, in
    float32 throughout. Raises ParityError, and then no plan is written."""

    def look(component: str, parsed: Parsed) -> None:
        spec = bundle.component(component)
        session, cases = (
            InterpreterSession(Network(parsed, wide=True), spec),
            component_cases(bundle.file(spec.golden), spec),
        )
        capacity = session.capacity_tokens
        fitting = {
            name: case
            for name, case in cases.items()
            if capacity is None or case.inputs["past_key_values.0.key"].shape[2] <= capacity
        }
        if not fitting:
            raise InputError(
                "No golden case fits this network",
                fix="build with a larger capacity, or without this check",
                where=f"{component}: expected a capacity that holds one of {', '.join(cases)}, got {capacity}",
            )
        for case, recorded in fitting.items():
            results = run_case(
                session, recorded, tolerances=tolerances_of(component, "fp32", {}), capacity_tokens=capacity
            )
            check(results, where=f"{component}, read back: case {case}")

    return look
