"""The verbs `validate` and `certificate`: prove a bundle, and say whether what was proved still holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.bundle.reader import Bundle
from engines.bundle.typed_paths import output_file
from engines.errors import ParityError, UsageError

from .bisecting import bisected
from .outputs import Outcome, table
from .progress_bar import ProgressBar

if TYPE_CHECKING:
    from ..validator.certificate import Rung


def validate(
    bundle: str,
    *,
    target: str | None = None,
    backend: str = "onnxruntime-exact",
    report: str | None = None,
    bisect: str | None = None,
    source: str | None = None,
    threads: int | None = None,
    progress: bool = True,
) -> Outcome:
    """Run the parity ladder, `star_export.validator.ladder.validate`. Raises ParityError when it fails.

    With `bisect`, the component of that name is compared layer by layer instead, by
    `star_export.validator.bisect.bisect`; or, if it is "", the component that fails, whose report stands
    beside the other.
    """
    from ..validator.certificate import certificate_path, json_from_certificate
    from ..validator.ladder import validate as validate_bundle

    if (bisect is None) != (source is None):
        raise UsageError(
            "A bisection needs the checkpoint, and nothing else does",
            where=f"validate: expected --bisect and --source together, got only "
            f"{'--source' if bisect is None else '--bisect'}",
            fix=f"star-export validate {bundle} --bisect COMPONENT --source SOURCE",
        )
    if bisect is not None and threads is not None:
        raise UsageError(
            "A bisection has no number of threads",
            where="validate: expected one of --bisect and --threads, got both",
            fix="omit --threads",
        )
    page = None if report is None else output_file(report)
    with ProgressBar("validate", shown=progress) as bar:
        options: dict[str, Any] = {"source": source, "target": target, "progress": bar}
        if bisect:
            return bisected(bundle, bisect, page=page, **options)
        try:
            certificate = validate_bundle(
                bundle, backend=backend, target=target, report=page, threads=threads, progress=bar
            )
        except ParityError as error:
            component = error.where.partition(":")[0]
            if bisect is None or component not in Bundle.open(bundle).manifest.components:
                raise
            beside = page and page.with_name(f"{page.stem}-bisection{page.suffix}")
            return bisected(bundle, component, page=beside, error=error, **options)
    path = certificate_path(Path(bundle), certificate.backend, certificate.device)
    lines = [
        (
            rung.name,
            "left out" if rung.left_out else "passed",
            f"{sum(row.compared for row in rung.rows)} tensors" if rung.rows else "",
            f"{rung.seconds:.1f} s",
            _nearest(rung) or rung.note,
        )
        for rung in certificate.rungs
    ]
    head = ("rung", "", "compared", "took", "nearest to its tolerance")
    gaps = "\n".join(f"  not proven: {gap}" for gap in certificate.not_proven)
    return Outcome(
        json.loads(json_from_certificate(certificate)) | {"certificate": str(path)},
        f"{table(head, lines)}\n{gaps}\ncertificate: {path}",
    )


def certificate(bundle: str, *, backend: str | None = None, progress: bool = True) -> Outcome:
    """List the certificates of a bundle and check each against the bytes and the device that are here.

    With `backend`, its certificate must hold. Raises InputError for a bundle whose files have changed and, of
    a named backend, for a certificate that is absent, damaged, of other bytes or of another device; and
    ParityError for one that failed (`star_export.validator.chain.check_certified`).
    """
    from ..validator.chain import check_certified, links

    opened = Bundle.open(bundle)
    with ProgressBar("certificate", shown=progress) as bar:
        opened.verify(bar)
    if backend is not None:
        check_certified(opened, backend)
    found = [one for one in links(opened) if backend is None or _is_of(one, backend)]
    data = [
        {
            "file": str(one.path),
            "state": one.state,
            "reason": one.reason,
            "backend": one.certificate.backend if one.certificate else None,
            "device": one.certificate.device if one.certificate else None,
            "driver": one.certificate.driver if one.certificate else None,
            "made_at": one.certificate.made_at if one.certificate else None,
            "manifest_sha256": one.certificate.manifest_sha256 if one.certificate else None,
            "plans": one.certificate.plans if one.certificate else None,
            "versions": one.certificate.versions if one.certificate else None,
            "compared": _compared(one.certificate.rungs) if one.certificate else None,
            "not_proven": list(one.certificate.not_proven) if one.certificate else None,
        }
        for one in found
    ]
    lines = [
        (one.path.name, one.state, one.certificate.made_at if one.certificate else "", one.reason)
        for one in found
    ]
    text = table(("certificate", "", "made at", "why"), lines) if lines else "no certificate in this bundle"
    gaps = [
        f"{one.path.name}: not proven: {gap}"
        for one in found
        if one.certificate and one.state == "passed"
        for gap in one.certificate.not_proven
    ]
    return Outcome({"bundle": str(opened.path), "certificates": data}, "\n".join([text, *gaps]))


def _compared(rungs) -> dict[str, int]:
    """How many tensors each rung compared."""
    return {rung.name: sum(row.compared for row in rung.rows) for rung in rungs}


def _is_of(one, backend: str) -> bool:
    return one.certificate is not None and one.certificate.backend == backend


def _nearest(rung: Rung) -> str:
    """The result of a rung that uses the largest share of its tolerance."""
    from ..golden.compare import excess

    if not rung.rows:
        return ""
    row = max(rung.rows, key=lambda row: excess(row.worst))
    return f"{row.component} {row.worst.tensor}: {row.worst.value:.3g} of {row.worst.tolerance:.3g}"
