"""One line per request on stderr, as words or as JSON; what was asked stands there only on request."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any


class Log:
    """Writes lines with `write`, on stderr by default; what cannot be written is lost, and harms nobody."""

    def __init__(self, *, as_json: bool, prompts: bool, write: Callable[[str], Any] | None = None):
        self.as_json, self.prompts = as_json, prompts
        self._write = write or (lambda text: sys.stderr.write(text))

    def request(self, facts: dict[str, Any]) -> None:
        """The line of a request that was answered, or whose client has gone."""
        known = {"time": _now(), **facts}
        if not self.prompts:
            known.pop("prompt", None)
        if self.as_json:
            self.line(json.dumps(known))
            return
        head = [_word(known.pop(name, "-")) for name in ("time", "status", "method", "path")]
        self.line(" ".join([*head, *(f"{name}={_word(value)}" for name, value in known.items())]))

    def say(self, text: str) -> None:
        """A line about the server itself."""
        self.line(json.dumps({"time": _now(), "message": text}) if self.as_json else text)

    def line(self, text: str) -> None:
        try:
            self._write(text + "\n")
        except (OSError, ValueError):
            return


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _word(value: Any) -> str:
    """A value in a line of words: in quotes where it holds anything but plain characters."""
    text = value if isinstance(value, str) else json.dumps(value)
    plain = text.isascii() and text.isprintable() and not set(text) & set(' "=\\')
    return text if plain and text else json.dumps(text)
