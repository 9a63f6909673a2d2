"""Format a certificate and its evidence as one self-contained HTML page for a person.

This module knows nothing of how they were made.
"""

from __future__ import annotations

import html
import math
import shlex

from ..golden.compare import excess, verdict
from .certificate import Certificate, Row, Rung
from .evidence import Evidence
from .exhibits import commands, html_from_images, html_from_plots
from .page import html_page

_HEAD = (
    "",
    "component",
    "check",
    "worst tensor",
    "value",
    "tolerance",
    "max abs difference",
    "cosine",
    "tensors compared",
)


def html_from_certificate(
    certificate: Certificate, evidence: Evidence, *, bundle: str, more: str = ""
) -> str:
    """Make the page: verdict, gaps, images, plots, tables, `more` (HTML), machine, hashes and commands.

    `bundle` is the path that the commands name.
    """
    title = f"{certificate.bundle}, {certificate.precision}, on {certificate.backend}"
    facts = {
        "bundle": certificate.bundle,
        "precision": certificate.precision,
        "backend": certificate.backend,
        "compute type": certificate.compute,
        "device": certificate.device,
        "made at": certificate.made_at,
        "manifest SHA-256": certificate.manifest_sha256,
    }
    facts |= {f"plan {name} SHA-256": sha256 for name, sha256 in certificate.plans.items()}
    facts |= certificate.versions
    return html_page(
        title,
        [
            f"<h1>{_verdict(certificate.passed)}: {_text(title)}</h1>",
            f'<p class="lead{"" if certificate.passed else " failed"}">{_text(_covers(certificate))}</p>',
            "<h2>Not proven</h2>",
            "<ul>",
            *(f"<li>{_text(gap)}</li>" for gap in certificate.not_proven),
            "</ul>",
            "<h2>What was drawn and answered</h2>",
            f'<div class="cards">{html_from_images(evidence)}</div>',
            "<h2>Errors and draws</h2>",
            html_from_plots(certificate, evidence),
            "<h2>All comparisons</h2>",
            "<p>A value is the largest absolute difference in units of the reference's standard deviation, "
            "or for ids the share that differs. Each row shows the worst of the tensors that were "
            "compared.</p>",
            *(_rung(rung) for rung in certificate.rungs),
            *([more] if more else []),
            "<h2>Machine, versions and hashes</h2>",
            "<table>",
            *(f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in facts.items()),
            "</table>",
            "<h2>To reproduce</h2>",
            f"<pre>{_text(_lines(certificate, evidence, bundle))}</pre>",
        ],
    )


def _covers(certificate: Certificate) -> str:
    """The verdict in words, and what it covers."""
    rows = [row for rung in certificate.rungs for row in rung.rows]
    names = ", ".join(rung.name for rung in certificate.rungs if rung.rows)
    tensors, components = sum(row.compared for row in rows), {row.component for row in rows} - {"runtime"}
    compared = (
        f"{tensors} tensors of {len(components)} components and tables, in the rungs {names}, were compared "
        "with what the reference computed from the same inputs and the same rounded weights."
    )
    if not certificate.passed:
        row = max((row for row in rows if not row.worst.passed), key=lambda row: excess(row.worst))
        return (
            f"This bundle does not compute what the reference computes. Worst: {row.component}: {row.check}: "
            f"{verdict(row.worst)}. {compared} The rungs after the one that failed did not run."
        )
    bounded = [row for row in rows if row.component != "runtime" and row.worst.tolerance > 0]
    if not bounded:
        return f"What was compared agrees. {compared}"
    row = max(bounded, key=lambda row: excess(row.worst))
    return (
        f"On {certificate.device} this bundle computes what the reference computes. {compared} Nearest to "
        f"its tolerance is {row.component}: {row.worst.tensor}, which used {excess(row.worst):.0%} of it."
    )


def _lines(certificate: Certificate, evidence: Evidence, bundle: str) -> str:
    return "\n".join(map(shlex.join, commands(certificate, evidence, bundle)))


def _rung(rung: Rung) -> str:
    note = f"<p>{_text(rung.note)}</p>" if rung.note else ""
    head = "<tr>" + "".join(f"<th>{name}</th>" for name in _HEAD) + "</tr>"
    table = (
        f'<div class="scroll"><table>{head}{"".join(map(_row, rung.rows))}</table></div>' if rung.rows else ""
    )
    word = "left out" if rung.left_out else _verdict(rung.passed)
    title = f"{word}: {_text(rung.name)} ({rung.seconds:.1f} s, {len(rung.rows)} rows)"
    return f"<details{'' if rung.passed else ' open'}><summary>{title}</summary>{note}{table}</details>"


def _row(row: Row) -> str:
    r = row.worst
    numbers = "".join(
        f'<td class="n">{_number(value)}</td>'
        for value in (r.value, r.tolerance, r.max_abs, r.cosine, row.compared)
    )
    tensor = ": ".join(part for part in (r.place, r.tensor, r.fault) if part)
    words = "".join(f"<td>{_text(cell)}</td>" for cell in (row.component, row.check, tensor))
    return f"\n<tr><td>{_verdict(r.passed)}</td>{words}{numbers}</tr>"


def _verdict(passed: bool) -> str:
    return '<span class="pass">passed</span>' if passed else '<span class="fail">FAILED</span>'


def _number(value: float) -> str:
    return f"{value:.6g}" if math.isfinite(value) else "–"


def _text(value: object) -> str:
    return html.escape(str(value))
