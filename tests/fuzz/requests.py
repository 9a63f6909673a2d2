"""Fuzzing the server: whole requests as they stand on the wire, sent to one that runs in this process."""

from __future__ import annotations

import atexit
import base64
import contextlib
import json
import re
import socket
import warnings
from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np

from engines.serve.log import Log
from tests.helpers.served import form, picture, serving

from .mutate import mutated_bytes, mutated_json

PATIENCE_S = 0.2  # for an answer to a request that may be incomplete
ALIVE = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


def whole_request(path: str, body: bytes, kind: str) -> bytes:
    """A request as it is sent."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: {kind}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def seeds() -> tuple[bytes, ...]:
    """A good request of each kind."""
    encoded = base64.b64encode(picture(8, 8)).decode()
    url = {"url": f"data:image/png;base64,{encoded}"}
    parts = [{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": url}]
    drawn = {"prompt": "a cat", "n": 2, "size": "64x64", "seed": 5, "top_k": 9, "top_p": 0.5, "guidance": 2}
    bodies = (
        ("/v1/images/generations", drawn | {"stream": True, "partial_images": 1, "output_format": "jpeg"}),
        ("/v1/images/generations", drawn | {"response_format": "url", "reason": True, "window": 2}),
        ("/v1/images/edits", {"prompt": "blue", "image": encoded, "greedy": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": parts}], "max_tokens": 9}),
    )
    made = [whole_request(path, json.dumps(body).encode(), "application/json") for path, body in bodies]
    fields = [("prompt", "blue"), ("n", "1"), ("seed", "3"), ("stream", "false"), ("image[]", picture(8, 8))]
    return (*made, whole_request("/v1/images/edits", *form(fields)), ALIVE)


def mutated_request(data: bytes, rng: np.random.Generator) -> bytes:
    """The request with another body of the stated length, or with any of its bytes changed."""
    head, _, body = data.partition(b"\r\n\r\n")
    if not body or rng.random() < 0.3:
        return mutated_bytes(data, rng)
    changed = mutated_json(body, rng) if body.startswith(b"{") else mutated_bytes(body, rng)
    lines = [line for line in head.split(b"\r\n") if not line.startswith(b"Content-Length")]
    return b"\r\n".join([*lines, b"Content-Length: %d" % len(changed), b"", changed])


def send_to_a_server() -> Callable[[bytes], None]:
    """A function that sends bytes to one server, as `sending` does; it is started on the first call, and ends
    with this process."""
    stack, started = contextlib.ExitStack(), list[Callable[[bytes], None]]()
    atexit.register(stack.close)

    def send(data: bytes) -> None:
        if not started:
            started.append(stack.enter_context(sending()))
        started[0](data)

    return send


@contextlib.contextmanager
def sending() -> Iterator[Callable[[bytes], None]]:
    """A server, as a function that sends bytes to it, and raises AssertionError unless it answers as it
    should, and goes on."""
    bugs = list[str]()

    def note(self: Log, text: str) -> None:
        if "Traceback" in text:
            bugs.append(text)

    def send(data: bytes) -> None:
        warnings.simplefilter("ignore", ResourceWarning)  # a form that ends early leaves a file in memory
        answer = _answer(server.port, data)
        assert not bugs, bugs.pop()
        if answer:
            _check(answer)
        assert _answer(server.port, ALIVE).startswith(b"HTTP/1.1 200"), "the server is gone"

    with mock.patch.object(Log, "line", note), serving() as server:
        yield send


def _answer(port: int, data: bytes) -> bytes:
    """What a server sends back, as far as it comes in time."""
    answer = b""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
        connection.settimeout(5 if data == ALIVE else PATIENCE_S)
        with contextlib.suppress(TimeoutError, ConnectionError):
            while chunk := connection.recv(1 << 16):
                answer += chunk
    return answer


def _check(answer: bytes) -> None:
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split()[1])
    assert status < 500 or status == 503, f"status {status}: {body[:200]!r}"
    if status >= 400 and (length := re.search(rb"content-length: (\d+)", head)) and b"json" in head:
        error = json.loads(body[: int(length[1])])["error"]
        assert error["what"] and error["where"] and error["fix"] and error["message"]
