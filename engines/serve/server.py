"""A server from its start to its end."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import math
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..bundle.files import MANIFEST, reason
from ..bundle.manifest import ModelSpec
from ..bundle.reader import Bundle
from ..errors import InputError, UsageError
from ..runtime.star import Star
from ..runtime.together import Together
from . import settings as limits
from .answers import About
from .app import application
from .endpoints import Endpoints
from .guard import Guard
from .kept_files import KeptFiles
from .log import Log
from .metrics import Metrics
from .refusals import Refused
from .scheduler import Model, Scheduler
from .settings import ServeSettings
from .waiting import Waiting

KEEP_ALIVE_SECONDS = 15
HEAD_LIMIT_BYTES = 32 << 10
STALLED_LOOKS = 4
LIBRARIES = ("uvicorn", "python_multipart")  # whose logs repeat ours
GIVE_UP_SECONDS = 20.0  # for a step that was begun to end, after nobody waits any more


Ready = Callable[[str, Callable[[], None]], Any]  # is given a server's address, and what stops it


def serve(star: Star, settings: ServeSettings, *, ready: Ready = lambda url, stop: None) -> Metrics:
    """Serve `star` until SIGTERM or SIGINT: then what is drawn is finished, and what waits is refused.

    `ready` is called when requests are taken. Returns what was counted. Raises UsageError for an address that
    cannot be used, and whatever opening the model raises.
    """
    with contextlib.closing(listen(settings)) as listening:
        together = Together(star)
        images = min(settings.images, together.images_limit() or settings.images)
        together.load(images=images)
        together.warm_up(images=images)
        return serve_model(
            together,
            star.model,
            about_star(star),
            replace(settings, images=images),
            listening,
            check=Unchanged(star.bundle),
            ready=ready,
        )


def serve_model(
    model: Model,
    spec: ModelSpec,
    about: About,
    settings: ServeSettings,
    listening: socket.socket,
    *,
    check: Callable[[], None] = lambda: None,
    ready: Ready = lambda url, stop: None,
) -> Metrics:
    """Serve any `model` on a bound socket, as `serve` does; `check` raises Refused when it may not go on.

    Raises UsageError where another server listens by now.
    """
    try:
        listening.listen()
    except OSError as error:  # another server had this address, too, and began to listen first
        raise _cannot_listen(f"{settings.host}:{settings.port}", error) from None
    log = Log(as_json=settings.log_json, prompts=settings.log_prompts)
    metrics, waiting = Metrics(), Waiting(settings.queue)
    scheduler = Scheduler(model, waiting, metrics, images=settings.images, check=check, report=log.say)
    for name in LIBRARIES:
        logging.getLogger(name).addHandler(logging.NullHandler())
        logging.getLogger(name).propagate = False
    with contextlib.closing(KeptFiles()) as files:
        endpoints = Endpoints(about, spec, settings, scheduler, files)
        server = _Server(application(endpoints, log=log, metrics=metrics), scheduler, settings)
        host, port = listening.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        server.ready = lambda: ready(address, server.stop)
        scheduler.start()
        log.say(f"serving {about.model} at {address}")
        asyncio.run(server.serve([listening]))
        scheduler.stop()
        scheduler.give_up()
        scheduler.join(GIVE_UP_SECONDS)
        log.say(f"stopped after {int(metrics.value('star_requests_total'))} requests")
    return metrics


def about_star(star: Star) -> About:
    """The facts of `star` that answers carry."""
    manifest = (star.bundle.path / MANIFEST).read_bytes()
    return About(
        model=star.model.name,
        bundle_sha256=hashlib.sha256(manifest).hexdigest(),
        precision=star.bundle.manifest.precision,
        backend=star.backend,
        side=star.model.image_size,
    )


class Unchanged:
    """Raises Refused once a file of `bundle` is not the one that was there at the start: parts of it are read
    while images are drawn, and its hash stands in every answer."""

    def __init__(self, bundle: Bundle):
        self.files = [bundle.path / name for name in (MANIFEST, *bundle.manifest.files)]
        self.states = [_state(file) for file in self.files]

    def __call__(self) -> None:
        for file, state in zip(self.files, self.states):
            if _state(file) != state:
                raise Refused(
                    503,
                    "The bundle changed while it was served",
                    where=f"{file.name}: expected the file of the start, got another one",
                    fix="start the server again",
                    code="bundle_changed",
                )


def _state(file: Path) -> tuple[int, ...] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def listen(settings: ServeSettings) -> socket.socket:
    """A socket that has the server's address. Raises UsageError."""
    where = f"{settings.host}:{settings.port}"
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)
        family, _, _, _, address = found[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            return listening
        except BaseException:
            listening.close()
            raise
    except OSError as error:
        raise _cannot_listen(where, error) from None


def _cannot_listen(where: str, error: OSError) -> UsageError:
    return UsageError(
        "The server cannot listen here",
        where=f"{where}: {reason(error)}",
        fix="choose another --host or --port",
    )


class Protocol(H11Protocol):
    """uvicorn's protocol, which waits only so long for the head of a request, and for a client that takes
    nothing of its answer."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._last: Any = None
        self._unsent = self._stalled = 0  # bytes that wait at a look, and the looks since they became fewer
        self._timer = self.loop.call_later(limits.HEAD_SECONDS, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        super().connection_lost(exc)

    def _look(self) -> None:
        """Close a connection on which no request came since the last look and none is answered; while it
        may wait for one, uvicorn has a timer of its own."""
        unsent, before = self.transport.get_write_buffer_size(), self._unsent
        self._unsent, self._stalled = unsent, self._stalled + 1 if unsent and unsent >= before else 0
        idle = not unsent and (self.cycle is None or self.cycle.response_complete)
        idle = idle and self.cycle is self._last and self.timeout_keep_alive_task is None
        if idle or self._stalled > STALLED_LOOKS:
            self.transport.abort()
            return
        self._last = self.cycle
        self._timer = self.loop.call_later(limits.HEAD_SECONDS, self._look)


class _Server(uvicorn.Server):
    """uvicorn's server, which stops in our order, and leaves a signal's meaning to us."""

    def __init__(self, app: Guard, scheduler: Scheduler, settings: ServeSettings):
        config = uvicorn.Config(
            app,
            http=Protocol,
            ws="none",
            lifespan="off",
            loop="asyncio",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=limits.CONNECTIONS_LIMIT,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=math.ceil(settings.grace_s + GIVE_UP_SECONDS),
            h11_max_incomplete_event_size=HEAD_LIMIT_BYTES,
        )
        super().__init__(config)
        self.scheduler, self.settings = scheduler, settings
        self.ready: Callable[[], Any] = lambda: None

    def stop(self) -> None:
        """Stop on the first call, and at once on the second one; from any thread or signal."""
        if self.should_exit:
            self.scheduler.give_up()
            self.force_exit = True
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Let SIGTERM and SIGINT stop the server, where this thread may be told of them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, lambda *_: self.stop()) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish what is drawn, for so long, and then give it up."""
        self.scheduler.stop()
        timer = asyncio.get_running_loop().call_later(self.settings.grace_s, self.scheduler.give_up)
        await super().shutdown(sockets)
        timer.cancel()


def read_key(path: str) -> str:
    """The key in the first line of a file. Raises InputError."""
    try:
        text = Path(path).expanduser().read_bytes()[:4096].decode()
    except (OSError, ValueError) as error:
        said = reason(error) if isinstance(error, OSError) else "expected a text in UTF-8"
        raise InputError(
            "The key cannot be read", where=f"{path}: {said}", fix="give a file with a key in its first line"
        ) from None
    key = (text.splitlines() or [""])[0].strip()
    if len(key) < 16 or not (key.isascii() and key.isprintable()):
        raise InputError(
            "This key is no good",
            where=f"{path}: expected at least 16 plain characters in the first line, got {len(key)}",
            fix="make one: python -c 'import secrets; print(secrets.token_urlsafe())' > FILE",
        )
    return key
