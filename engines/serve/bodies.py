"""Reading the bodies of requests, within bounds that hold before a byte is read."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from ..bundle.records import value_from_json
from ..errors import InputError
from . import settings as limits
from .fields import Fields
from .refusals import Refused

FIELDS_LIMIT, FILES_LIMIT, FIELD_LIMIT_BYTES = 64, 16, 1 << 20  # of one form
DRAIN_LIMIT_BYTES, DRAIN_SECONDS = 512 << 20, 5.0  # of a refused body, so that its sender reads the answer


class Bodies:
    """How much of the bodies of all requests is in memory: no more than a limit, whatever arrives."""

    def __init__(self) -> None:
        self.limit_bytes, self.held_bytes = limits.BODIES_LIMIT_BYTES, 0

    @contextlib.asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """Read a body, whose room is taken until the context ends. Raises Refused, with nothing read for a
        body that is too large by its own account."""
        stated = request.headers.get("content-length")
        if "transfer-encoding" in request.headers:
            stated = None  # a body in chunks has another length than the one stated beside it
        expected = int(stated) if stated and stated.isdecimal() else limits.BODY_LIMIT_BYTES
        if expected > limits.BODY_LIMIT_BYTES:
            raise _too_large(expected)
        if self.held_bytes + expected > self.limit_bytes:
            raise Refused(
                429,
                "Too many pictures are on their way",
                where=f"body: expected room for {expected} bytes, got {self.limit_bytes - self.held_bytes}",
                fix="come again in a while",
                code="bodies_full",
                retry_after_s=5,
            )
        self.held_bytes += expected
        try:
            try:
                data = await asyncio.wait_for(_whole(request), limits.BODY_SECONDS)
            except asyncio.TimeoutError:
                raise Refused(
                    408,
                    "The body did not arrive in time",
                    where=f"body: expected it within {limits.BODY_SECONDS:g} s",
                    fix="send it faster, or send less",
                    code="body_timeout",
                ) from None
            self.held_bytes += len(data) - expected
            expected = len(data)
            yield data
        finally:
            self.held_bytes -= expected


async def _whole(request: Request) -> bytes:
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > limits.BODY_LIMIT_BYTES:
            raise _too_large(len(data))
    return bytes(data)


async def drain(request: Request) -> None:
    """Read on and forget what a refused client still sends: it reads an answer when it has sent all."""

    async def forget() -> None:
        left = DRAIN_LIMIT_BYTES
        async for chunk in request.stream():
            left -= len(chunk)
            if left < 0:
                return

    with contextlib.suppress(asyncio.TimeoutError, ClientDisconnect, RuntimeError):
        await asyncio.wait_for(forget(), DRAIN_SECONDS)


async def fields_of(request: Request, data: bytes, *, forms: bool) -> Fields:
    """The fields of a body in JSON, or, where `forms` are taken, in multipart. Raises Refused."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        return Fields(_object(data))
    if forms and kind == "multipart/form-data":
        return Fields(await _form(request, data), of_form=True)
    wanted = "application/json" + (" or multipart/form-data" if forms else "")
    raise Refused(
        415,
        "This kind of body is not read here",
        where=f"content-type: expected {wanted}, got {kind[:60] or 'none'}",
        fix=f"send such a body, with the header Content-Type: {wanted.partition(' ')[0]}",
        code="unsupported_media_type",
    )


def _object(data: bytes) -> dict[str, Any]:
    try:
        value = value_from_json(data.decode("utf-8"), where="body")
    except UnicodeDecodeError as error:
        raise _unreadable(f"UTF-8, got {error.reason} at byte {error.start}") from None
    except InputError as error:
        raise _unreadable(error.where.partition("expected ")[2]) from None
    if not isinstance(value, dict):
        raise _unreadable(f"an object, got {type(value).__name__}")
    return value


async def _form(request: Request, data: bytes) -> dict[str, Any]:
    """The fields of a form: texts, and the bytes of files. What stands there twice is a list."""

    charset = parse_options_header(request.headers["content-type"])[1].get(b"charset", b"utf-8")
    if charset.lower() not in (b"utf-8", b"utf8", b"us-ascii"):  # others decode slowly, or to no text
        raise _unreadable(f"a form in UTF-8, got {charset[:40].decode('latin-1')}")

    async def chunks() -> AsyncGenerator[bytes, None]:
        yield data

    parser = MultiPartParser(
        request.headers,
        chunks(),
        max_files=FILES_LIMIT,
        max_fields=FIELDS_LIMIT,
        max_part_size=FIELD_LIMIT_BYTES,
    )
    parser.spool_max_size = limits.BODY_LIMIT_BYTES + 1  # files of a form stay in memory
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError, AssertionError) as error:
        said = getattr(error, "message", "") or type(error).__name__
        raise _unreadable(f"multipart/form-data, got {said}") from None
    values: dict[str, Any] = {}
    try:
        for name, item in form.multi_items():
            value = await item.read() if isinstance(item, UploadFile) else item
            if name in values:
                before = values[name]
                values[name] = [*(before if isinstance(before, list) else [before]), value]
            else:
                values[name] = value
    finally:
        await form.close()
    return values


def _too_large(size: int) -> Refused:
    return Refused(
        413,
        "The body is too large",
        where=f"body: expected at most {limits.BODY_LIMIT_BYTES} bytes, got {size}",
        fix="send a smaller picture",
        code="body_too_large",
    )


def _unreadable(expected: str) -> Refused:
    return Refused(
        400,
        "The body cannot be read",
        where=f"body: expected {expected}",
        fix="send what docs/serve.md shows",
        code="invalid_body",
    )
