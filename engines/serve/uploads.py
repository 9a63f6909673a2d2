"""Pictures that clients send: files of a form, base64, or data URLs; never an address to fetch."""

from __future__ import annotations

import base64
import binascii
import re
from typing import Any

from .fields import invalid
from .refusals import Refused

_DATA_URL = re.compile(r"data:[-\w.+/]{0,60}(?:;[-\w.=]{0,60}){0,3},")


def bytes_from_field(value: Any, name: str) -> bytes:
    """The bytes of a picture's file, of a form or in base64. Raises Refused."""
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise invalid(name, "a file, or base64", value)
    if re.match(r"(?i)\s*[a-z]{2,8}://", value):
        raise Refused(
            400,
            "Pictures are not fetched",
            where=f"{name}: expected the picture itself, got the address {value[:80]!r}",
            fix="send it as base64: data:image/png;base64,...",
            param=name,
            code="invalid_image_url",
        )
    if found := _DATA_URL.match(value):
        if not found[0].lower().endswith(";base64,"):
            raise invalid(name, "a data URL in base64", value[:60])
        value = value[found.end() :]
    try:
        data = base64.b64decode("".join(value.split()), validate=True)
    except (binascii.Error, ValueError):
        raise invalid(name, "base64, or a data URL in base64", f"a text of {len(value)} characters") from None
    if not data:
        raise invalid(name, "a picture", "a text without data")
    return data
