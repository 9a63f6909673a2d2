"""Many people on one model: drawn together, ended alone, refused in time, and stopped in order."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from engines.errors import MissingError, ParityError
from engines.serve import settings
from engines.serve.answers import ImageAnswer
from engines.serve.refusals import Refused
from tests.helpers.served import TOKENS, FakeModel, ask, events, serving, until

GENERATE, CHAT = "/v1/images/generations", "/v1/chat/completions"


def number(server, name: str) -> float:
    lines = ask(server, "/metrics").data.decode().splitlines()
    return float(next((line for line in lines if line.startswith(name + " ")), "none 0").split()[1])


@contextlib.contextmanager
def holding(**given):
    """A server whose model waits with its first batch until `hold` is set, and a pool to ask it."""
    model = FakeModel(hold=threading.Event(), **given.pop("model", {}))
    with serving(model, **given) as server, ThreadPoolExecutor(80) as pool:

        def send(body: dict, path: str = GENERATE):
            return pool.submit(ask, server, path, body)

        try:
            yield server, model, send
        finally:
            model.hold.set()


def test_equal_settings_are_drawn_together_up_to_the_limit_and_look_as_alone():
    with holding(images=4) as (server, model, send):
        first = send({"prompt": "first", "seed": 0})
        until(lambda: model.batches)
        replies = [send({"prompt": f"p{i}", "seed": i}) for i in range(8)]
        replies += [send({"prompt": "p1", "seed": 1, "top_k": 5})]
        until(lambda: number(server, "star_waiting") == 9)
        model.hold.set()
        assert first.result().status == 200
        assert sorted(reply.result().json["star"]["drawn_together"] for reply in replies) == [1] + [4] * 8
        assert sorted(model.batches[1:]) == [1, 4, 4]
        for i, reply in enumerate(replies[:8]):
            alone = ask(server, GENERATE, {"prompt": f"p{i}", "seed": i}).json
            assert alone["data"] == reply.result().json["data"] and alone["star"]["drawn_together"] == 1


def test_a_full_queue_says_when_to_come_again():
    with holding(queue=2) as (server, model, send):
        send({"prompt": "first"})
        until(lambda: model.batches)
        kept = [send({"prompt": "a"}) for _ in range(2)]
        until(lambda: number(server, "star_waiting") == 2)
        reply = ask(server, GENERATE, {"prompt": "b"})
        assert reply.status == 429 and reply.error["type"] == "rate_limit_error"
        assert int(reply.headers["retry-after"]) >= 1
        model.hold.set()
        assert [one.result().status for one in kept] == [200, 200]


@pytest.mark.parametrize(
    "raised, status",
    [
        (RuntimeError("secret inside"), 500),
        (MissingError("There is too little memory", where="memory: 1 B", fix="use less"), 503),
        (ParityError("Not finite", where="vq_decoder: nan", fix="validate"), 500),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_request_that_fails_harms_no_other(raised, status, capfd):
    with holding(model={"raises": raised}) as (server, model, send):
        first = send({"prompt": "first"})
        until(lambda: model.batches)
        others = [send({"prompt": f"p{i}", "seed": i}) for i in range(3)]
        bad, refused = send({"prompt": "fail"}), send({"prompt": "refuse"})
        until(lambda: number(server, "star_waiting") == 5)
        model.hold.set()
        assert first.result().status == 200 and [one.result().status for one in others] == [200] * 3
        assert bad.result().status == status and refused.result().status == 400
        assert "secret" not in bad.result().data.decode()
        assert ask(server, GENERATE, {"prompt": "after"}).status == 200
    assert ("secret inside" in capfd.readouterr().err) == isinstance(raised, RuntimeError)


def vanish(server, body: dict, path: str = GENERATE, *, after: int = 0) -> None:
    """Send a request and go away, after so many bytes of the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    if after:
        connection.getresponse().read(after)
    connection.close()


def test_a_draw_ends_within_a_step_when_its_client_has_gone():
    with serving(FakeModel(step_s=0.2)) as server:
        for body in ({"prompt": "a"}, {"prompt": "a", "stream": True}):
            before = server.model.steps
            vanish(server, body)
            until(lambda before=before: server.model.steps > before or number(server, "star_drawing") == 0)
            until(lambda: number(server, "star_drawing") == 0)
            assert server.model.steps - before < 8 < TOKENS
        asked = {"messages": [{"role": "user", "content": "a long question to repeat"}], "stream": True}
        vanish(server, asked, CHAT, after=20)
        until(lambda: number(server, "star_drawing") == 0, 3)
        assert ask(server, GENERATE, {"prompt": "after"}).status == 200


def test_200_clients_that_vanish_leave_nothing_behind():
    with serving(FakeModel(step_s=0.001), queue=300) as server:
        threads = threading.active_count()
        with ThreadPoolExecutor(20) as pool:
            list(pool.map(lambda i: vanish(server, {"prompt": f"p{i}", "stream": i % 2 == 0}), range(200)))
        left = ("star_waiting", "star_drawing", "star_bodies_bytes")  # the last bodies may still be read
        until(lambda: not any(number(server, name) for name in left), 20)
        assert threading.active_count() <= threads + 8
        assert ask(server, GENERATE, {"prompt": "after"}).status == 200


def test_a_client_that_takes_nothing_is_given_up(monkeypatch):
    monkeypatch.setattr(settings, "HEAD_SECONDS", 0.1)
    monkeypatch.setattr(ImageAnswer, "item", lambda *_: {"b64_json": "a" * 30_000_000})
    body = json.dumps({"prompt": "a"}).encode()
    head = f"POST {GENERATE} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with serving() as server, socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        until(lambda: number(server, "star_images_total") == 1)
        time.sleep(1.5)
        taken = 0
        with contextlib.suppress(ConnectionError):
            while data := connection.recv(1 << 20):
                taken += len(data)
        assert 0 < taken < 30_000_000


def test_a_vanished_client_does_not_end_what_others_wait_for():
    with holding(model={"step_s": 0.02}) as (server, model, send):
        send({"prompt": "first"})
        until(lambda: model.batches)
        stays = send({"prompt": "b", "seed": 1})
        until(lambda: number(server, "star_waiting") == 1)
        vanish(server, {"prompt": "c", "seed": 2})
        model.hold.set()
        assert stays.result().status == 200


def test_what_takes_too_long_is_given_up_waiting_or_drawn():
    with holding(model={"step_s": 0.05}, deadline_s=0.5) as (server, model, send):
        drawn = send({"prompt": "first"})
        until(lambda: model.batches)
        waits, streamed = send({"prompt": "a"}), send({"prompt": "b", "stream": True})
        model.hold.set()
        assert drawn.result().status == waits.result().status == 504
        assert drawn.result().error["code"] == "deadline_exceeded"
        assert events(streamed.result().data)[-1]["error"]["code"] == "deadline_exceeded"
        until(lambda: number(server, "star_drawing") == 0)


def test_a_stream_shows_signs_of_life_while_it_waits(monkeypatch):
    monkeypatch.setattr(settings, "ALIVE_SECONDS", 0.05)
    with holding() as (server, model, send):
        send({"prompt": "first"})
        until(lambda: model.batches)
        streamed = send({"prompt": "a", "stream": True})
        time.sleep(0.5)
        model.hold.set()
        text = streamed.result().data.decode()
        assert text.count(": waiting for ") > 3 and text.startswith(": waiting for 1")


def test_stopping_finishes_what_is_drawn_and_refuses_what_waits():
    with holding(model={"step_s": 0.01}) as (server, model, send):
        drawn = send({"prompt": "first", "n": 10})  # two of them wait for the next batch
        until(lambda: model.batches)
        waits = [send({"prompt": "a"}), send({"prompt": "b"})]
        until(lambda: number(server, "star_waiting") == 4)
        server.stop()
        assert [one.result().status for one in waits] == [503, 503]
        assert all(one.result().error["code"] == "stopping" for one in waits)
        assert all("nothing was drawn" in one.result().error["where"] for one in waits)
        model.hold.set()
        assert len(drawn.result().json["data"]) == 10 and server.done.wait(10)
    with pytest.raises(OSError):
        ask(server, "/health")


def test_stopping_gives_up_after_its_grace():
    with holding(model={"step_s": 0.5}, grace_s=0.3) as (server, model, send):
        model.hold.set()
        drawn = send({"prompt": "first"})
        until(lambda: model.batches)
        started = time.monotonic()
        server.stop()
        assert drawn.result().status == 503 and server.done.wait(10) and time.monotonic() - started < 5
        assert "begun and not finished" in drawn.result().error["where"]


def test_who_asked_is_told_when_a_second_signal_ends_all_at_once():
    with holding(model={"step_s": 1}) as (server, model, send):
        model.hold.set()
        drawn = send({"prompt": "first"})
        until(lambda: model.batches)
        server.stop()
        server.stop()
        assert drawn.result().status == 503 and drawn.result().error["code"] == "stopping"
        assert server.done.wait(10)


def test_a_bundle_that_changed_is_said_to_all_and_to_the_balancer():
    changed = threading.Event()

    def check() -> None:
        if changed.is_set():
            raise Refused(503, "The bundle changed", where="x: expected y", fix="start again", code="changed")

    with serving(check=check) as server:
        assert ask(server, GENERATE, {"prompt": "a"}).status == 200 == ask(server, "/health").status
        changed.set()
        assert ask(server, GENERATE, {"prompt": "a"}).error["code"] == "changed"
        assert ask(server, "/health").status == 503
