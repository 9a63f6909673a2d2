"""Two servers behind the example's HAProxy: when one dies under load, no request is lost."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from http.client import IncompleteRead
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.helpers.served import Reply, ask

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "examples" / "replicas" / "haproxy.cfg"
HAPROXY = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")
pytestmark = pytest.mark.skipif(not HAPROXY, reason="there is no haproxy on this machine")
TOGETHER = 2
SERVE = f"""
import signal
from tests.helpers.served import FakeModel, serving
with serving(FakeModel(step_s=0.01), images={TOGETHER}) as server:
    signal.signal(signal.SIGTERM, lambda *_: server.stop())
    server.done.wait()
"""
GENERATE = "/v1/images/generations"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def replicas(tmp_path):
    """Two server processes and the address of the proxy before them."""
    started = []
    try:
        ports = []
        for name in ("one", "two"):
            log = (tmp_path / name).open("w")
            started.append(subprocess.Popen([sys.executable, "-c", SERVE], stderr=log, cwd=ROOT))
        for name in ("one", "two"):
            deadline = time.monotonic() + 60
            while not (found := re.search(r"127\.0\.0\.1:(\d+)", (tmp_path / name).read_text())):
                assert time.monotonic() < deadline
                time.sleep(0.05)
            ports.append(int(found[1]))
        port = free_port()
        places = dict(zip(("STAR_BIND", "STAR_ONE", "STAR_TWO"), (port, *ports)))
        environment = os.environ | {name: f"127.0.0.1:{at}" for name, at in places.items()}
        started.append(subprocess.Popen([HAPROXY, "-f", str(CONFIG)], env=environment))
        proxy, deadline = SimpleNamespace(port=port), time.monotonic() + 20
        while True:
            try:
                assert ask(proxy, "/health").status == 200
                break
            except (OSError, AssertionError):
                assert time.monotonic() < deadline
                time.sleep(0.1)
        yield SimpleNamespace(proxy=proxy, processes=started, ports=ports)
    finally:
        for process in started:
            process.kill()
            process.wait(20)


def reply_of(asked: Future[Reply]) -> Reply | None:
    """The reply; None if it ended before its end."""
    try:
        return asked.result()
    except IncompleteRead:
        return None


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "stopped"])
def test_no_request_is_lost_when_a_replica_ends_under_load(replicas, how):
    """Those that the dead one had taken are drawn by the other: their seeds give the same images.

    Only an answer that had begun when its server was killed ends with it.
    """
    with ThreadPoolExecutor(60) as pool:
        bodies = [{"prompt": f"p{i}", "seed": i} for i in range(60)]
        asked = [pool.submit(ask, replicas.proxy, GENERATE, body, timeout_s=60) for body in bodies]
        while sum(one.done() for one in asked) < 10:
            time.sleep(0.01)
        replicas.processes[0].send_signal(how)
        replies = [reply_of(one) for one in asked]
    assert replies.count(None) <= (TOGETHER if how == signal.SIGKILL else 0)
    answered = [(body, reply) for body, reply in zip(bodies, replies) if reply]
    assert [reply.data[:300] for _, reply in answered if reply.status != 200] == []
    survivor = SimpleNamespace(port=replicas.ports[1])
    for body, reply in answered[:10]:
        assert ask(survivor, GENERATE, body).json["data"] == reply.json["data"]
    lines = ask(survivor, "/metrics").data.decode().splitlines()
    drawn = next(float(line.split()[1]) for line in lines if line.startswith("star_images_total"))
    assert drawn > 20  # and the other one drew before it ended


def test_streams_pass_the_proxy_as_they_come(replicas):
    reply = ask(replicas.proxy, GENERATE, {"prompt": "a", "stream": True})
    assert reply.data.count(b"event: image_generation.partial_image") == 3
