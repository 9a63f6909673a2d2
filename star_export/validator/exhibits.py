"""The images, answers and plots of a report, as HTML. This module knows nothing of how they were made."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Iterable

import numpy as np

from engines.bundle.manifest import component_of
from engines.inputs.image_io import bytes_from_image

from ..golden.compare import Comparison, excess
from .certificate import Certificate
from .evidence import Draws, Evidence, ShownAnswer, ShownImage
from .plots import Scale, bars, histogram, lines

FLOOR = 1e-6  # of a logarithmic axis: a smaller share of a tolerance is drawn as this
TOLERANCE = (1.0, "tolerance")


def html_from_images(evidence: Evidence) -> str:
    """The images, reference and candidate side by side with their difference, and the answers."""
    shown = [_image(image) for image in evidence.images]
    shown += [_answer(answer) for answer in evidence.answers]
    shown += [
        '<div class="card"><h3>Answer to recorded ids</h3>'
        + _both(
            *run.text, f"{run.identical} of {len(run.wanted)} ids are equal before the first that differs."
        )
        + "</div>"
        for run in evidence.ids
        if run.text
    ]
    shown += [f"<p>{_text(note)}</p>" for note in evidence.notes]
    absent = [
        *["a drawn image of a prompt"] * (not any(image.seed is not None for image in evidence.images)),
        *["an edited image"] * (not any(image.given is not None for image in evidence.images)),
        *["an answer about an image"] * (not evidence.answers),
    ]
    if absent:
        shown.append(
            f"<p>Absent: {_text(', '.join(absent))}. The bundle has no recorded tasks of this kind, or this "
            "validation did not reach them.</p>"
        )
    return "\n".join(shown)


def html_from_plots(certificate: Certificate, evidence: Evidence) -> str:
    """All plots for which there are numbers, and a sentence on those for which there are none."""
    figures, absent = [], []
    for what, plot in (
        ("error by component", _components(certificate)),
        ("error by layer", _layers(evidence)),
        ("error by decode step", _steps(evidence)),
        ("divergence of the draws", _divergence(evidence.draws)),
        ("overlap of the kept ids", _overlap(evidence.draws)),
        ("margins of the draws", _margins(evidence.draws)),
        ("identical ids", _prefixes(evidence)),
    ):
        if plot:
            figures.append(
                f'<figure class="plot card"><figcaption>{_text(plot[0])}</figcaption>{plot[1]}</figure>'
            )
        else:
            absent.append(what)
    grid = '<div class="grid">' + "\n".join(figures) + "</div>"
    if absent:
        grid += (
            f"<p>Absent: {_text(', '.join(absent))}. The bundle does not hold what they need, or this "
            "validation did not reach it.</p>"
        )
    return grid


Figure = tuple[str, str] | None  # caption and SVG


def _components(certificate: Certificate) -> Figure:
    worst: dict[str, Comparison] = {}
    for rung in certificate.rungs:
        for row in rung.rows:
            if row.component == "runtime" or (row.worst.tolerance == 0 and row.worst.passed):
                continue
            key = f"{component_of(row.component)} {row.worst.tensor.partition('.')[0]}"
            if key not in worst or excess(row.worst) > excess(worst[key]):
                worst[key] = row.worst
    if not worst:
        return None
    rows = [
        (name, excess(result), result.fault or f"{result.value:.2g} of {result.tolerance:.2g}")
        for name, result in worst.items()
    ]
    shares = [share for _, share, _ in rows if math.isfinite(share)]
    scale = Scale(max(min([*shares, 1.0]), FLOOR), max([*shares, 1.0]), log=True)
    caption = "Largest error of each component's outputs, as a share of its tolerance"
    description = (
        f"{len(rows)} bars; the dashed line at 1 is the tolerance. Largest: {max(shares, default=0):.2g}."
    )
    return caption, bars(rows, caption, description, scale=scale, limit=1.0)


def _layers(evidence: Evidence) -> Figure:
    return _shares(
        {name: shares for name, shares in evidence.layers.items() if len(shares) > 1},
        "Largest error of each layer's cache, as a share of its tolerance",
        "layer",
    )


def _steps(evidence: Evidence) -> Figure:
    return _shares(evidence.steps, "Largest error of each decode step, as a share of its tolerance", "step")


def _shares(found: dict[str, dict[int, float]], caption: str, x_label: str) -> Figure:
    if not found:
        return None
    series = {name: [(x, max(y, FLOOR)) for x, y in sorted(shares.items())] for name, shares in found.items()}
    largest = max(y for points in series.values() for _, y in points)
    return caption, lines(
        series,
        caption,
        f"{len(series)} lines, the dashed line is the tolerance. Largest: {largest:.2g}.",
        x_label=x_label,
        y_label="share of the tolerance, logarithmic",
        log=True,
        limit=TOLERANCE,
    )


def _prefixes(evidence: Evidence) -> Figure:
    runs = evidence.ids + evidence.fixed_set
    if not runs:
        return None
    rows = [
        (_short(run.name), run.identical / len(run.wanted), f"{run.identical} of {len(run.wanted)}")
        for run in runs
    ]
    equal = sum(run.identical == len(run.wanted) for run in runs)
    caption = f"Ids before the first that differs from the reference: {equal} of {len(runs)} runs are equal"
    if evidence.fixed_set:
        caption += "; those with a prompt are compared with the fp32 checkpoint's"
    description = "A full bar is a run that is equal id for id."
    return caption, bars(rows, caption, description, scale=Scale(0, 1))


def _divergence(draws: Draws | None) -> Figure:
    if draws is None:
        return None
    caption = "How far the candidate's draw of each token is from the reference's, on the same ids"
    series = {
        "KL, in nats": _points(np.maximum(draws.kl, 1e-12)),
        "total variation": _points(np.maximum(draws.total_variation, 1e-12)),
    }
    return caption, lines(
        series,
        caption,
        f"Mean KL {draws.kl.mean():.2g} nats, largest {draws.kl.max():.2g}; mean total variation "
        f"{draws.total_variation.mean():.2g}.",
        x_label="token of the image",
        y_label="divergence, logarithmic",
        log=True,
        floor=1e-12,
    )


def _overlap(draws: Draws | None) -> Figure:
    if draws is None:
        return None
    caption = "Share of the ids the reference may draw (top-k, top-p) that the candidate may draw too"
    return caption, lines(
        {"overlap": _points(draws.overlap)},
        caption,
        f"Mean {draws.overlap.mean():.4g}, smallest {draws.overlap.min():.4g}.",
        x_label="token of the image",
        y_label="share of the kept ids",
    )


def _margins(draws: Draws | None) -> Figure:
    if draws is None or not np.isfinite(draws.margins).any():
        return None
    finite = draws.margins[np.isfinite(draws.margins)]
    caption = f"How near each drawn token was to another one; the nearest by {finite.min():.2g} nats"
    return caption, histogram(
        finite.tolist(),
        caption,
        f"{len(finite)} of {len(draws.margins)} tokens; for the others the filters kept one id.",
        x_label="margin of the drawn id over the next one, in nats",
        y_label="tokens",
    )


def _points(values: np.ndarray) -> list[tuple[float, float]]:
    return [(float(i), float(value)) for i, value in enumerate(values)]


def _image(shown: ShownImage) -> str:
    panels = [("given", shown.given)] * (shown.given is not None)
    panels += [("reference", shown.reference)] * (shown.reference is not None)
    panels += [("candidate", shown.candidate)]
    note = shown.note
    if shown.reference is not None and shown.reference.shape == shown.candidate.shape:
        difference, said = _difference(shown.candidate, shown.reference)
        panels.append(("difference", difference))
        note = f"{note} {said}"
    pictures = "".join(_panel(name, image, shown.title) for name, image in panels if image is not None)
    return (
        f'<div class="card"><h3>{_text(shown.title)}</h3><div class="images">{pictures}</div>'
        f"<p>{_text(note)}</p></div>"
    )


def _difference(candidate: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, str]:
    """The absolute difference of two images, made brighter so that it can be seen, and its size in words."""
    apart = np.abs(candidate.astype(np.int16) - reference.astype(np.int16))
    largest = int(apart.max())
    if not largest:
        return apart.astype(np.uint8), "All pixels are equal."
    count = int((apart > 0).any(-1).sum())
    said = f"{count} of {apart.shape[0] * apart.shape[1]} pixels differ, by at most {largest} of 255"
    brighter = 255 // largest
    return (apart * brighter).astype(np.uint8), f"{said}; the difference is shown {brighter} times as bright."


def _answer(shown: ShownAnswer) -> str:
    if shown.reference is not None:
        same = "The answers are equal." if shown.answer == shown.reference else "The answers differ."
        said = _both(shown.answer, shown.reference, same)
    else:
        judged = "right" if shown.right else "wrong"
        said = (
            f"<p>The candidate answers {_quoted(shown.answer)}, judged {judged}. "
            "The benchmark has no answer of the reference.</p>"
        )
    return (
        f'<div class="card"><h3>{_text(shown.question)}</h3><div class="images">'
        f"{_panel('given', shown.given, shown.question)}</div>{said}</div>"
    )


def _both(candidate: str, reference: str, note: str) -> str:
    return (
        f"<dl><dt>reference</dt><dd>{_quoted(reference)}</dd>"
        f"<dt>candidate</dt><dd>{_quoted(candidate)}</dd></dl><p>{_text(note)}</p>"
    )


def _panel(name: str, image: np.ndarray, title: str) -> str:
    data = base64.b64encode(bytes_from_image(np.ascontiguousarray(image))).decode()
    return (
        f'<figure><img src="data:image/png;base64,{data}" width="{image.shape[1]}" height="{image.shape[0]}" '
        f'alt="{_text(name)}: {_text(title)}"><figcaption>{_text(name)}</figcaption></figure>'
    )


def _short(name: str, limit: int = 44) -> str:
    return name if len(name) <= limit else f"{name[: limit - 3]}..."


def _quoted(text: str) -> str:
    return f"<q>{_text(text)}</q>"


def _text(value: object) -> str:
    return html.escape(str(value))


def commands(certificate: Certificate, evidence: Evidence, bundle: str) -> Iterable[list[str]]:
    """The commands that make the page and its first drawn image again, as words."""
    backend, _, target = certificate.backend.partition(":")
    how = ["--target", target] if target else ["--backend", backend]
    yield ["star-export", "validate", bundle, *how, "--report", "parity.html"]
    yield ["sha256sum", f"{bundle}/manifest.json"]
    for image in [image for image in evidence.images if image.seed is not None][:1]:
        how = ["--backend", certificate.backend, "--seed", str(image.seed)]
        yield ["star-export", "generate", bundle, image.title, *how, "-o", "image.png"]
