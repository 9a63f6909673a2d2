"""Waiting for a job on behalf of a client, for as long as the client is there."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request

from . import settings as limits
from .jobs import Job
from .refusals import Refused

ALIVE = object()  # nothing happened for a while


class ClientGone(Exception):
    """The client closed the connection."""


async def events_of(request: Request, job: Job) -> AsyncGenerator[Any, None]:
    """What happens to `job`, and ALIVE now and then when nothing does, until its client is gone.

    The job is given up when the iteration ends early, for whatever reason. Raises ClientGone, and Refused
    when the job failed or its time is over.
    """
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        while True:
            taking = asyncio.ensure_future(job.events.get())
            wait_s = min(limits.ALIVE_SECONDS, max(0.0, job.deadline + 1 - time.monotonic()))
            await asyncio.wait({taking, gone}, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
            if taking.done():
                event = taking.result()
                if isinstance(event, Refused):
                    raise event
                yield event
                continue
            taking.cancel()
            if gone.done():
                raise ClientGone
            if time.monotonic() > job.deadline + 1:
                job.fail_late()
            yield ALIVE
    finally:
        job.cancelled = True
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
