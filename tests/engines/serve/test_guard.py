"""Who may ask: the host, the origin and the key; and what goes out with every answer."""

from __future__ import annotations

import contextlib
import http.client
import json

import pytest

from engines.errors import InputError, UsageError
from engines.serve import page
from engines.serve.log import Log
from engines.serve.metrics import Metrics
from engines.serve.server import listen, read_key, serve_model
from engines.serve.settings import ServeSettings
from tests.helpers.served import ABOUT, MODEL, FakeModel, ask, serving

KEY = "a-key-of-many-letters"
GENERATE = "/v1/images/generations"


@pytest.fixture(scope="module")
def server():
    with serving(allowed_hosts=("star.lan",)) as running:
        yield running


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "", "127.0.0.1.evil.example", "[::2]"])
def test_a_name_that_only_leads_here_is_refused(server, host):
    reply = ask(server, "/v1/models", Host=host)
    assert reply.status == 403 and reply.error["code"] == "unknown_host"


@pytest.mark.parametrize("host", ["localhost:1", "127.0.0.1", "[::1]:8000", "star.lan", "LOCALHOST"])
def test_the_names_of_this_machine_and_those_that_were_allowed_are_served(server, host):
    assert ask(server, "/v1/models", Host=host).status == 200


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "", "x", "http://localhost.evil.example", "http://127.0.0.1:1"]
)
def test_a_page_of_another_site_may_not_ask(server, origin):
    reply = ask(server, GENERATE, {"prompt": "a"}, Origin=origin)
    assert reply.status == 403 and reply.error["code"] == "foreign_origin"
    for own in (f"http://127.0.0.1:{server.port}", "https://star.lan"):
        assert ask(server, GENERATE, {"prompt": "a"}, Origin=own).status == 200


def test_a_key_is_asked_for_everywhere_but_for_the_page_and_the_health():
    with serving(api_key=KEY) as server:
        for path in ("/v1/models", "/metrics", "/nothing"):
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}):
                reply = ask(server, path, **headers)
                assert reply.status == 401 and reply.headers["www-authenticate"] == "Bearer"
        assert ask(server, "/v1/models", Authorization=f"Bearer {KEY}").status == 200
        assert ask(server, "/v1/models", api_key=KEY).status == 200  # as Azure's clients send it
        assert ask(server, "/").status == ask(server, "/health").status == 200


def test_a_host_beyond_this_machine_needs_a_key():
    for host in ("0.0.0.0", "192.168.1.5", "::", "example.org"):
        with pytest.raises(UsageError, match="needs a key"):
            ServeSettings(host=host)
        assert not ServeSettings(host=host, api_key=KEY).loopback


@pytest.mark.parametrize("text", [b"", b"short\n", b"\xff\xfe" * 20, "schlüssel-mit-umlaut".encode()])
def test_a_key_that_is_no_good_is_refused(tmp_path, text):
    (tmp_path / "key").write_bytes(text)
    with pytest.raises(InputError, match="key"):
        read_key(str(tmp_path / "key"))
    with pytest.raises(InputError, match="cannot be read"):
        read_key(str(tmp_path / "absent"))


def test_a_port_in_use_is_said(server):
    with pytest.raises(UsageError, match="cannot listen") as caught:
        listen(ServeSettings(port=server.port))
    assert str(server.port) in caught.value.where


def test_every_answer_has_strict_headers(server):
    for path in ("/", "/health", "/nothing", "/v1/models"):
        headers = ask(server, path).headers
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
        assert headers["content-security-policy"].startswith("default-src 'none'")
    assert ask(server, "/nothing").error["code"] == "not_found"
    reply = ask(server, GENERATE, method="GET")
    assert reply.status == 405 and reply.error["where"].endswith("expected the method POST")
    assert reply.headers["allow"] == "POST"


def test_the_page_runs_its_own_script_and_nothing_of_another_host(server):
    reply, text = ask(server, "/"), page.HTML.decode()
    policy = reply.headers["content-security-policy"]
    assert policy.count("'sha256-") == 2 and "unsafe" not in policy and "http" not in policy
    assert reply.data == page.HTML and "://" not in text.replace("http://www.w3.org/2000/svg", "")
    never = ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", " style=")
    assert not [word for word in never if word in text]
    assert not any(f" on{event}=" in text for event in ("click", "load", "error", "submit", "input"))


def test_the_log_has_a_line_per_request_and_prompts_only_on_request(capfd):
    for settings, seen in (({}, False), ({"log_prompts": True}, True), ({"log_json": True}, False)):
        with serving(**settings) as server:
            ask(server, GENERATE, {"prompt": 'a "secret"\n thing', "seed": 5})
            ask(server, "/v1/chat/completions", {"messages": [{"role": "user", "content": "secret"}]})
            ask(server, GENERATE, {"prompt": "a", "n": 0})
        written = capfd.readouterr().err.splitlines()
        # The server of the tests before may have written the line of its last request only now.
        lines = written[next(i for i, line in enumerate(written) if "serving fake" in line) :]
        assert len(lines) == 5 and ("secret" in "".join(lines)) == seen
        if settings.get("log_json"):
            found = [json.loads(line) for line in lines[1:4]]
            assert [(line["status"], line["path"]) for line in found][0] == (200, GENERATE)
            assert found[0]["seed"] == 5 and found[2]["error"] == "invalid_value"
        else:
            assert " 200 POST /v1/images/generations " in lines[1] and "seed=5" in lines[1]


def test_a_log_that_nobody_takes_harms_nobody():
    def full(text: str) -> None:
        raise OSError("no space")

    Log(as_json=False, prompts=False, write=full).request({"status": 200})


def test_the_numbers_are_in_the_format_of_prometheus(server):
    ask(server, GENERATE, {"prompt": "a", "n": 2})
    reply = ask(server, "/metrics")
    lines = reply.data.decode().splitlines()
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert all(line.startswith(("# HELP ", "# TYPE ")) or len(line.rsplit(" ", 1)) == 2 for line in lines)
    values = {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}
    assert values["star_images_total"] >= 2 and values["star_waiting"] == values["star_bodies_bytes"] == 0
    assert values['star_images_together_bucket{le="+Inf"}'] == values["star_images_together_count"]
    assert not [line for line in lines if "evil" in line]


def test_the_address_it_was_started_at_and_names_in_capitals_are_its_own():
    with serving(host="127.0.0.2", allowed_hosts=("Star.LAN",)) as server:
        for host in ("127.0.0.2", f"127.0.0.2:{server.port}", "star.lan"):
            with contextlib.closing(http.client.HTTPConnection("127.0.0.2", server.port)) as connection:
                connection.request("GET", "/v1/models", headers={"Host": host, "Origin": "https://star.lan"})
                assert connection.getresponse().status == 200


def test_nothing_of_a_path_can_begin_a_line_of_the_log(capfd):
    with serving() as server:
        ask(server, "/x%0d%0a2026-01-01T00:00:00Z%20200%20GET%20/faked%1b%5b31m")
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 3 and not [line for line in lines if not line.isprintable()]
    assert ' 404 GET "/x\\r\\n2026' in lines[1]


def test_a_bug_of_ours_is_one_object_of_a_log_in_json(capfd, monkeypatch):
    monkeypatch.setattr(Metrics, "text", lambda *_: 1 / 0)
    with serving(log_json=True) as server:
        assert ask(server, "/metrics").error["code"] == "internal_error"
    found = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert "ZeroDivisionError" in found[1]["message"]


def test_counts_keep_every_digit():
    metrics = Metrics()
    metrics.add("star_image_tokens_total", 12_345_678)
    metrics.add("star_image_tokens_total")
    assert "star_image_tokens_total 12345679" in metrics.text({"star_bodies_bytes": 201_326_592})
    assert "star_bodies_bytes 201326592" in metrics.text({"star_bodies_bytes": 201_326_592})


def test_of_two_servers_that_took_a_port_at_once_the_later_one_says_so():
    with contextlib.closing(listen(ServeSettings(port=0))) as first:
        port = first.getsockname()[1]
        with contextlib.closing(listen(ServeSettings(port=port))) as second:
            first.listen()
            with pytest.raises(UsageError, match="cannot listen"):
                serve_model(FakeModel(), MODEL, ABOUT, ServeSettings(port=port), second)
