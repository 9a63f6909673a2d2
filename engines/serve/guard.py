"""What stands before every endpoint: who may ask, which headers go out, what is logged and counted.

A page of another site must not reach a server on this machine: neither by a name of its own that leads here
(DNS rebinding), nor by a form that it sends here. So the host that a client addressed, and the origin of a
page, must be ones that we know; with a key, whoever has it.
"""

from __future__ import annotations

import asyncio
import hmac
import time
import traceback
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse

from ..errors import StarError
from .attendance import ClientGone
from .bodies import drain
from .log import Log
from .metrics import Metrics
from .refusals import Refused, body_from_refusal, refusal
from .settings import LOOPBACK, ServeSettings
from .waiting import stopping

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = ("/", "/health")  # without a key
FILES_PATH = "/v1/files/"  # names that cannot be guessed
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"x-frame-options", b"DENY"),
)
NO_CONTENT = b"default-src 'none'; frame-ancestors 'none'"
GONE = 499  # in the log, of a client that did not wait


class Guard:
    """Wraps the `app`. An endpoint adds to what is logged by `request.state.facts`."""

    def __init__(self, app: App, settings: ServeSettings, *, log: Log, metrics: Metrics, paths: set[str]):
        self.app, self.settings, self.log, self.metrics, self.paths = app, settings, log, metrics, paths
        self.allowed_hosts = {name.lower() for name in settings.allowed_hosts}
        self.hosts = {*LOOPBACK, settings.host.lower(), *self.allowed_hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        facts: dict[str, Any] = {}
        scope["state"] = {"facts": facts}
        scope["app"] = self  # the router then raises what it does not know
        started, status, begun, body_read = time.monotonic(), GONE, False, False

        async def receiving() -> MutableMapping[str, Any]:
            nonlocal body_read
            message = await receive()
            body_read = body_read or not message.get("more_body", False)
            return message

        async def sending(message: MutableMapping[str, Any]) -> None:
            nonlocal status, begun
            if message["type"] == "http.response.start":
                status, begun = message["status"], True
                headers = list(message.get("headers", []))
                names = {name for name, _ in headers}
                headers += [(name, value) for name, value in HEADERS if name not in names]
                if b"content-security-policy" not in names:
                    headers.append((b"content-security-policy", NO_CONTENT))
                if b"cache-control" not in names:
                    headers.append((b"cache-control", b"no-store"))
                message = {**message, "headers": headers}
            await send(message)

        try:
            self._check(scope)
            await self.app(scope, receiving, sending)
        except (ClientGone, ClientDisconnect):
            status = GONE
        except asyncio.CancelledError:  # the server ends at once
            told = stopping(begun=True)
            facts["error"] = told.code
            if not begun:
                await refuse(scope, None, sending, told)
            raise
        except Exception as error:
            told = self._told(scope, error)
            facts["error"] = told.code
            if not begun:
                await refuse(scope, None if body_read else receiving, sending, told)
        finally:
            self._tell(scope, facts, status, time.monotonic() - started)

    def _check(self, scope: Scope) -> None:
        """Raise Refused for who may not ask."""
        headers, key = Headers(scope=scope), self.settings.api_key
        host = _name(f"//{headers.get('host', '')}")
        if self.settings.loopback and host not in self.hosts:
            raise Refused(
                403,
                "This server does not have that name",
                where=f"Host: expected one of {', '.join(sorted(self.hosts))}, got {host[:80]!r}",
                fix="address it as localhost, or start it with --allow-host NAME",
                code="unknown_host",
            )
        origin = headers.get("origin")
        if origin is not None and not self._own(origin, headers.get("host", "")):
            raise Refused(
                403,
                "Pages of other sites may not ask here",
                where=f"Origin: expected this server's own page, got {origin[:80]!r}",
                fix="ask from a program, or from the page at /",
                code="foreign_origin",
            )
        path = scope["path"]
        if key is None or path in OPEN_PATHS or path.startswith(FILES_PATH):
            return
        given = headers.get("authorization", "")
        given = given[7:] if given[:7].lower() == "bearer " else headers.get("api-key", "")
        if not hmac.compare_digest(given.strip().encode(), key.encode()):
            raise Refused(
                401,
                "The key is missing or wrong",
                where="Authorization: expected Bearer and the server's key",
                fix="give the key that the server was started with",
                code="invalid_api_key",
            )

    def _own(self, origin: str, host: str) -> bool:
        """Whether a page of `origin` is this server's own: where a client addressed it, or a name that was
        allowed."""
        address = origin.partition("://")[2].lower()
        return address == host.lower() or _name(origin) in self.allowed_hosts

    def _told(self, scope: Scope, error: Exception) -> Refused:
        """What the client is told of an error; the log has the traceback of a bug of ours."""
        if isinstance(error, HTTPException):
            allowed = (error.headers or {}).get("Allow")
            known = f"the method {allowed}" if allowed else f"one of {', '.join(sorted(self.paths))}"
            return Refused(
                error.status_code,
                "This path takes another method" if allowed else "There is nothing here",
                where=f"{scope['method']} {scope['path'][:80]}: expected {known}",
                fix="see docs/serve.md",
                code="method_not_allowed" if allowed else "not_found",
                allow=allowed,
            )
        if not isinstance(error, StarError):
            self.log.say("".join(traceback.format_exception(error)).rstrip())
        return refusal(error)

    def _tell(self, scope: Scope, facts: dict[str, Any], status: int, seconds: float) -> None:
        path = scope["path"]
        known = path if path in self.paths else FILES_PATH if path.startswith(FILES_PATH) else "other"
        self.metrics.request(known, status, seconds)
        client = (scope.get("client") or ("-",))[0]
        shown = path if known != FILES_PATH else FILES_PATH
        self.log.request(
            {
                "status": status,
                "method": scope["method"],
                "path": shown[:200],
                "seconds": round(seconds, 3),
                "client": client,
                **facts,
            }
        )


async def refuse(scope: Scope, receive: Receive | None, send: Send, error: Refused) -> None:
    """Answer with an error, and then `receive` what its client still sends, if it does, so that it comes to
    read the answer."""
    headers = {"retry-after": str(error.retry_after_s)} if error.retry_after_s else {}
    if error.allow:
        headers["allow"] = error.allow
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if receive is not None and scope["method"] == "POST":
        headers["connection"] = "close"
    response = JSONResponse(body_from_refusal(error), error.status, headers)
    await send({"type": "http.response.start", "status": error.status, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": response.body, "more_body": True})
    if receive is not None and scope["method"] == "POST":
        await drain(Request(scope, receive))
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _name(address: str) -> str:
    """The host of an address, without its port."""
    try:
        return urlsplit(address).hostname or ""
    except ValueError:
        return ""
