"""A server in this process, on a stand-in for a model that draws at once, or as slowly as a test wants."""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from engines.bundle.manifest import DiffusionSpec, ModelSpec
from engines.errors import InputError
from engines.inputs.image_io import bytes_from_image
from engines.progress import silent
from engines.runtime.together import Drawn, Prepared, Said
from engines.serve.answers import About
from engines.serve.server import listen, serve_model
from engines.serve.settings import ServeSettings
from tests.helpers.tiny_bundle import MODEL

SIDE, TOKENS = MODEL.image_size, MODEL.image_tokens
WITH_DIFFUSION = replace(
    MODEL,
    diffusion=DiffusionSpec(
        (4, 6, 6), 16, 16, 0.3611, 0.1159, 6.0, bos=2, hidden_size=64, blocks=5, token_weights=1000
    ),
)
ABOUT = About(model="fake", bundle_sha256="b" * 64, precision="fp32", backend="none", side=SIDE)


@dataclass
class FakeModel:
    """Draws ids that follow from prompt and seed, a token of each image per step of `step_s` seconds."""

    step_s: float = 0.0
    batches: list[int] = field(default_factory=list)  # images of each batch
    painted: int = 0  # steps
    steps: int = 0
    hold: threading.Event | None = None  # nothing is drawn before it is set
    raises: Exception | None = None  # by a batch with a prompt of "fail"

    def generation(
        self, prompt, *, reason=False, max_new_tokens=256, on_token=None, painting: Any = None
    ) -> Prepared:
        if prompt == "refuse":
            raise InputError("The prompt is refused", where="prompt: expected another one", fix="change it")
        code = np.frombuffer(prompt.encode("utf-8", "replace")[:8].ljust(8), np.uint8).astype(np.float32)
        answer = f"answer to {prompt}" if reason else None
        cut = 7 if prompt == "long" else 0
        return Prepared(np.tile(code, (2, 3, 1)), np.zeros((3, 2, 3), np.int64), answer, painting, cut)

    def editing(self, image, instruction, *, painting=None) -> Prepared:
        return self.generation(f"{int(image.mean())} {instruction}", painting=painting)

    def draw(self, prepared, seeds, *, guidance, top_k, top_p, window=None, watch=None) -> Drawn:
        self.batches.append(len(prepared))
        if self.hold:
            self.hold.wait(30)
        if self.raises and any(bytes(one.embeds[0, 0].astype(np.uint8))[:4] == b"fail" for one in prepared):
            raise self.raises
        ids = np.stack(
            [
                np.random.default_rng([int(one.embeds[0, 0].sum()), *([seed] if seeds else [])]).integers(
                    0, MODEL.codebook_size, TOKENS
                )
                for one, seed in zip(prepared, seeds or [0] * len(prepared))
            ]
        )
        for known in range(2, TOKENS + 1):
            time.sleep(self.step_s)
            self.steps += 1
            if watch:
                watch(np.full(len(ids), known), lambda: ids)
        return Drawn(ids, TOKENS)

    def images(self, image_ids) -> np.ndarray:
        side = round(TOKENS**0.5)
        small = (image_ids % 256).astype(np.uint8).reshape(-1, side, side, 1)
        return small.repeat(SIDE // side, 1).repeat(SIDE // side, 2).repeat(3, 3)

    def paint(self, prepared, image_ids, *, seed, progress=silent, preview=None) -> np.ndarray:
        """Paints a square whose colour follows from ids and seed, and is a step's number before the last."""
        painting: Any = prepared.painter
        for done in range(1, painting.steps + 1):
            time.sleep(self.step_s)
            self.painted += 1
            colour = done if done < painting.steps else (int(image_ids.sum()) + seed) % 256
            image = np.full((1, painting.resolution, painting.resolution, 3), colour, np.uint8)
            if preview and done < painting.steps:
                preview(done, lambda image=image: image)
            progress("paint, in steps", done, painting.steps)
        return image

    def answer(self, image, question, *, max_new_tokens, on_token=None) -> Said:
        words = (f"{image.shape[1]}x{image.shape[0]}" if image is not None else "no picture", "is", question)
        text = " ".join(words)[:max_new_tokens]
        for letter in text:
            time.sleep(self.step_s)
            if on_token:
                on_token(ord(letter))
        return Said(text, np.array([*map(ord, text)], np.int64), prompt_tokens=5, stopped=True)

    def text(self, ids) -> str:
        return "".join(map(chr, ids))


@contextlib.contextmanager
def serving(
    model: Any = None, *, check=lambda: None, spec: ModelSpec = MODEL, **settings
) -> Iterator[SimpleNamespace]:
    """A running server: its `url`, its `model`, `stop` to ask it to end, and `done`, which is set at its
    end."""
    given = ServeSettings(**{"port": 0, **settings})
    model, ready = model or FakeModel(), queue.Queue()
    listening, done = listen(given), threading.Event()

    def run() -> None:
        with listening:
            serve_model(
                model, spec, ABOUT, given, listening, check=check, ready=lambda *told: ready.put(told)
            )
        done.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    url, stop = ready.get(timeout=10)
    try:
        yield SimpleNamespace(url=url, stop=stop, done=done, model=model, port=listening.getsockname()[1])
    finally:
        stop()
        if getattr(model, "hold", None):
            model.hold.set()
        assert done.wait(30)


@dataclass(frozen=True)
class Reply:
    """What a server answered."""

    status: int
    headers: dict[str, str]
    data: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.data)

    @property
    def error(self) -> dict:
        """The error, which must have OpenAI's form and our three parts."""
        error = self.json["error"]
        assert {"message", "type", "param", "code", "what", "where", "fix"} == set(error)
        assert all(error[part] for part in ("message", "type", "what", "where", "fix"))
        return error


def ask(
    server: SimpleNamespace,
    path: str,
    body: Any = None,
    *,
    method: str | None = None,
    kind: str = "application/json",
    timeout_s: float = 30,
    **headers: str,
) -> Reply:
    """Send a request, with a body of bytes, or of what becomes JSON."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    if data is not None:
        given.setdefault("Content-Type", kind)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=timeout_s)
    try:
        connection.request(method or ("GET" if data is None else "POST"), path, data, given)
        answer = connection.getresponse()
        return Reply(
            answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        )
    finally:
        connection.close()


def form(fields: list[tuple[str, str | bytes]]) -> tuple[bytes, str]:
    """A form of `fields`, files where a value is bytes: its body and its content type."""
    parts = []
    for name, value in fields:
        file = '; filename="picture.png"\r\nContent-Type: image/png' if isinstance(value, bytes) else ""
        data = value if isinstance(value, bytes) else value.encode()
        head = f'--edge\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'
        parts.append(head.encode() + data + b"\r\n")
    return b"".join(parts) + b"--edge--\r\n", "multipart/form-data; boundary=edge"


def picture(width: int = 40, height: int = 30, *, value: int = 9) -> bytes:
    """A PNG file of one colour."""
    return bytes_from_image(np.full((height, width, 3), value, np.uint8))


def events(data: bytes) -> list[Any]:
    """The data of server-sent events, JSON but for the last one of a chat."""
    found = [line[6:] for line in data.decode().splitlines() if line.startswith("data: ")]
    return [text if text == "[DONE]" else json.loads(text) for text in found]


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    """Wait for a condition, no longer than so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
