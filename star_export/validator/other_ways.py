"""The same ids in other ways: windows of several tokens, several images at once, components loaded in turn.

None of these may change an id, so each is compared with the plain way: one token per forward, one image, and
all components resident. This module knows nothing of the ladder or of the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from engines.fit.memory import DRAW, task_memory
from engines.progress import Progress
from engines.runtime.star import Star
from engines.tensorrt.plan import plan_spec
from engines.tensorrt.profiles import largest

from ..golden.cases import Case, recorded_runs
from ..golden.compare import compare
from .certificate import Row, rows_from_results
from .run_golden import RUN
from .rungs import no_room
from .subject import RUNS, Subject

WINDOW_TOKENS = 8
SAMPLE, ANSWER = "sample", "answer"  # cases of whole runs


def other_ways(subject: Subject, progress: Progress, *, seed: int | None = None) -> tuple[list[Row], str]:
    """Compare the ids of the recorded sampled run, and of the answer, in each way with the plain one.

    `seed` draws in place of the recorded one. Ids are exact in fp32. In other types matrices of another shape
    round differently, and a near tie may fall either way, so the share of other ids is reported.
    """
    if RUNS not in subject.bundle.manifest.files:
        return [], "left out: the bundle holds no whole runs (it was exported with some components only)"
    cases = recorded_runs(subject.bundle, RUNS)
    tokens = cases[SAMPLE].outputs["image_ids"].shape[1]
    if seed is not None:
        cases[SAMPLE].inputs["seed"] = np.array([seed])
    with subject.star() as star:
        if refusal := no_room(star):
            return [], f"left out: {refusal}"
        plain = RUN[SAMPLE](star, cases[SAMPLE])["image_ids"]
        answer = RUN[ANSWER](star, cases[ANSWER])["ids"]
        limits = [session.prefill_tokens or tokens for session in star.loaded.sessions(*DRAW)]
        window = min(WINDOW_TOKENS, tokens - 1, *limits)
        budget = _in_turn_bytes(star, cases[SAMPLE], tokens)
    ways: dict[str, Callable[[], dict[str, np.ndarray]]] = {
        f"window of {window} tokens": lambda: _drawn(subject, cases[SAMPLE], window=window),
        "first of two images": lambda: _first_of_two(subject, cases[SAMPLE]),
        "loaded in turn": lambda: _in_turn(subject, cases, budget),
    }
    left_out = []
    if window < 2:
        left_out.append("windows, which need plans for several positions or runs of several tokens")
        del ways[f"window of {window} tokens"]
    if _most_rows(subject) < 4:
        left_out.append("two images at once, which need plans for 4 rows")
        del ways["first of two images"]
    tolerances = dict.fromkeys(("image_ids", "ids"), 0.0 if subject.compute == "fp32" else 1.0)
    rows: list[Row] = []
    for i, (way, run) in enumerate(ways.items()):
        progress(f"the same ids: {way}", i, len(ways))
        got = run()
        wanted = {name: ids for name, ids in (("image_ids", plain), ("ids", answer)) if name in got}
        rows += rows_from_results("runtime", way, compare(got, wanted, tolerances=tolerances))
    note = [f"left out: {words}" for words in left_out]
    if subject.compute != "fp32":
        note.append(f"ids are reported, not bounded: in {subject.compute} a near tie may fall either way")
    return rows, "; ".join(note)


def _drawn(subject: Subject, case: Case, *, window: int) -> dict[str, np.ndarray]:
    with subject.star(window=window) as star:
        return dict(RUN[SAMPLE](star, case))


def _first_of_two(subject: Subject, case: Case) -> dict[str, np.ndarray]:
    """The first image, drawn beside one whose two rows are those of the first in the other order."""
    ids = case.inputs["input_ids"]
    both = Case(case.inputs | {"input_ids": np.concatenate([ids, ids[::-1]])}, case.outputs)
    with subject.star() as star:
        return {"image_ids": RUN[SAMPLE](star, both)["image_ids"][:1]}


def _in_turn(subject: Subject, cases: dict[str, Case], budget: int) -> dict[str, np.ndarray]:
    """Draw, answer and draw again: each takes the place of what the other had loaded."""
    options: dict[str, Any] = {"window": 1, "memory": budget, "threads": subject.threads}
    with Star(subject.bundle, backend=subject.backend, **options) as star:
        RUN[SAMPLE](star, cases[SAMPLE])
        answer = dict(RUN[ANSWER](star, cases[ANSWER]))
        return answer | dict(RUN[SAMPLE](star, cases[SAMPLE]))


def _in_turn_bytes(star: Star, case: Case, tokens: int) -> int:
    """The least memory in which `star` draws and answers, so that it cannot hold what both need."""
    length = case.inputs["input_ids"].shape[1]
    use = star.loaded.use(rows=2, tokens=length + tokens, prompt_tokens=length)
    return max(task_memory(star.loaded.sizes, task, use).in_turn_bytes for task in ("generate", "ask"))


def _most_rows(subject: Subject) -> int:
    """The largest batch that the plans of a subject hold; ONNX takes every size."""
    if not subject.backend.startswith("tensorrt:"):
        return 4
    sizes = []
    for part in subject.bundle.parts("base_ar"):
        spec, plan = subject.bundle.component(part), plan_spec(subject.bundle, subject.target, part)[1]
        sizes.append(largest(plan.profiles, spec, axis="B") or 4)
    return min(sizes)
