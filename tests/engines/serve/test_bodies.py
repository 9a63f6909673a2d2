"""Bodies are bounded before they are read; what is too large, too slow or malformed gets a clear answer."""

from __future__ import annotations

import base64
import socket
import threading
import time

import pytest

from engines.serve import settings
from tests.helpers.served import FakeModel, ask, form, picture, serving, until

GENERATE, EDIT = "/v1/images/generations", "/v1/images/edits"


@pytest.fixture(scope="module")
def server():
    with serving() as running:
        yield running


def held(server) -> float:
    lines = ask(server, "/metrics").data.decode().splitlines()
    return float(next(line for line in lines if line.startswith("star_bodies_bytes")).split()[1])


def test_a_body_of_100_mb_is_answered_and_never_held(server):
    body = b'{"prompt": "' + b"a" * 100_000_000 + b'"}'
    reply = ask(server, GENERATE, body)
    assert reply.status == 413 and "got 100000014" in reply.error["where"] and held(server) == 0


def test_a_body_that_grows_beyond_the_limit_is_cut_off(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        head = f"POST {GENERATE} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n")
        chunk = b"100000\r\n" + b"a" * 0x100000 + b"\r\n"
        for _ in range(30):
            connection.sendall(chunk)
        connection.sendall(b"0\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 413")
    assert held(server) == 0


def test_bodies_together_have_a_limit(monkeypatch):
    monkeypatch.setattr(settings, "BODIES_LIMIT_BYTES", 20)
    with serving() as small:
        reply = ask(small, GENERATE, {"prompt": "a cat on a sofa"})
        assert reply.status == 429 and int(reply.headers["retry-after"]) > 0
        assert ask(small, GENERATE, {"prompt": "a"}).status == 200


def test_a_length_beside_chunks_and_a_body_that_arrived_take_the_room_that_they_need(monkeypatch):
    chunked = f"POST {GENERATE} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    chunked += "Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n"
    with serving(FakeModel(hold=threading.Event())) as slow:
        with socket.create_connection(("127.0.0.1", slow.port), timeout=30) as connection:
            connection.sendall(chunked.encode())
            until(lambda: held(slow) == settings.BODY_LIMIT_BYTES)
            connection.sendall(b'f\r\n{"prompt": "a"}\r\n0\r\n\r\n')
            until(lambda: held(slow) == 15)
            slow.model.hold.set()
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        assert held(slow) == 0


def test_a_slow_body_is_given_up(server, monkeypatch):
    monkeypatch.setattr(settings, "BODY_SECONDS", 0.3)
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        head = f"POST {GENERATE} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(head.encode() + b"Content-Length: 20\r\n\r\n{")
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")
    assert held(server) == 0 and ask(server, "/health").status == 200


def test_a_slow_head_is_given_up(monkeypatch):
    monkeypatch.setattr(settings, "HEAD_SECONDS", 0.3)
    with serving() as server, socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: loc")
        started = time.monotonic()
        assert connection.recv(1000) == b"" and time.monotonic() - started < 5


@pytest.mark.parametrize(
    "body, kind, status",
    [
        (b"", "application/json", 400),
        (b"{", "application/json", 400),
        (b"[1]", "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b'{"prompt": NaN}', "application/json", 400),
        (b'{"prompt": "a", "prompt": "b"}', "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b'{"seed": ' + b"9" * 6000 + b"}", "application/json", 400),
        (b"prompt=a", "application/x-www-form-urlencoded", 415),
        (b'{"prompt": "a"}', "text/plain", 415),
        (b'{"prompt": "a"}', "", 415),
        (b"--x\r\n", "multipart/form-data", 415),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_body_that_is_no_request_is_refused(server, body, kind, status):
    reply = ask(server, GENERATE, body, kind=kind)
    assert reply.status == status and reply.error["where"].startswith(("body", "content-type"))


@pytest.mark.parametrize(
    "body, kind",
    [
        (b"", "multipart/form-data; boundary=x"),
        (b"no form", "multipart/form-data; boundary=x"),
        (b"--x\r\n\r\nabc\r\n--x--", "multipart/form-data; boundary=x"),
        (b"--x--", "multipart/form-data"),
        (b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--\r\n", "multipart/form-data; boundary=x"),
        form([(f"field{i}", "a") for i in range(100)]),
        form([(f"image{i}", picture()) for i in range(20)]),
        form([("prompt", "a" * (2 << 20))]),
        form([("prompt", "a"), ("prompt", "b"), ("image", picture())]),
        form([("prompt", "a"), ("n", "9" * 100), ("image", picture())]),
        form([("prompt", "a"), ("image", "text and no file")]),
        (form([("image", picture())])[0], "multipart/form-data; boundary=edge; charset=punycode"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_malformed_form_is_refused(server, body, kind):
    reply = ask(server, EDIT, body, kind=kind)
    assert reply.status == 400 and reply.error and held(server) == 0
    assert ("UTF-8" in reply.error["where"]) == ("charset" in kind)


def test_a_form_that_names_utf_8_is_read(server):
    body, kind = form([("prompt", "é"), ("image", picture())])
    assert ask(server, EDIT, body, kind=f"{kind}; charset=UTF-8").status == 200


def test_a_name_that_is_no_unicode_is_answered(server):
    reply = ask(server, GENERATE, b'{"prompt": "a", "\\ud800": 1}')
    assert reply.status == 400 and reply.error["code"] == "unknown_parameter"


def test_a_picture_of_too_many_pixels_is_refused_by_its_header(server):
    import struct
    import zlib

    ihdr = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + ihdr
    data += struct.pack(">I", zlib.crc32(b"IHDR" + ihdr)) + b"\0\0\0\0IDAT"
    started = time.monotonic()
    reply = ask(server, EDIT, {"prompt": "a", "image": base64.b64encode(data).decode()})
    assert reply.status == 400 and "too large" in reply.error["what"] and time.monotonic() - started < 2


def test_a_client_that_goes_while_it_sends_leaves_nothing_behind(server):
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
            head = f"POST {GENERATE} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            connection.sendall(head.encode() + b"Content-Length: 2000000\r\n\r\n{")
    time.sleep(0.2)
    assert held(server) == 0 and ask(server, "/health").status == 200
