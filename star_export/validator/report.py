"""Format a certificate as one self-contained HTML page. This module knows nothing of how it was made."""

from __future__ import annotations

import html
import math

from .certificate import Certificate, Row, Rung

_STYLE = """\
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:75rem;padding:0 1rem}
body{color:#1a1a1a;background:#fff}
table{border-collapse:collapse;width:100%;margin:.5rem 0 2rem}
th,td{text-align:left;padding:.2rem .7rem;border-bottom:1px solid #ddd}
td.n{text-align:right;font-variant-numeric:tabular-nums}
.pass{color:#06662d}.fail{color:#a30b0b;font-weight:600}"""
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


def html_from_certificate(certificate: Certificate, more: str = "") -> str:
    """Make the page: the verdict, what ran where, a table per rung, `more` (HTML), and what is not proven."""
    facts = {
        "bundle": certificate.bundle,
        "precision": certificate.precision,
        "backend": certificate.backend,
        "compute type": certificate.compute,
        "device": certificate.device,
        "made at": certificate.made_at,
        "manifest SHA-256": certificate.manifest_sha256,
    } | certificate.versions
    title = f"{certificate.bundle}, {certificate.precision}, on {certificate.backend}"
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><meta charset="utf-8">',
            f"<title>{_text(title)}</title>",
            f"<style>{_STYLE}</style>",
            f"<h1>{_verdict(certificate.passed)} {_text(title)}</h1>",
            "<table>",
            *(f"<tr><th>{_text(name)}<td>{_text(value)}" for name, value in facts.items()),
            "</table>",
            "<p>A value is the largest absolute difference in units of the reference's standard deviation, "
            "or for ids the share that differs. Each row shows the worst of the tensors that were compared.",
            *(_rung(rung) for rung in certificate.rungs),
            *([more] if more else []),
            "<h2>Not proven</h2>",
            "<ul>",
            *(f"<li>{_text(gap)}" for gap in certificate.not_proven),
            "</ul>",
            "</html>",
            "",
        ]
    )


def _rung(rung: Rung) -> str:
    note = f"<p>{_text(rung.note)}" if rung.note else ""
    head = "<tr>" + "".join(f"<th>{name}" for name in _HEAD) if rung.rows else ""
    rows = "".join(map(_row, rung.rows))
    title = f"<h2>{_verdict(rung.passed)} {_text(rung.name)} ({rung.seconds:.1f} s)</h2>"
    return f"{title}{note}<table>{head}{rows}</table>"


def _row(row: Row) -> str:
    r = row.worst
    numbers = "".join(
        f'<td class="n">{_number(value)}'
        for value in (r.value, r.tolerance, r.max_abs, r.cosine, row.compared)
    )
    tensor = ": ".join(part for part in (r.place, r.tensor, r.fault) if part)
    words = "".join(f"<td>{_text(cell)}" for cell in (row.component, row.check, tensor))
    return f"\n<tr><td>{_verdict(r.passed)}{words}{numbers}"


def _verdict(passed: bool) -> str:
    return '<span class="pass">passed</span>' if passed else '<span class="fail">FAILED</span>'


def _number(value: float) -> str:
    return f"{value:.6g}" if math.isfinite(value) else "–"


def _text(value: object) -> str:
    return html.escape(str(value))
