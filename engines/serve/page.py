"""The page at /: one file, whose own script and style are the only ones that a browser may run for it."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

HTML = Path(__file__).with_name("page.html").read_bytes()


def _policy(html: bytes) -> str:
    """A content security policy that names the script and the style in `html` by their hashes."""

    def sources(tag: bytes) -> str:
        found = re.findall(rb"<%s>(.*?)</%s>" % (tag, tag), html, re.S)
        hashes = (base64.b64encode(hashlib.sha256(text).digest()).decode() for text in found)
        return " ".join(f"'sha256-{digest}'" for digest in hashes)

    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {sources(b'script')}",
            f"style-src {sources(b'style')}",
            "img-src 'self' data: blob:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
        ]
    )


HEADERS = {"content-security-policy": _policy(HTML), "cache-control": "no-cache"}
