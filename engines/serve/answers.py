"""What is sent: OpenAI's objects and events, with our facts beside theirs."""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .jobs import Answered, Finished, Preview
from .kept_files import KeptFiles
from .painting import SETTINGS
from .pictures import file_from_image, sent_size
from .requests import ChatRequest, ImageRequest


@dataclass(frozen=True)
class About:
    """The facts of a server that its answers carry: `model` is the model's own name, `bundle_sha256` the hash
    of its manifest and so of every file, `side` the size that it draws, in pixels."""

    model: str
    bundle_sha256: str
    precision: str
    backend: str
    side: int


def ids_sha256(ids: np.ndarray) -> str:
    """The SHA-256 of token ids as int64, little-endian."""
    return hashlib.sha256(np.ascontiguousarray(ids, "<i8").tobytes()).hexdigest()


def event(data: dict[str, Any], *, name: str | None = None) -> bytes:
    """A server-sent event."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data)}\n\n".encode()


class ImageAnswer:
    """Makes the answer to one image request, or its events."""

    def __init__(self, about: About, request: ImageRequest, *, edit: bool, files: KeptFiles, base_url: str):
        self.about, self.request, self.files, self.base_url = about, request, files, base_url
        self.kind = "image_edit" if edit else "image_generation"
        self.drawn = request.painting.resolution if request.painting else about.side
        self.side = sent_size(request.size, self.drawn)
        self.created, self.started = int(time.time()), time.monotonic()

    def file(self, image: np.ndarray) -> bytes:
        """The file of an image, in the size and format that were asked for."""
        request = self.request
        return file_from_image(
            image, side=self.side, file_format=request.file_format, compression=request.compression
        )

    def item(self, done: Finished) -> dict[str, Any]:
        """One entry of `data`. Raises Refused where a file cannot be kept."""
        data = self.file(done.image)
        if self.request.as_url:
            name = self.files.keep(data, self.request.file_format)
            item = {"url": f"{self.base_url}v1/files/{name}"}
        else:
            item = {"b64_json": base64.b64encode(data).decode()}
        if done.answer is not None:
            item["revised_prompt"] = done.answer
        return {
            **item,
            "seed": self.request.seed_of(done.index),
            "image_ids_sha256": ids_sha256(done.image_ids),
        }

    def response(self, finished: Sequence[Finished], items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """OpenAI's `ImagesResponse`; `star` holds our facts."""
        return {
            "created": self.created,
            "data": list(items),
            **self._form(),
            "usage": self._usage(finished),
            "model": self.about.model,
            "star": self.facts(finished),
        }

    def preview(self, preview: Preview) -> bytes:
        """OpenAI's event of a partial image."""
        data = {
            "type": f"{self.kind}.partial_image",
            "b64_json": base64.b64encode(self.file(preview.image)).decode(),
            "partial_image_index": preview.number,
            "image_index": preview.index,
            **self._event_form(),
        }
        return event(data, name=data["type"])

    def completed(self, done: Finished, item: dict[str, Any]) -> bytes:
        """OpenAI's event of an image that is done."""
        data = {
            "type": f"{self.kind}.completed",
            **item,
            "image_index": done.index,
            **self._event_form(),
            "usage": self._usage([done]),
            "model": self.about.model,
            "star": self.facts([done]),
        }
        return event(data, name=data["type"])

    def facts(self, finished: Sequence[Finished]) -> dict[str, Any]:
        """What we say of a draw beyond OpenAI's fields."""
        tokens = sum(len(done.image_ids) for done in finished)
        forwards = sum(done.forwards for done in finished)
        own, side = f"{self.drawn}x{self.drawn}", f"{self.side}x{self.side}"
        notes = list(self.request.notes)
        asked = self.request.size
        if asked is not None and asked != (self.drawn, self.drawn):
            asked_text = f"{asked[0]}x{asked[1]}"
            notes.append(f"size: asked for {asked_text}, drawn as {own}, sent as {side}")
        if cut := finished[0].cut_tokens:
            notes.append(f"prompt: the diffusion decoder did not read its last {cut} tokens")
        return {
            "seed": self.request.seed,
            "image_ids_sha256": [ids_sha256(done.image_ids) for done in finished],
            "bundle_sha256": self.about.bundle_sha256,
            "precision": self.about.precision,
            "backend": self.about.backend,
            "seconds": round(time.monotonic() - self.started, 3),
            "tokens_per_forward": round(tokens / forwards, 3),
            "drawn_together": max(done.together for done in finished),
            "drawn_size": own,
            "settings": self._settings(),
            "notes": notes,
        }

    def _settings(self) -> dict[str, Any]:
        request, painting = self.request, self.request.painting
        settings = {**request.draw, "greedy": request.greedy, "decoder": "diffusion" if painting else "vq"}
        if painting:
            values = {name: getattr(painting, name) for name in SETTINGS}
            settings |= {name: value for name, value in values.items() if value is not None}
        return settings

    def _form(self) -> dict[str, Any]:
        return {
            "size": f"{self.side}x{self.side}",
            "output_format": self.request.file_format,
            "background": "opaque",
        }

    def _event_form(self) -> dict[str, Any]:
        return {"created_at": self.created, "quality": "auto", **self._form()}

    def _usage(self, finished: Sequence[Finished]) -> dict[str, Any]:
        read, picture = finished[0].prompt_tokens, finished[0].picture_tokens
        drawn = sum(len(done.image_ids) for done in finished)
        return {
            "input_tokens": read,
            "output_tokens": drawn,
            "total_tokens": read + drawn,
            "input_tokens_details": {"text_tokens": read - picture, "image_tokens": picture},
            "output_tokens_details": {"text_tokens": 0, "image_tokens": drawn},
        }


class ChatAnswer:
    """Makes the answer to one question, or its chunks."""

    def __init__(self, about: About, request: ChatRequest):
        self.about, self.request = about, request
        self.id, self.created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        self.started = time.monotonic()

    def response(self, answer: Answered) -> dict[str, Any]:
        """OpenAI's `ChatCompletion`."""
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _reason(answer)}
        return {
            **self._head("chat.completion"),
            "choices": [choice],
            "usage": self._usage(answer),
            "star": self.facts(answer),
        }

    def chunk(self, text: str) -> bytes:
        """OpenAI's `ChatCompletionChunk` with more text."""
        return self._chunk({"role": "assistant", "content": text}, None)

    def last_chunks(self, answer: Answered) -> list[bytes]:
        """The chunk that ends an answer, the one with its usage if it was asked for, and the end."""
        last = self._chunk({}, _reason(answer), star=self.facts(answer))
        usage = event({**self._head("chat.completion.chunk"), "choices": [], "usage": self._usage(answer)})
        return [last, *([usage] if self.request.with_usage else []), b"data: [DONE]\n\n"]

    def facts(self, answer: Answered) -> dict[str, Any]:
        """What we say of an answer beyond OpenAI's fields: it is the arg-max, so it has no seed."""
        return {
            "seed": None,
            "ids_sha256": ids_sha256(answer.ids),
            "bundle_sha256": self.about.bundle_sha256,
            "precision": self.about.precision,
            "backend": self.about.backend,
            "seconds": round(time.monotonic() - self.started, 3),
            "tokens_per_forward": 1.0,
            "notes": list(self.request.notes),
        }

    def _chunk(self, delta: dict[str, Any], finish: str | None, **more: Any) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return event({**self._head("chat.completion.chunk"), "choices": [choice], **more})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.about.model}

    def _usage(self, answer: Answered) -> dict[str, Any]:
        said = len(answer.ids)
        return {
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": said,
            "total_tokens": answer.prompt_tokens + said,
        }


def _reason(answer: Answered) -> str:
    return "stop" if answer.stopped else "length"
