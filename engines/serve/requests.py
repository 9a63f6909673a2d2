"""What a request asks for, read from its fields."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from typing import Any

from ..bundle.manifest import ModelSpec
from ..runtime.painting import Painting
from ..runtime.sampler import GUIDANCE_LIMIT
from ..runtime.settings import sampling_settings
from . import settings as limits
from .fields import Fields, invalid
from .painting import painting_of
from .refusals import Refused
from .uploads import bytes_from_field

FORMATS = ("png", "jpeg", "webp")
SEEDS = 1 << 32  # a seed that nobody gave is below; it stands in addresses and in other languages' numbers
# What clients of OpenAI's service send for an image and for a chat, and what this model has no use for.
IMAGE_WITHOUT_EFFECT = ("style", "moderation", "input_fidelity", "safety_identifier", "quality")
CHAT_WITHOUT_EFFECT = (
    *("temperature", "top_p", "presence_penalty", "frequency_penalty", "stop", "seed", "logit_bias"),
    *("logprobs", "top_logprobs", "tools", "tool_choice", "parallel_tool_calls", "response_format"),
    *("reasoning_effort", "metadata", "store", "service_tier", "safety_identifier", "modalities"),
    *("functions", "function_call", "verbosity", "prompt_cache_key", "keep_alive", "top_k"),
)


@dataclass(frozen=True, kw_only=True)
class ImageRequest:
    """Images to draw, or to edit if there is a `picture`, the bytes of a file.

    `draw` are the settings of the draw but for its seed. The image tokens are drawn with noise of the `seed`,
    or `greedy`, without; a `painting` has its own noise of the seed, which is None where nothing has any. The
    images are sent in `size` (width and height in pixels), or as they are drawn.
    """

    prompt: str
    picture: bytes | None
    count: int
    draw: dict[str, Any]
    seed: int | None
    greedy: bool
    painting: Painting | None
    size: tuple[int, int] | None
    file_format: str
    compression: int | None
    as_url: bool
    stream: bool
    partials: int
    reason: bool
    window: int | None
    user: str
    notes: tuple[str, ...]

    @property
    def group(self) -> tuple | None:
        """What images must have in common to be drawn together; None for a painting, which is alone."""
        return None if self.painting else (*sorted(self.draw.items()), self.greedy, self.window)

    def seed_of(self, index: int) -> int | None:
        """The seed of one of the images: the request's, and the ones that follow it."""
        return None if self.seed is None else self.seed + index


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """A question, about a `picture`, the bytes of a file, if there is one."""

    question: str
    picture: bytes | None
    tokens: int
    stream: bool
    with_usage: bool
    user: str
    notes: tuple[str, ...]


def image_request(fields: Fields, model: ModelSpec, *, edit: bool) -> ImageRequest:
    """The request of /v1/images/generations, or of /v1/images/edits. Raises Refused."""
    prompt = fields.text("prompt", limit=limits.PROMPT_LIMIT_CHARACTERS)
    if prompt is None:
        raise missing("prompt", "a text that says what to draw")
    fields.text("model", limit=1000)
    picture = _edited_picture(fields) if edit else None
    count = fields.whole("n", 1, limits.IMAGES_LIMIT) or 1
    seed, greedy = fields.whole("seed", 0, 2**64 - limits.IMAGES_LIMIT), fields.flag("greedy")
    defaults = model.sampling.edit if edit else model.sampling.generate
    guidance = fields.number("guidance")
    if guidance is not None and abs(guidance) > GUIDANCE_LIMIT:  # by the field's own name
        raise invalid("guidance", f"a number from {-GUIDANCE_LIMIT:g} to {GUIDANCE_LIMIT:g}", guidance)
    draw = sampling_settings(
        defaults,
        model,
        cfg=guidance,
        top_k=fields.whole("top_k", 1, 10**9),
        top_p=fields.number("top_p"),
        seed=0,
        greedy=greedy,
        num_images=count,
    )
    draw.pop("seed")
    file_format = fields.choice("output_format", (*FORMATS, "jpg")) or "png"
    background = fields.choice("background", ("transparent", "opaque"))
    stream, partials = fields.flag("stream"), fields.whole("partial_images", 0, limits.PARTIALS_LIMIT)
    compression, size = fields.whole("output_compression", 0, 100), _size(fields)
    as_url = fields.choice("response_format", ("url", "b64_json")) == "url"
    painting = painting_of(fields, model, edit=edit, size=size)
    window, user = fields.whole("window", 1, model.image_tokens), fields.text("user", limit=500) or ""
    reason = not edit and fields.flag("reason")
    notes = [f"{name} has no effect" for name in fields.check_all_known(IMAGE_WITHOUT_EFFECT)]
    if background == "transparent":
        notes.append("background: the model draws opaque images only")
    if greedy and not painting:
        seed = None
    elif seed is None:
        seed = secrets.randbelow(SEEDS)
    return ImageRequest(
        prompt=prompt,
        picture=picture,
        count=count,
        draw=draw,
        seed=seed,
        greedy=greedy,
        painting=painting,
        file_format="jpeg" if file_format == "jpg" else file_format,
        stream=stream,
        partials=limits.PARTIALS if partials is None else partials,
        notes=tuple(notes),
        compression=compression,
        size=size,
        as_url=as_url,
        window=window,
        user=user,
        reason=reason,
    )


def chat_request(fields: Fields) -> ChatRequest:
    """The request of /v1/chat/completions: its last question and its last picture. Raises Refused.

    The model answers one question about one picture, so what was said before is not fed to it.
    """
    messages = fields.take("messages")
    if not isinstance(messages, list) or not messages:
        raise missing("messages", "a list of messages")
    question, picture = "", None
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise invalid(f"messages[{i}]", "an object with a role", message)
        if message["role"] == "user":
            text, shown = _content(message.get("content"), f"messages[{i}].content")
            question, picture = text, shown or picture
    if not question.strip():
        raise missing("messages", "a user's message with a question")
    fields.text("model", limit=1000)
    fields.whole("n", 1, 1)
    tokens = fields.whole("max_completion_tokens", 1, 10**9), fields.whole("max_tokens", 1, 10**9)
    options = fields.take("stream_options") or {}
    stream, user = fields.flag("stream"), fields.text("user", limit=500) or ""
    ignored = fields.check_all_known(CHAT_WITHOUT_EFFECT)
    notes = [f"{name} has no effect" for name in ignored]
    if len(messages) > 1:
        notes.append("only the last question and the last picture are answered")
    return ChatRequest(
        question=question,
        picture=None if picture is None else bytes_from_field(picture, "messages"),
        tokens=tokens[0] or tokens[1] or limits.ANSWER_TOKENS,
        stream=stream,
        with_usage=isinstance(options, dict) and options.get("include_usage") is True,
        user=user,
        notes=tuple(notes),
    )


def missing(name: str, expected: str) -> Refused:
    """The refusal of a request without a field that it needs."""
    return Refused(
        400,
        "A field is missing",
        where=f"{name}: expected {expected}, got nothing",
        fix="add it to the request",
        param=name,
        code="missing_required_parameter",
    )


def _edited_picture(fields: Fields) -> bytes:
    """The one picture of an edit: `image`, `image[]`, or `images` with addresses that hold the data."""
    found: list[Any] = []
    for name in ("image", "image[]", "images"):
        value = fields.take(name)
        found += value if isinstance(value, list) else [] if value is None else [value]
    if fields.take("mask") is not None:
        raise invalid("mask", "none: the model edits a whole picture", "a mask")
    if len(found) != 1:
        raise (
            invalid("image", "one picture", f"a list of {len(found)}")
            if found
            else missing("image", "a picture: a file, or base64")
        )
    (picture,) = found
    if isinstance(picture, dict):
        picture = picture.get("image_url")
        picture = picture.get("url") if isinstance(picture, dict) else picture
    return bytes_from_field(picture, "image")


def _content(content: Any, where: str) -> tuple[str, Any]:
    """The text of a message, and its last picture as it was given."""
    if content is None or isinstance(content, str):
        return _short(content or "", where), None
    if not isinstance(content, list):
        raise invalid(where, "a text or a list of parts", content)
    texts, picture = [], None
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image_url":
            shown = part.get("image_url")
            picture = shown.get("url") if isinstance(shown, dict) else shown
            if not isinstance(picture, str):
                raise invalid(f"{where}[{i}]", "an image_url with a data URL", part)
        else:
            raise invalid(f"{where}[{i}]", "a part of type text or image_url", part)
    return _short("\n".join(texts), where), picture


def _short(text: str, where: str) -> str:
    """`text`, if it is no longer than a prompt may be."""
    if len(text) > limits.PROMPT_LIMIT_CHARACTERS:
        raise invalid(where, f"at most {limits.PROMPT_LIMIT_CHARACTERS} characters", f"a text of {len(text)}")
    return text


def _size(fields: Fields) -> tuple[int, int] | None:
    """Width and height that were asked for."""
    value = fields.take("size")
    if value is None:
        return None
    low, high = limits.SIDE_LEAST_PIXELS, limits.SIDE_LIMIT_PIXELS
    found = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", value) if isinstance(value, str) else None
    sides = tuple(map(int, found.groups())) if found else (0, 0)
    if not all(low <= side <= high for side in sides):
        raise invalid("size", f"WIDTHxHEIGHT with sides of {low} to {high}, or auto", value)
    return sides[0], sides[1]
