"""Edits of a record that has a hash of its own, which is made true again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engines.bundle.seal import CONTENT, sealed_json


def edit_sealed(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Let `change` edit the parsed record in `path`, and seal it again."""
    contents = json.loads(path.read_text())
    contents.pop(CONTENT, None)
    change(contents)
    path.write_text(sealed_json(contents))
