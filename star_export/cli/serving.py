"""The verb that serves a bundle to other programs: `serve`."""

from __future__ import annotations

import importlib.util

from engines.errors import MissingError, install

from .drawing import open_star
from .outputs import Outcome

PACKAGES = ("starlette", "uvicorn", "python_multipart")


def serve(
    bundle: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key_file: str | None = None,
    allow_host: list[str] | None = None,
    queue: int = 64,
    images: int = 8,
    deadline: float = 600.0,
    grace: float = 30.0,
    log_json: bool = False,
    log_prompts: bool = False,
    window: int | None = None,
    memory: int | None = None,
    threads: int | None = None,
    backend: str = "onnxruntime",
) -> Outcome:
    """Serve `bundle` with `engines.serve.server.serve` until SIGTERM or Ctrl-C.

    Raises MissingError where the packages of the extra `[serve]` are not installed.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingError(
            "The packages that a server needs are not installed",
            where=f"expected {', '.join(PACKAGES)}; missing: {', '.join(missing)}",
            fix=install("serve"),
        )
    from engines.serve.server import read_key
    from engines.serve.server import serve as serve_star
    from engines.serve.settings import ServeSettings

    settings = ServeSettings(
        host=host,
        port=port,
        api_key=None if api_key_file is None else read_key(api_key_file),
        allowed_hosts=tuple(allow_host or ()),
        queue=queue,
        images=images,
        deadline_s=deadline,
        grace_s=grace,
        log_json=log_json,
        log_prompts=log_prompts,
    )
    with open_star(bundle, backend, memory=memory, window=window, threads=threads) as star:
        metrics = serve_star(star, settings)
    names = ("requests", "images", "answers")
    counts = {name: int(metrics.value(f"star_{name}_total")) for name in names}
    return Outcome(counts, ", ".join(f"{count} {name}" for name, count in counts.items()))
