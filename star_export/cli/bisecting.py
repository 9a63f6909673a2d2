"""`validate --bisect`: where a component leaves the reference, as data and text."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from pathlib import Path

from engines.bundle.files import write_atomic
from engines.bundle.reader import Bundle
from engines.errors import MissingError, ParityError, install
from engines.progress import Progress

from .outputs import Outcome

PACKAGES = ("torch", "onnx", "onnx_ir", "onnxruntime", "polygraphy")


def bisected(
    bundle: str,
    component: str,
    *,
    source: str,
    target: str | None,
    page: Path | None,
    progress: Progress,
    error: ParityError | None = None,
) -> Outcome:
    """Compare `component` layer by layer with `star_export.validator.bisect.bisect`; `page` is for a report.

    The outcome fails with `error`, or where a tensor is beyond its tolerance. Raises MissingError where a
    package that the reference or its comparison needs is not installed.
    """
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise MissingError(
            "The packages that a bisection needs are not installed",
            where=f"expected {', '.join(PACKAGES)}; missing: {', '.join(missing)}",
            fix=install("cpu,export,debug"),
        )
    from ..golden.compare import verdict
    from ..validator.bisect import bisect, text_from_bisections
    from ..validator.bisection_report import html_from_bisections

    found = bisect(Bundle.open(bundle), component, source=source, target=target, progress=progress)
    if page is not None:
        write_atomic(page, html_from_bisections(found, bundle=bundle).encode())
    wrong = [(one, one.first) for one in found if one.first]
    if wrong and error is None:
        one, first = wrong[0]
        error = ParityError(
            "A tensor inside differs from the reference",
            where=f"{one.component} on {one.backend}: case {one.case}: node {first.node}: "
            f"{verdict(first.result)}",
            fix="look at that node; do not use this bundle",
        )
    data = {"bisections": [_plain(dataclasses.asdict(one)) for one in found]}
    return Outcome(data, text_from_bisections(found), error)


def _plain(value):
    """The same data with null for numbers that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
