"""A hub on this machine, which serves files as the real one does to its client library: listings, one commit,
ETags and plain downloads."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.helpers.hub import COMMIT

Repositories = Mapping[str, Mapping[str, Path]]  # repository -> file name -> file


@contextmanager
def served(repositories: Repositories) -> Iterator[tuple[str, list[str]]]:
    """The hub's address, and the paths that were downloaded from it, in order."""
    downloaded: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            owner, name, *rest = self.path.partition("?")[0].removeprefix("/api/models").split("/")[1:]
            files = repositories.get(f"{owner}/{name}", {})
            if self.path.startswith("/api/"):
                data = json.dumps(listing(files) if "tree" in rest else {"id": name, "sha": COMMIT}).encode()
            elif rest[-1] in files:
                data = files[rest[-1]].read_bytes()
            else:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", f'"{rest[-1]}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if body:
                self.wfile.write(data)
                if not self.path.startswith("/api/"):
                    downloaded.append(f"{owner}/{name}/{rest[-1]}")

        def log_message(self, *_) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", downloaded
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def listing(files: Mapping[str, Path]) -> list[dict]:
    return [
        {"type": "file", "path": name, "size": path.stat().st_size, "oid": name}
        for name, path in files.items()
    ]
