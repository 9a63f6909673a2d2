"""Read certificates back, and check that they are of these bytes, of this device, and as they were written.

The chain: a certificate has its own hash, the manifest's, and those of the plans that ran; the manifest has
the hash of every file. Whoever can write all of them can forge all of them: see SECURITY.md on signing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.bundle.files import MANIFEST, read_regular, sha256_of
from engines.bundle.reader import Bundle
from engines.bundle.records import strict, value_from_json
from engines.bundle.seal import unsealed
from engines.errors import InputError, MissingError, ParityError, StarError, listed
from engines.tensorrt.plan import plan_name, plan_state, read_build

from .certificate import (
    FOLDER,
    SCHEMA,
    Certificate,
    certificate_path,
    device_name,
)

LIMIT_BYTES = 64 << 20
DAMAGED, OTHER_BYTES, OTHER_DEVICE, FAILED, VALID = (
    "damaged",
    "of other bytes",
    "of another device",
    "FAILED",
    "passed",
)


@dataclass(frozen=True)
class Link:
    """One file in `certificates/` and what it is worth: its `state`, and in words why (`reason`).

    `certificate` is None where the file cannot be trusted.
    """

    path: Path
    state: str
    reason: str
    certificate: Certificate | None


def certificate_from_json(text: str, *, where: str) -> Certificate:
    """Parse a certificate strictly. Raises InputError for an older schema, an unknown or missing key, a wrong
    type, and contents that do not have the hash that the file states."""
    value: Any = value_from_json(text, where=where)
    schema = value.get("schema") if isinstance(value, dict) else None
    if type(schema) is not int or schema != SCHEMA:
        raise InputError(
            "This certificate is of another version",
            where=f"{where}: schema: expected {SCHEMA}, got {schema!r:.40}",
            fix="run star-export validate again",
        )
    contents = unsealed(
        value,
        what="This certificate",
        where=where,
        fix="remove it and run star-export validate again; a certificate must not be edited by hand",
    )
    return strict(Certificate, _with_nan(contents), where)


def _with_nan(value: dict) -> dict:
    """Leave out the numbers of comparisons that were not finite, as their defaults are; a value that was not
    finite is a fault."""
    for rung in value.get("rungs") or ():
        for row in rung.get("rows") or () if isinstance(rung, dict) else ():
            worst = row.get("worst") if isinstance(row, dict) else None
            if isinstance(worst, dict):
                row["worst"] = {key: number for key, number in worst.items() if number is not None}
                if worst.get("value", 0) is None:
                    row["worst"] |= {"value": 0.0, "fault": worst.get("fault") or "not a finite number"}
    return value


def read_certificate(path: Path) -> Certificate:
    """Read one file with `certificate_from_json`. Raises InputError."""
    try:
        text = read_regular(path, limit_bytes=LIMIT_BYTES, where="certificate").decode()
    except UnicodeDecodeError as error:
        raise InputError(
            "This certificate is not a text file",
            where=f"{path}: expected UTF-8, got {error.reason} at byte {error.start}",
            fix="remove it and run star-export validate again",
        ) from None
    return certificate_from_json(text, where=str(path))


def links(bundle: Bundle) -> list[Link]:
    """Check every certificate of `bundle`. A damaged one is listed as that, and never raises."""
    return [link(bundle, path) for path in sorted((bundle.path / FOLDER).glob("*.json"))]


def link(bundle: Bundle, path: Path) -> Link:
    """Check one certificate: its own hash, manifest and plans as they are now, the device, the verdict."""
    try:
        found = read_certificate(path)
    except InputError as error:
        return Link(path, DAMAGED, _sentence(error), None)
    if changed := changed_bytes(bundle, found):
        return Link(path, OTHER_BYTES, changed, found)
    if elsewhere := other_device(found):
        return Link(path, OTHER_DEVICE, elsewhere, found)
    return Link(path, VALID if found.passed else FAILED, "", found)


def changed_bytes(bundle: Bundle, certificate: Certificate) -> str:
    """What is not as it was validated: the manifest, or a plan that ran. "" if all is the same."""
    now = sha256_of(bundle.path / MANIFEST)
    if now != certificate.manifest_sha256:
        return f"{MANIFEST}: expected sha256 {certificate.manifest_sha256[:16]}..., got {now[:16]}..."
    if not certificate.plans:
        return ""
    target = certificate.backend.partition(":")[2]
    try:
        plans = read_build(bundle, target).components
        for name, sha256 in certificate.plans.items():
            plan = plan_name(target, name)
            if name not in plans:
                return f"{plan}: expected sha256 {sha256[:16]}..., got no such plan"
            if plans[name].plan.sha256 != sha256:
                got = plans[name].plan.sha256
                return f"{plan}: expected sha256 {sha256[:16]}..., got {got[:16]}..."
            if (state := plan_state(bundle.path, plan, plans[name].plan)) != "ok":
                return f"{plan}: expected sha256 {sha256[:16]}..., got {state}"
    except StarError as error:
        return _sentence(error)
    return ""


def other_device(certificate: Certificate) -> str:
    """Why this machine's device is not the one that was validated, or ""."""
    try:
        here = device_name(certificate.backend)
    except MissingError as error:
        here = f"no such device here ({error.what})"
    return "" if here == certificate.device else f"device: expected {here}, got {certificate.device}"


def check_certified(bundle: Bundle, backend: str) -> Certificate:
    """The certificate of `backend` that holds for these bytes on this device.

    Raises InputError if there is none, if it is damaged, of other bytes or of another device, and ParityError
    for one that says FAILED.
    """
    found = [one for one in links(bundle) if _names(one, bundle, backend)]
    best = min(
        found,
        key=lambda one: (VALID, FAILED, OTHER_BYTES, DAMAGED, OTHER_DEVICE).index(one.state),
        default=None,
    )
    again = f"star-export validate {bundle.path} " + (
        f"--target {backend.partition(':')[2]}" if ":" in backend else f"--backend {backend}"
    )
    if best is None:
        names = listed([one.certificate.backend for one in links(bundle) if one.certificate])
        raise InputError(
            "There is no certificate of this backend",
            where=f"{bundle.path / FOLDER}: expected one of {backend}, got {names or 'none'}",
            fix=again,
        )
    if best.state == FAILED:
        raise ParityError(
            "This bundle was validated, and failed",
            where=f"{best.path}: expected passed, got FAILED",
            fix="do not use this bundle here; export or build it again",
        )
    if best.state != VALID or best.certificate is None:
        raise InputError(f"This certificate is {best.state}", where=f"{best.path}: {best.reason}", fix=again)
    return best.certificate


def _names(one: Link, bundle: Bundle, backend: str) -> bool:
    """Whether a file is of `backend`: by its contents, or by its name where they cannot be trusted."""
    if one.certificate:
        return one.certificate.backend == backend
    return one.path.name.startswith(certificate_path(bundle.path, backend, "").name.removesuffix(".json"))


def _sentence(error: StarError) -> str:
    return f"{error.what}: {error.where}".replace(os.linesep, " ")
