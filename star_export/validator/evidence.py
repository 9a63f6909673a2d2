"""What a report shows beside a certificate's rows: small arrays that the rungs hand over while they run.

This module knows nothing of sessions or pages. A certificate does not depend on it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from engines.bundle.manifest import component_of
from engines.runtime.sampler import filtered

from ..golden.compare import Comparison, excess
from ..golden.divergence import divergence


@dataclass(frozen=True)
class RunIds:
    """The ids int64 [n] of one run, drawn or answered, and those that the reference recorded."""

    name: str
    got: np.ndarray
    wanted: np.ndarray
    text: tuple[str, str] | None = None  # of an answer, the candidate's and the reference's

    @property
    def identical(self) -> int:
        """How many ids are equal before the first that differs."""
        equal = self.got[: len(self.wanted)] == self.wanted[: len(self.got)]
        return len(equal) if equal.all() else int(equal.argmin())


@dataclass(frozen=True)
class Draws:
    """The guided distributions of the T tokens of one image, teacher-forced on the reference's ids: float64
    [T] each.

    `kl` in nats and `total_variation` are those of `star_export.golden.divergence`; `overlap` is the share of
    the ids that the reference's filters keep which the candidate's keep too. `margins` is by how many nats
    the reference's logit and noise of the drawn id exceed those of the next one, infinite where the filters
    keep one id only.
    """

    kl: np.ndarray
    total_variation: np.ndarray
    overlap: np.ndarray
    margins: np.ndarray


@dataclass(frozen=True)
class ShownImage:
    """Images uint8 [R, R, 3] of one task; without a `reference` none was recorded. `given` is what an edit
    started from, and `seed` that of the prompt `title`, if it is one."""

    title: str
    note: str
    candidate: np.ndarray
    reference: np.ndarray | None = None
    given: np.ndarray | None = None
    seed: int | None = None


@dataclass(frozen=True)
class ShownAnswer:
    """A question on the image `given`, uint8 [R, R, 3], and the candidate's answer.

    Either a benchmark found it `right` or not, or the answer of the `reference` is recorded.
    """

    question: str
    answer: str
    given: np.ndarray
    right: bool | None = None
    reference: str | None = None


@dataclass
class Evidence:
    """What the rungs handed over.

    `layers` maps a decoder to the largest share of its tolerance that a cache of each layer used, and `steps`
    a check to that of each decode step. `fixed_set` has the images of STAR-Nano's fixed set of prompts.
    `notes` are sentences on what is not shown.
    """

    layers: dict[str, dict[int, float]] = field(default_factory=dict)
    steps: dict[str, dict[int, float]] = field(default_factory=dict)
    ids: list[RunIds] = field(default_factory=list)
    fixed_set: list[RunIds] = field(default_factory=list)
    draws: Draws | None = None
    images: list[ShownImage] = field(default_factory=list)
    answers: list[ShownAnswer] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, component: str, check: str, results: Iterable[Comparison]) -> None:
        """Take over the shares of one check of `component` that have a layer or a step."""
        for result in results:
            share = excess(result)
            family, _, rest = result.tensor.partition(".")
            layer = rest.partition(".")[0]
            if family == "present" and layer.isdecimal():
                _raise_to(self.layers, component_of(component), int(layer), share)
            word, _, step = result.place.partition(":")[0].partition(" ")
            if word == "step" and step.isdecimal():
                _raise_to(self.steps, f"{component}, {check}", int(step), share)


def _raise_to(found: dict[str, dict[int, float]], key: str, place: int, share: float) -> None:
    shares = found.setdefault(key, {})
    shares[place] = max(share, shares.get(place, 0.0))


def draws_from_logits(
    candidate: np.ndarray, reference: np.ndarray, *, top_k: int, top_p: float, noise: np.ndarray
) -> Draws:
    """Compare guided, unfiltered logits [T, V] of both; `noise` [T, V] is that of the reference's draw.

    Raises InputError for logits of different shapes, and for numbers that are not finite.
    """
    apart = divergence(candidate, reference, top_k=top_k, top_p=top_p)
    ours, theirs = (filtered(x, top_k=top_k, top_p=top_p) for x in (candidate, reference))
    kept = theirs > -np.inf
    overlap = (kept & (ours > -np.inf)).sum(-1) / kept.sum(-1)
    ranked = np.sort((theirs + noise).astype(np.float64), axis=-1)
    return Draws(apart.kl, apart.total_variation, overlap, ranked[:, -1] - ranked[:, -2])
