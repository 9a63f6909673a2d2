"""The verb `certificate`: what was proved of a bundle, where, and whether it still holds."""

from __future__ import annotations

from engines.bundle.reader import Bundle

from .outputs import Outcome, table
from .progress_bar import ProgressBar


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
