"""A bundle's chat template, taken apart once: the texts before, between and after what a user says.

The template runs in a process of its own (`rendering.py`), with a placeholder in the place of the user's
text, so no text of a user ever passes through it.
"""

from __future__ import annotations

import functools
import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError, MissingError

SECONDS = 20.0  # on a busy machine; the process itself limits its CPU time to less than one
MARK = " \ue000aB<&>\ue000\n"  # a template that trims, escapes or changes a text changes this too
IMAGE = "<|image_pad|>"
FIX = "use the chat template of Qwen2.5-VL; a bundle's comes with `star-export export`"


@dataclass(frozen=True)
class Template:
    """The text before a user's text, after it, and before it where an image precedes it.

    `image_prefix` holds `<|image_pad|>` once.
    """

    prefix: str
    suffix: str
    image_prefix: str

    def render(self, text: str) -> str:
        """The conversation of one user's message, up to where the answer begins."""
        return self.prefix + text + self.suffix

    def render_image(self, text: str) -> str:
        """The same with an image before the text."""
        return self.image_prefix + text + self.suffix


def template_from_source(source: str, *, where: str) -> Template:
    """Render a chat template, and take it apart. `where` names its file in errors.

    Raises InputError if it cannot be read or rendered, takes too long or too much memory, or has not the form
    that STAR's prompts need: the user's text once and as it is, one place for an image.
    """
    answer = _rendered(source)
    if "error" in answer:
        done = "rendered" if answer["readable"] else "read"
        raise InputError(f"The chat template cannot be {done}", where=f"{where}: {answer['error']}", fix=FIX)
    text, with_image = answer["texts"]
    prefix, suffix = _halves(text, where)
    places = with_image.count(IMAGE)
    image_prefix, image_suffix = _halves(with_image, where) if places == 1 else ("", "")
    if image_suffix != suffix or IMAGE not in image_prefix:
        raise InputError(
            "The chat template has no place for the image",
            where=f"{where}: expected one {IMAGE} before the text, got {places} in {_shown(with_image)}",
            fix=FIX,
        )
    return Template(prefix, suffix, image_prefix)


def _halves(rendered: str, where: str) -> tuple[str, str]:
    parts = rendered.split(MARK)
    if len(parts) != 2 or "<|im_start|>" not in parts[1]:
        raise InputError(
            "The chat template does not have the expected form",
            where=f"{where}: expected the prompt once and as it is, then <|im_start|>assistant, "
            f"got {_shown(rendered)}",
            fix=FIX,
        )
    return parts[0], parts[1]


def _shown(rendered: str) -> str:
    text = rendered.replace(MARK, "PROMPT")
    return repr(text if len(text) <= 160 else f"{text[:80]} ... {text[-80:]}")


@functools.lru_cache(maxsize=4)
def _rendered(source: str) -> dict[str, Any]:
    """What the template makes of a question, and of one about an image: the answer of `rendering.py`."""
    content = [{"type": "image", "image": ""}, {"type": "text", "text": MARK}]
    conversations = [[{"role": "user", "content": said}] for said in (MARK, content)]
    request = json.dumps({"template": source, "conversations": conversations}).encode()
    program = str(Path(__file__).with_name("rendering.py"))
    try:  # isolated, and with our search path: no module of the current folder is imported
        done = subprocess.run(
            [sys.executable, "-I", "-S", program, json.dumps(sys.path)],
            input=request,
            capture_output=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return {"error": "it takes too long", "readable": True}
    except OSError as error:
        raise _no_process(error.strerror or str(error)) from None
    if done.returncode > 0:  # before it came to the template
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"]
        raise _no_process(f"exit code {done.returncode}: {said[-1][:200]}")
    if done.returncode < 0:
        slow = -done.returncode == getattr(signal, "SIGPROF", 0)
        why = "it takes too long" if slow else f"it ends in signal {-done.returncode}"
        return {"error": why, "readable": True}
    return json.loads(done.stdout)


def _no_process(said: str) -> MissingError:
    return MissingError(
        "The chat template cannot be rendered",
        where=f"{sys.executable}: {said}",
        fix="install jinja2, and free memory for a second process",
    )
