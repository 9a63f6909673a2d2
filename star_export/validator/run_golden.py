"""The runtime on the recorded whole runs: what it draws and answers, and its logits when it is fed the ids.

The case `forced` holds the guided logits of the sampled run. Teacher-forced logits are continuous where ids
are not, so they have a tolerance: an error too small to change an id is seen.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from engines.inputs.preprocess import images_from_decoded
from engines.inputs.prompt import Prompt
from engines.runtime.gumbel import gumbel_noise
from engines.runtime.star import Star
from engines.sessions import run

from ..golden.cases import Case, recorded_cases
from ..golden.compare import Comparison, compare
from .certificate import Row, rows_from_results
from .evidence import RunIds, ShownImage, draws_from_logits
from .subject import Subject
from .teacher_forced import forced_logits

FORCED = "forced"
FORCED_TOLERANCE = 1e-3  # of their standard deviation, in float32; the miniature's bundles are below 3e-5


def identity(case: str, name: str, got: np.ndarray, wanted: np.ndarray) -> Row:
    """How many ids of a run equal `wanted` [n], and where the first other one is; `got` may be shorter."""
    equal = got[: len(wanted)] == wanted[: len(got)]
    first = len(equal) if equal.all() else int(equal.argmin())
    said = "all" if first == len(wanted) else f"{equal.sum()} of {len(wanted)}, first other at {first}"
    others = Comparison(name, 1 - float(equal.sum()) / len(wanted), 1.0)
    return Row("runtime", f"{case}: ids as the exact path's: {said}", others, len(wanted))


def _generate(star, case: Case) -> Mapping[str, np.ndarray]:
    given = case.inputs
    ids = star.generate_ids(
        given["input_ids"],
        guidance=float(given["guidance"][0]),
        top_k=int(given.get("top_k", [1])[0]),
        top_p=float(given.get("top_p", [1.0])[0]),
        seed=int(given["seed"][0]) if "seed" in given else None,
        tokens=case.outputs["image_ids"].shape[1],
    )
    return {"image_ids": ids}


def _answer(star, case: Case) -> Mapping[str, np.ndarray]:
    given, penalty = case.inputs, case.inputs.get("repetition_penalty")
    ids = star.answer_ids(
        given["input_ids"],
        given["position_ids"],
        max_new_tokens=len(case.outputs["ids"]),
        repetition_penalty=None if penalty is None else float(penalty[0]),
    )
    return {"ids": ids}


RUN = {"generate": _generate, "sample": _generate, "answer": _answer, "repeat": _answer}
NEWER = {"repeat"}  # that older bundles do not have


def forced_rows(subject: Subject, star: Star, forced: Case, *, drawn: Case) -> list[Row]:
    """Compare the guided logits of the sampled run, teacher-forced; `drawn` is the case of that run.

    In 16 bits there is no tolerance and no row, but the evidence has the divergence of each token.
    """
    given, wanted = forced.inputs, forced.outputs["logits"]
    prompt = Prompt.of_text(given["input_ids"])
    got = forced_logits(star, prompt, given["image_ids"], guidance=float(given["guidance"][0]))
    if subject.evidence and got.shape == wanted.shape and np.isfinite(got).all():
        settings = drawn.inputs
        noise = gumbel_noise(
            int(settings["seed"][0]), image=0, steps=range(wanted.shape[1]), size=wanted.shape[2]
        )
        subject.evidence.draws = draws_from_logits(
            got[0],
            wanted[0],
            top_k=int(settings["top_k"][0]),
            top_p=float(settings["top_p"][0]),
            noise=noise,
        )
    if subject.compute != "fp32":
        return []
    results = compare({"logits": got}, {"logits": wanted}, tolerances={"logits": FORCED_TOLERANCE})
    return rows_from_results("runtime", "sample, teacher-forced", results)


def run_ids(star: Star, case: str, got: Mapping[str, np.ndarray], recorded: Case) -> RunIds:
    """The ids of both sides of a run, and of an answer its text."""
    (name, wanted), (ours,) = next(iter(recorded.outputs.items())), got.values()
    text = (star.chat.text(ours), star.chat.text(wanted)) if name == "ids" else None
    return RunIds(case, ours.ravel(), wanted.ravel(), text)


def decoded_image(subject: Subject, star: Star) -> ShownImage:
    """The golden image of the VQ decoder, of random ids, beside the candidate's."""
    case = next(iter(recorded_cases(subject.bundle, "vq_decoder").values()))
    ids, wanted = case.inputs["image_ids"][:1], case.outputs["image"][:1]
    got = run(star.session("vq_decoder"), {"image_ids": ids})["image"]
    return ShownImage(
        "VQ decoder on random ids",
        "The reference's pixels are recorded in the bundle.",
        images_from_decoded(got)[0],
        images_from_decoded(wanted)[0],
    )
