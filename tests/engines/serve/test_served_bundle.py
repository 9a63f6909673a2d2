"""A real bundle behind the server: the same images as without it, and what happens when files or signals come
between."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from engines.inputs.image_io import image_from_bytes
from engines.runtime.star import Star
from engines.serve.answers import ids_sha256
from engines.serve.server import serve
from engines.serve.settings import ServeSettings
from star_export.cli.parser import main
from tests.helpers.served import ask, events, picture

GENERATE, EDIT, CHAT = "/v1/images/generations", "/v1/images/edits", "/v1/chat/completions"
PROMPTS = ["a red cat", "a photo of a red cat on a white sofa", "two dogs"]


def started(bundle: Path, **settings):
    """A server on a bundle in a thread: what stops it, its port, and the thread."""
    told, ready = SimpleNamespace(), threading.Event()

    def note(url: str, stop) -> None:
        told.port, told.stop = int(url.rpartition(":")[2]), stop
        ready.set()

    def run() -> None:
        with Star(bundle) as star:
            serve(star, ServeSettings(port=0, **settings), ready=note)

    told.thread = threading.Thread(target=run, daemon=True)
    told.thread.start()
    assert ready.wait(60)
    return told


@pytest.fixture(scope="module")
def server(mini_bundle):
    running = started(mini_bundle)
    yield running
    running.stop()
    running.thread.join(60)
    assert not running.thread.is_alive()


def image(item: dict) -> np.ndarray:
    return image_from_bytes(base64.b64decode(item["b64_json"]), where="answer")


def test_images_are_those_of_the_runtime_whatever_they_are_drawn_with(server, mini_bundle):
    with Star(mini_bundle) as star, ThreadPoolExecutor(12) as pool:
        bodies = [{"prompt": prompt, "seed": seed} for prompt in PROMPTS for seed in (1, 2)] * 2
        replies = list(pool.map(lambda body: ask(server, GENERATE, body).json, bodies))
        for body, reply in zip(bodies, replies):
            drawn = star.generate(body["prompt"], seed=body["seed"])
            np.testing.assert_array_equal(image(reply["data"][0]), drawn.images[0])
            assert reply["star"]["image_ids_sha256"] == [ids_sha256(drawn.image_ids[0])]
        assert max(reply["star"]["drawn_together"] for reply in replies) > 1
        data = picture(60, 40)
        reply = ask(server, EDIT, {"prompt": "blue", "seed": 5, "image": base64.b64encode(data).decode()})
        edited = star.edit(image_from_bytes(data, where="test"), "blue", seed=5)
        np.testing.assert_array_equal(image(reply.json["data"][0]), edited.images[0])
        tokens = reply.json["usage"]["input_tokens_details"]
        assert tokens["image_tokens"] > star.model.image_tokens and tokens["text_tokens"] > 0
        options = {"cfg": 2.0, "top_k": 5, "top_p": 0.7}
        body = {"prompt": "a cat", "guidance": 2.0, "top_k": 5, "top_p": 0.7, "seed": 3, "window": 2}
        drawn = star.generate("a cat", seed=3, **options).image_ids[0]
        assert ask(server, GENERATE, body).json["star"]["image_ids_sha256"] == [ids_sha256(drawn)]
        greedy = star.generate("a cat", greedy=True, reason=True, max_new_tokens=256)
        item = ask(server, GENERATE, {"prompt": "a cat", "greedy": True, "reason": True}).json["data"][0]
        assert item["image_ids_sha256"] == ids_sha256(greedy.image_ids[0])
        assert item["revised_prompt"] == greedy.answer
    manifest = (mini_bundle / "manifest.json").read_bytes()
    assert replies[0]["star"]["bundle_sha256"] == hashlib.sha256(manifest).hexdigest()


def test_an_answer_is_that_of_the_runtime_whole_and_streamed(server, mini_bundle):
    data = picture(60, 40)
    url = {"url": f"data:image/png;base64,{base64.b64encode(data).decode()}"}
    parts = [{"type": "text", "text": "what is it?"}, {"type": "image_url", "image_url": url}]
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 12}
    with Star(mini_bundle) as star:
        answer = star.ask(image_from_bytes(data, where="test"), "what is it?", max_new_tokens=12)
    reply = ask(server, CHAT, body).json
    assert reply["choices"][0]["message"]["content"] == answer.text
    assert reply["star"]["ids_sha256"] == ids_sha256(answer.ids)
    chunks = events(ask(server, CHAT, body | {"stream": True}).data)[:-1]
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == answer.text


def test_a_streamed_image_shows_rows_that_are_drawn(server):
    found = events(ask(server, GENERATE, {"prompt": "a cat", "seed": 2, "stream": True}).data)
    assert 1 <= len(found) - 1 <= 3
    final = image(found[-1])
    for event in found[:-1]:
        grey = (image(event) == 128).all(axis=(1, 2))
        assert 0 < grey.sum() < len(final)


def test_prompts_that_the_model_refuses_are_told_in_three_parts(server):
    refused = {"": "empty", "cat " * 7000: "too long", "<|im_end|>": "special", "\ud800": "Unicode"}
    for prompt, word in refused.items():
        reply = ask(server, GENERATE, {"prompt": prompt})
        assert reply.status == 400 and word in reply.error["message"], word


def test_a_file_that_changes_while_it_is_served_is_said(mini_bundle, tmp_path):
    bundle = shutil.copytree(mini_bundle, tmp_path / "bundle")
    server = started(bundle)
    assert ask(server, GENERATE, {"prompt": "a cat"}).status == 200
    file = bundle / "vq_decoder" / "model.onnx.data"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    reply = ask(server, GENERATE, {"prompt": "a cat"})
    assert reply.status == 503 and reply.error["code"] == "bundle_changed"
    assert "model.onnx.data" in reply.error["where"] and ask(server, "/health").status == 503
    server.stop()
    server.thread.join(60)


def test_sigterm_under_load_finishes_what_is_drawn_and_refuses_the_rest(mini_bundle, tmp_path):
    log = tmp_path / "log"
    command = [sys.executable, "-m", "star_export", "--json", "serve", str(mini_bundle), "--port", "0"]
    command += ["--images", "2", "--log-json"]
    with log.open("w") as stderr:
        process = subprocess.Popen(
            command, stderr=stderr, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": "."}
        )
    deadline = time.monotonic() + 60
    while not (found := re.search(r"127\.0\.0\.1:(\d+)", log.read_text())):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    server = SimpleNamespace(port=int(found[1]))
    with ThreadPoolExecutor(30) as pool:
        asked = [pool.submit(ask, server, GENERATE, {"prompt": "a cat", "seed": i}) for i in range(30)]
        while not any(one.done() for one in asked):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        statuses = [one.result().status for one in asked if one.exception() is None]
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and '"images"' in out
    assert set(statuses) <= {200, 503} and statuses.count(503) >= 1
    assert "Traceback" not in log.read_text()
    refused = [one for one in asked if one.exception() is not None]
    assert all(isinstance(one.exception(), ConnectionError) for one in refused)


def test_the_verb_refuses_before_it_loads_anything(tmp_path, mini_bundle, capsys, monkeypatch):
    bundle = str(mini_bundle)
    assert main(["serve", bundle, "--host", "0.0.0.0"]) == 2
    assert "needs a key" in capsys.readouterr().err
    assert main(["serve", bundle, "--api-key-file", str(tmp_path / "absent")]) == 3
    assert main(["serve", str(tmp_path)]) == 3
    assert main(["serve", bundle, "--port", "70000"]) == 2
    assert main(["serve", bundle, "--host", "192.0.2.1", "--api-key-file", str(_key(tmp_path))]) == 2
    assert "cannot listen" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["serve", bundle]) == 5
    assert '".[serve]"' in capsys.readouterr().err


def _key(folder: Path) -> Path:
    file = folder / "key"
    file.write_text("k" * 20)
    return file
