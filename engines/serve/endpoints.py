"""The endpoints that ask the model: images, edits and chat."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from ..bundle.manifest import ModelSpec
from ..inputs.image_io import image_from_bytes
from .answers import About, ChatAnswer, ImageAnswer, event
from .attendance import ALIVE, events_of
from .bodies import Bodies, fields_of
from .jobs import Answered, Finished, Job, Preview, Spoken, Unit
from .kept_files import KeptFiles
from .refusals import Refused, body_from_refusal
from .requests import ChatRequest, ImageRequest, chat_request, image_request
from .scheduler import Scheduler
from .settings import ServeSettings

STREAM = "text/event-stream; charset=utf-8"
NO_BUFFERING = {"x-accel-buffering": "no"}  # nginx would keep events back


@dataclass
class Endpoints:
    """The endpoints of one server, over one model."""

    about: About
    model: ModelSpec
    settings: ServeSettings
    scheduler: Scheduler
    files: KeptFiles
    bodies: Bodies = field(default_factory=Bodies)
    decoding: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(2))

    async def generations(self, request: Request) -> Response:
        """POST /v1/images/generations."""
        return await self._images(request, edit=False)

    async def edits(self, request: Request) -> Response:
        """POST /v1/images/edits."""
        return await self._images(request, edit=True)

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        async with AsyncExitStack() as room:
            data = await room.enter_async_context(self.bodies.read(request))
            asked = chat_request(await fields_of(request, data, forms=False))
            del data
            await self._check_picture(asked.picture)
            facts = {"prompt": asked.question, "stream": asked.stream}
            job, _ = self._submit(request, asked, asked.user, facts)
            answer = ChatAnswer(self.about, asked)
            if asked.stream:
                return EventStream(_chat_events(request, job, answer), room.pop_all())
            async with aclosing(events_of(request, job)) as events:
                async for happened in events:
                    if isinstance(happened, Answered):
                        return JSONResponse(answer.response(happened))
        raise AssertionError("a job ends with an answer or an error")

    async def _images(self, request: Request, *, edit: bool) -> Response:
        async with AsyncExitStack() as room:
            data = await room.enter_async_context(self.bodies.read(request))
            asked = image_request(await fields_of(request, data, forms=edit), self.model, edit=edit)
            del data
            await self._check_picture(asked.picture)
            facts = {"prompt": asked.prompt, "images": asked.count, "seed": asked.seed}
            job, units = self._submit(request, asked, asked.user, facts | {"stream": asked.stream})
            base = str(request.base_url)
            answer = ImageAnswer(self.about, asked, edit=edit, files=self.files, base_url=base)
            if asked.stream:
                return EventStream(self._image_events(request, job, units, answer), room.pop_all())
            finished: list[Finished] = []
            async with aclosing(events_of(request, job)) as events:
                async for happened in events:
                    if isinstance(happened, Finished):
                        finished.append(happened)
                        if len(finished) == asked.count:
                            break
        finished.sort(key=lambda done: done.index)
        items = [await asyncio.to_thread(answer.item, done) for done in finished]
        response = answer.response(finished, items)
        request.state.facts["drawn_together"] = response["star"]["drawn_together"]
        return JSONResponse(response)

    def _submit(
        self, request: Request, asked: ImageRequest | ChatRequest, user: str, facts: dict[str, Any]
    ) -> tuple[Job, list[Unit]]:
        request.state.facts.update(facts)
        client = f"{request.client.host if request.client else ''} {user}"
        deadline = time.monotonic() + self.settings.deadline_s
        job = Job(asked, client, deadline, asyncio.get_running_loop())
        return job, self.scheduler.submit(job)

    async def _check_picture(self, picture: bytes | None) -> None:
        """Refuse a picture that cannot be read now, and not when its turn comes. Raises InputError."""
        if picture is not None:
            async with self.decoding:
                await asyncio.to_thread(image_from_bytes, picture, where="image")

    async def _image_events(
        self, request: Request, job: Job, units: list[Unit], answer: ImageAnswer
    ) -> AsyncGenerator[bytes, None]:
        yield self._place(units)
        left = len(units)
        async with aclosing(events_of(request, job)) as events:
            async for happened in events:
                if happened is ALIVE:
                    yield self._place(units)
                elif isinstance(happened, Preview):
                    yield await asyncio.to_thread(answer.preview, happened)
                elif isinstance(happened, Finished):
                    item = await asyncio.to_thread(answer.item, happened)
                    yield answer.completed(happened, item)
                    left -= 1
                    if not left:
                        return

    def _place(self, units: list[Unit]) -> bytes:
        """A comment, which clients skip, and which keeps the connection alive: who comes before."""
        waiting = [unit for unit in units if unit.job.started is None]
        before = self.scheduler.waiting.before(waiting[0]) + len(self.scheduler.drawing) if waiting else 0
        return f": waiting for {before}\n\n".encode()


async def _chat_events(request: Request, job: Job, answer: ChatAnswer) -> AsyncGenerator[bytes, None]:
    yield b": waiting\n\n"
    async with aclosing(events_of(request, job)) as events:
        async for happened in events:
            if happened is ALIVE:
                yield b": waiting\n\n"
            elif isinstance(happened, Spoken):
                yield answer.chunk(happened.text)
            elif isinstance(happened, Answered):
                for chunk in answer.last_chunks(happened):
                    yield chunk
                return


class EventStream(Response):
    """Server-sent events; an error among them is the last one. `room` is given back when they end."""

    def __init__(self, events: AsyncGenerator[bytes, None], room: AsyncExitStack):
        super().__init__(media_type=STREAM, headers=NO_BUFFERING)
        del self.headers["content-length"]
        self.events, self.room = events, room

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self.room, aclosing(self.events) as events:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                async for sent in events:
                    await send({"type": "http.response.body", "body": sent, "more_body": True})
            except Refused as error:
                scope["state"]["facts"]["error"] = error.code
                body = event(body_from_refusal(error), name="error")
                await send({"type": "http.response.body", "body": body, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
