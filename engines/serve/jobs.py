"""A request on its way between the endpoint that waits for it and the thread that owns the model."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .refusals import Refused
from .requests import ChatRequest, ImageRequest


@dataclass(frozen=True)
class Preview:
    """The `number`-th preview of the `index`-th image, uint8 [R, R, 3]."""

    index: int
    number: int
    image: np.ndarray


@dataclass(frozen=True)
class Finished:
    """The `index`-th image, uint8 [R, R, 3], of ids int64 [T], drawn in a batch of `together` images in
    `forwards`. `picture_tokens` of its `prompt_tokens` are of a picture. `cut_tokens` counts the ids of its
    prompt that the diffusion decoder could not read."""

    index: int
    image: np.ndarray
    image_ids: np.ndarray
    forwards: int
    together: int
    prompt_tokens: int
    picture_tokens: int
    answer: str | None
    cut_tokens: int = 0


@dataclass(frozen=True)
class Spoken:
    """More text of an answer."""

    text: str


@dataclass(frozen=True)
class Answered:
    """The end of an answer, whose tokens are `ids`. `stopped` if the model ended it."""

    text: str
    ids: np.ndarray
    prompt_tokens: int
    stopped: bool


@dataclass(eq=False)
class Job:
    """One request.

    The thread `tell`s what happens, and the endpoint takes it from `events` until it `ended`. Either may end
    it: the endpoint when its client has gone, the thread when all is done or failed.
    """

    request: ImageRequest | ChatRequest
    client: str
    deadline: float  # of time.monotonic()
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    cancelled: bool = False
    ended: bool = False
    started: float | None = None
    prepared: Any = None
    left: int = 0  # images that are not done
    # Image -> how many previews were sent, and up to which of all that were asked for.
    previews: dict[int, tuple[int, int]] = field(default_factory=dict)

    @property
    def given_up(self) -> bool:
        """Whether nobody waits any more."""
        return self.cancelled or self.ended or time.monotonic() > self.deadline

    def tell(self, event: Any) -> None:
        """Hand `event` to the endpoint, from any thread."""
        with contextlib.suppress(RuntimeError):  # the server has stopped
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)

    def fail(self, error: Refused) -> None:
        """End the request with an error, unless it ended already."""
        if not self.ended:
            self.ended = True
            self.tell(error)

    def fail_late(self) -> None:
        """End a request whose time is over."""
        self.fail(
            Refused(
                504,
                "The request took too long",
                where=f"deadline: {'it was being drawn' if self.started else 'it was still waiting'}",
                fix="repeat it when the server is less busy, or start that with a later --deadline",
                code="deadline_exceeded",
            )
        )


@dataclass(frozen=True)
class Unit:
    """What waits in the queue: the `index`-th image of a job, or its answer."""

    job: Job
    index: int = 0

    @property
    def seed(self) -> int | None:
        """The seed of the image, None where nothing of it is drawn with noise."""
        request = self.job.request
        return request.seed_of(self.index) if isinstance(request, ImageRequest) else None

    @property
    def group(self) -> tuple | None:
        """What units must have in common to be drawn together; None for what is drawn alone."""
        request = self.job.request
        return request.group if isinstance(request, ImageRequest) else None
