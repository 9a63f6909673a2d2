"""JSON records that carry the SHA-256 of their own contents: manifests, records of plans, certificates.

The hash tells damage and edits by hand. It does not tell intent: whoever can write the file can seal it.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from ..errors import InputError

CONTENT = "content_sha256"


def sealed_json(contents: dict[str, Any]) -> str:
    """`contents` as JSON text, with their own hash as the last entry."""
    return json.dumps(contents | {CONTENT: content_sha256(contents)}, indent=1, allow_nan=False) + "\n"


def content_sha256(contents: dict[str, Any]) -> str:
    """The SHA-256 (hex) of `contents`, without an entry for the hash itself, in a canonical form."""
    text = json.dumps(contents, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def unsealed(value: dict[str, Any], *, what: str, where: str, fix: str) -> dict[str, Any]:
    """The parsed contents of a sealed record without their hash.

    Raises InputError with `what` unless the hash is theirs.
    """
    contents = {key: entry for key, entry in value.items() if key != CONTENT}
    stated = value.get(CONTENT)
    if stated != (got := content_sha256(contents)):
        raise InputError(
            f"{what} was changed after it was written",
            where=f"{where}: {CONTENT}: expected {got[:16]}..., got {stated!r:.24}",
            fix=fix,
        )
    return contents
