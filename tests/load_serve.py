"""Many clients on one server: errors, memory, equal seeds, and the gain of drawing together.

    python -m tests.load_serve BUNDLE [--clients 64] [--minutes 10]

Starts `star-export serve` on this machine, on a free port that only this machine reaches. First one client
draws one image after the other, then all draw at once; the ratio of the two rates is what drawing together
gains. Then all clients draw, edit and ask for so many minutes. Exit code 1 when a promise was not kept.
"""

from __future__ import annotations

import argparse
import base64
import collections
import http.client
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

PROMPTS = (
    "a red star",
    "three yellow stars on a blue background",
    "a green triangle to the left of a purple circle on a white background",
    "two blue circles and a small red star on a yellow background",
)
TURNS = 4
SEEDS, GROWTH_LIMIT_BYTES = 12, 20_000_000
GENERATE, EDIT, CHAT = "/v1/images/generations", "/v1/images/edits", "/v1/chat/completions"


class Server:
    """The program under load, as a process of its own."""

    def __init__(self, bundle: str, *options: str):
        self.log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115
        command = [sys.executable, "-m", "star_export", "serve", bundle, "--port", "0", *options]
        self.process = subprocess.Popen(command, stderr=self.log, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not (found := re.search(r"http://127\.0\.0\.1:(\d+)", Path(self.log.name).read_text())):
            assert self.process.poll() is None and time.monotonic() < deadline, "it did not start"
            time.sleep(0.1)
        self.port = int(found[1])

    def ask(self, path: str, body: dict | None = None) -> tuple[int, dict, bytes]:
        """Send a request, on a connection of its own: status, headers and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        try:
            data = None if body is None else json.dumps(body).encode()
            headers = {"Content-Type": "application/json"}
            connection.request("GET" if data is None else "POST", path, data, headers)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def memory_bytes(self) -> int:
        """What the process holds of the machine's memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024

    def files(self) -> int:
        """How many files and connections the process has open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def stop(self) -> int:
        """Stop it as a service manager does, and return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(90)


class Load:
    """Clients that ask a server until they are told to end, and what they saw."""

    def __init__(self, server: Server, picture: str):
        self.server, self.picture = server, picture
        self.lock, self.end = threading.Lock(), threading.Event()
        self.counts: collections.Counter[str] = collections.Counter()
        self.faults: list[str] = []
        self.images: dict[tuple, str] = {}  # what was asked for -> the hash of its ids

    def run(self, clients: int, seconds: float, *, only_draw: bool) -> float:
        """Let `clients` ask for so many seconds; returns the images per second."""
        self.end.clear()
        before, started = self.counts["images"], time.monotonic()
        threads = [threading.Thread(target=self._client, args=(i, only_draw)) for i in range(clients)]
        for thread in threads:
            thread.start()
        self.end.wait(seconds)
        rate = (self.counts["images"] - before) / (time.monotonic() - started)
        self.end.set()
        for thread in threads:
            thread.join()
        return rate

    def _client(self, number: int, only_draw: bool) -> None:
        rng = random.Random(number)
        while not self.end.is_set():
            kind = "draw" if only_draw else rng.choices(("draw", "stream", "edit", "ask"), (7, 1, 1, 1))[0]
            try:
                self._once(kind, rng.choice(PROMPTS), rng.randrange(SEEDS))
            except Exception as error:
                self._fault(f"{kind}: {type(error).__name__}: {error}")

    def _once(self, kind: str, prompt: str, seed: int) -> None:
        path, body = GENERATE, {"prompt": prompt, "seed": seed, "user": f"{threading.get_ident()}"}
        if kind == "stream":
            body |= {"stream": True}
        elif kind == "edit":
            path, body = EDIT, body | {"prompt": "change the background to black", "image": self.picture}
        elif kind == "ask":
            url = {"url": f"data:image/png;base64,{self.picture}"}
            parts = [
                {"type": "text", "text": "how many stars are there?"},
                {"type": "image_url", "image_url": url},
            ]
            path, body = CHAT, {"messages": [{"role": "user", "content": parts}]}
        status, headers, data = self.server.ask(path, body)
        if status == 429:
            self._count("429")
            self.end.wait(min(float(headers.get("retry-after", 1)), 5) * random.uniform(0.5, 1))
            return
        if status != 200:
            self._fault(f"{kind}: {status}: {data[:200]!r}")
            return
        if kind == "stream":
            last = [line for line in data.decode().splitlines() if line.startswith("data: ")][-1]
            answer = json.loads(last[6:])
        else:
            answer = json.loads(data)
        star = answer["star"]
        hashes = star["ids_sha256"] if kind == "ask" else star["image_ids_sha256"][0]
        asked = ("ask",) if kind == "ask" else ("edit", seed) if kind == "edit" else (prompt, seed)
        with self.lock:
            self.counts[kind] += 1
            self.counts["images"] += kind != "ask"
            self.counts["drawn together"] += star.get("drawn_together", 1) > 1
            if self.images.setdefault(asked, hashes) != hashes:
                self.faults.append(
                    f"{asked}: another picture than before, drawn with {star['drawn_together']}"
                )

    def _count(self, name: str) -> None:
        with self.lock:
            self.counts[name] += 1

    def _fault(self, text: str) -> None:
        with self.lock:
            self.faults.append(text)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.load_serve")
    parser.add_argument("bundle")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument(
        "--compare-seconds", type=float, default=30.0, help="each of the two rates is measured"
    )
    parser.add_argument(
        "--option", action="append", default=[], help="of `star-export serve`; may be repeated"
    )
    given = parser.parse_args()
    server = Server(given.bundle, *given.option)
    try:
        _, _, data = server.ask(GENERATE, {"prompt": PROMPTS[1], "seed": 7})
        load = Load(server, json.loads(data)["data"][0]["b64_json"])
        base64.b64decode(load.picture)
        alone = together = 0.0
        for _ in range(TURNS):  # in turns, because others may use the machine, too
            alone += load.run(1, given.compare_seconds / TURNS, only_draw=True) / TURNS
            together += load.run(given.clients, given.compare_seconds / TURNS, only_draw=True) / TURNS
        print(f"one client, one image after the other: {alone:.2f} images/s", flush=True)
        print(
            f"{given.clients} clients at once: {together:.2f} images/s, {together / alone:.2f} times as many"
        )
        memory: list[int] = []
        watch = threading.Thread(target=_watch, args=(server, load, memory))
        started = time.monotonic()
        load.end.clear()
        watch.start()
        rate = load.run(given.clients, given.minutes * 60, only_draw=False)
        watch.join()
        seconds = time.monotonic() - started
        time.sleep(1)
        files, code = server.files(), server.stop()
    finally:
        if server.process.poll() is None:
            server.process.kill()
    minutes = [statistics.median(memory[i : i + 60]) for i in range(0, len(memory), 60)]
    growth = minutes[-1] - minutes[0]
    print(f"{given.clients} clients for {seconds:.0f} s: {dict(load.counts)}, {rate:.2f} images/s")
    print(
        f"memory, the median of each minute, in MB: {' '.join(f'{size / 1e6:.0f}' for size in minutes)}; "
        f"{max(memory) / 1e6:.0f} at most; grown by {growth / 1e6:.1f}"
    )
    print(f"open files at the end: {files}; exit code after SIGTERM: {code}")
    print(f"pictures asked for again and again: {len(load.images)}; faults: {len(load.faults)}")
    for fault in load.faults[:10]:
        print(f"  {fault}")
    return int(bool(load.faults) or growth > GROWTH_LIMIT_BYTES or code != 0)


def _watch(server: Server, load: Load, memory: list[int]) -> None:
    """Note the memory of the process every second."""
    while not load.end.wait(1):
        memory.append(server.memory_bytes())


if __name__ == "__main__":
    sys.exit(main())
