"""A bisection as one self-contained HTML page: the first wrong tensor, and the error along the depth."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from .bisect import Bisection, Depth, text_of_bisection
from .page import html_page
from .plots import Plot, Scale

FLOOR = 1e-9  # of errors on the logarithmic axis; equal numbers are drawn at it


def html_from_bisections(found: Sequence[Bisection], *, bundle: str) -> str:
    """Make the page: a plot and the comparisons of each graph, the failing ones first."""
    ordered = sorted(found, key=lambda one: one.first is None)
    verdict = "All tensors are right" if ordered[0].first is None else "A tensor differs"
    body = [f"<h1>{verdict}: {html.escape(bundle)}, layer by layer</h1>"]
    for one in ordered:
        body += [
            f"<h2>{html.escape(one.component)} on {html.escape(one.backend)}</h2>",
            f'<figure class="card plot">{svg_along_depth(one)}</figure>',
            f"<details><summary>All {len(one.rows)} tensors</summary>",
            f"<pre>{html.escape(text_of_bisection(one))}</pre></details>",
        ]
    return html_page(f"{bundle}: bisection", body)


def svg_along_depth(found: Bisection) -> str:
    """Plot each tensor's error as a share of its tolerance, in the order in which they are computed.

    What is beyond its tolerance is filled; what has another shape or is absent stands at the top.
    """
    shares = [_share(row) for row in found.rows]
    finite = [share for share in shares if math.isfinite(share)]
    top = max([10.0, *finite])
    plot = Plot(Scale(0, max(len(shares) - 1, 1)), Scale(max(min([1.0, *finite]), FLOOR), top, log=True))
    plot.limit(y=1.0, says="tolerance")
    for i, (row, share) in enumerate(zip(found.rows, shares, strict=True)):
        name = row.module or row.result.tensor
        plot.point(i, share, f"{name}: {share:.3g} of its tolerance", filled=not row.result.passed)
    first = found.first
    where = "none is beyond its tolerance"
    if first is not None:
        plot.limit(x=float(found.rows.index(first)), says="first wrong")
        where = f"the first beyond its tolerance is {first.module or first.result.tensor}"
    return plot.svg(
        "Error along the depth",
        f"{len(shares)} tensors of {found.component}, case {found.case}: {where}.",
        x_label="tensors, in the order in which they are computed",
        y_label="error as a share of the tolerance",
    )


def _share(row: Depth) -> float:
    """The error of a tensor over its tolerance, infinite where there is no number to compare."""
    if row.result.fault:
        return math.inf
    if not row.result.tolerance:  # of ids, which are equal or not
        return math.inf if row.result.value else FLOOR
    return max(row.result.value / row.result.tolerance, FLOOR)
