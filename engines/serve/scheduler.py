"""The thread that owns the model: it takes what waits, draws it together, and tells what happens.

No request harms another: what fails while it is prepared fails alone, and of a batch that fails each image is
drawn once more by itself.
"""

from __future__ import annotations

import functools
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from ..errors import StarError
from ..fit.machine import give_back_memory
from ..inputs.image_io import image_from_bytes
from ..progress import Progress
from ..runtime.decode import Watch
from ..runtime.painting import Painting
from ..runtime.painting import Preview as OnPreview
from .jobs import Answered, Finished, Job, Preview, Spoken, Unit
from .metrics import Metrics
from .pictures import with_rows
from .refusals import Refused, refusal
from .requests import ChatRequest, ImageRequest
from .waiting import Waiting, stopping

OnToken = Callable[[int], None]


class Model(Protocol):
    """What the thread asks of a model: `engines.runtime.together.Together`, or a test's stand-in."""

    def generation(
        self,
        prompt: str,
        *,
        reason: bool = ...,
        max_new_tokens: int = ...,
        on_token: OnToken | None = ...,
        painting: Painting | None = ...,
    ) -> Any: ...

    def editing(self, image: np.ndarray, instruction: str, *, painting: Painting | None = ...) -> Any: ...

    def draw(
        self,
        prepared: Sequence[Any],
        seeds: Sequence[int] | None,
        *,
        guidance: float,
        top_k: int,
        top_p: float,
        window: int | None = ...,
        watch: Watch | None = ...,
    ) -> Any: ...

    def images(self, image_ids: np.ndarray) -> np.ndarray: ...

    def paint(
        self,
        prepared: Any,
        image_ids: np.ndarray,
        *,
        seed: int,
        progress: Progress = ...,
        preview: OnPreview | None = ...,
    ) -> np.ndarray: ...

    def answer(
        self, image: np.ndarray | None, question: str, *, max_new_tokens: int, on_token: OnToken | None = ...
    ) -> Any: ...

    def text(self, ids: Sequence[int]) -> str: ...


class GivenUp(Exception):
    """Raised inside a draw for which nobody waits any more: it ends within a step."""


class Scheduler:
    """Runs `model` in a thread of its own on what is in `waiting`, at most `images` at a time.

    `check` raises Refused where nothing may be drawn, because the bundle changed under the server. `report`
    is given the traceback of a bug of ours.
    """

    def __init__(
        self,
        model: Model,
        waiting: Waiting,
        metrics: Metrics,
        *,
        images: int,
        check: Callable[[], None] = lambda: None,
        report: Callable[[str], None] = lambda text: None,
    ):
        self.model, self.waiting, self.metrics, self.images = model, waiting, metrics, images
        self.check, self.report = check, report
        self.seconds_per_unit = 1.0  # measured as it goes
        self.drawing: list[Unit] = []
        self._hurry = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, job: Job) -> list[Unit]:
        """Let a job wait for its turn. Raises Refused when the queue is full or closed."""
        count = job.request.count if isinstance(job.request, ImageRequest) else 1
        job.left = count
        units = [Unit(job, i) for i in range(count)]
        self.waiting.put(units, retry_after_s=self.retry_after_s())
        return units

    def retry_after_s(self) -> int:
        """After how many seconds the queue should have room."""
        return max(1, min(600, round(self.seconds_per_unit * max(1, len(self.waiting)) / 2)))

    def stop(self) -> None:
        """Begin no more: what waits is refused, what was begun may go on."""
        for unit in self.waiting.close():
            unit.job.fail(stopping())

    def give_up(self) -> None:
        """End what is drawn, too, within a step."""
        self._hurry = True

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread. Returns whether it ended."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while units := self.waiting.take(self.images):
            self.drawing = units
            started = time.monotonic()
            try:
                self._run_units(units)
            except BaseException as error:  # a bug of ours must not end the thread
                self._fail(units, error)
            self.drawing = []
            give_back_memory()
            each = (time.monotonic() - started) / len(units)
            self.seconds_per_unit += 0.2 * (each - self.seconds_per_unit)

    def _run_units(self, units: list[Unit]) -> None:
        alive = [unit for unit in units if not self._over(unit.job)]
        if not alive:
            return
        try:
            self.check()
        except Refused as error:
            self._fail(alive, error)
            return
        for unit in alive:
            unit.job.started = unit.job.started or time.monotonic()
        if isinstance(alive[0].job.request, ChatRequest):
            self._answer(alive[0].job, alive[0].job.request)
            return
        if ready := [unit for unit in alive if self._prepare(unit.job)]:
            self._draw(ready)

    def _prepare(self, job: Job) -> bool:
        """Make a job's prompt ready, once for all of its images. Returns whether it is."""
        request = job.request
        assert isinstance(request, ImageRequest)
        if job.prepared is None and not self._over(job):
            try:
                if request.picture is None:
                    job.prepared = self.model.generation(
                        request.prompt,
                        reason=request.reason,
                        on_token=lambda _: self._go_on([job]),
                        painting=request.painting,
                    )
                else:
                    image = image_from_bytes(request.picture, where="image")
                    job.prepared = self.model.editing(image, request.prompt, painting=request.painting)
            except Exception as error:
                self._fail([Unit(job)], error)
        return job.prepared is not None and not job.ended

    def _draw(self, units: list[Unit], *, alone: bool = False) -> None:
        """Draw one image for each unit, and hand them over."""
        requests = [unit.job.request for unit in units if isinstance(unit.job.request, ImageRequest)]
        request = requests[0]
        seeds = [u.seed for u in units if u.seed is not None and not request.greedy]
        try:
            drawn = self.model.draw(
                [unit.job.prepared for unit in units],
                seeds or None,
                **request.draw,
                window=request.window,
                watch=lambda known, ids: self._watch(units, known, ids),
            )
            # One by one: decoding takes more memory than drawing, and no less time for several at once.
            images = [self._image(unit, ids[None]) for unit, ids in zip(units, drawn.image_ids)]
        except GivenUp:
            self.metrics.add("star_draws_given_up_total")
            for unit in units:
                self._over(unit.job)
            return
        except Exception as error:
            if alone or len(units) == 1 or self._hurry:
                self._fail(units, error)
                return
            for unit in units:  # one of them may be the reason
                if not self._over(unit.job):
                    self._draw([unit], alone=True)
            return
        self.metrics.batch(len(units), forwards=drawn.forwards, tokens=drawn.image_ids.size)
        for unit, ids, image in zip(units, drawn.image_ids, images):
            self._finish(unit, ids, image, drawn.forwards, len(units))

    def _image(self, unit: Unit, ids: np.ndarray) -> np.ndarray:
        """The image of ids int64 [1, T]: decoded, or painted step by step."""
        request = unit.job.request
        assert isinstance(request, ImageRequest)
        if request.painting is None:
            return self.model.images(ids)[0]
        seed, steps = unit.seed, request.painting.steps
        assert seed is not None and steps is not None

        def progress(what: str, done: int, total: int) -> None:
            self.metrics.add("star_painting_steps_total")
            self._go_on([unit.job])

        def preview(done: int, images: Callable[[], np.ndarray]) -> None:
            self._go_on([unit.job])
            self._preview(unit, done, steps, lambda: images()[0])

        shown = preview if request.stream and request.partials else None
        (image,) = self.model.paint(unit.job.prepared, ids, seed=seed, progress=progress, preview=shown)
        self.metrics.add("star_paintings_total")
        return image

    def _finish(self, unit: Unit, ids: np.ndarray, image: np.ndarray, forwards: int, together: int) -> None:
        job = unit.job
        if job.ended:
            return
        prepared = job.prepared
        job.tell(
            Finished(
                unit.index,
                image,
                ids,
                forwards,
                together,
                prompt_tokens=prepared.embeds.shape[1],
                picture_tokens=prepared.picture_tokens,
                answer=prepared.answer,
                cut_tokens=prepared.cut_tokens,
            )
        )
        job.left -= 1
        if job.left == 0:  # never back to False: the endpoint may have ended it meanwhile
            job.ended = True

    def _watch(self, units: list[Unit], known: np.ndarray, ids: Callable[[], np.ndarray]) -> None:
        """After each step: end what nobody waits for, and send previews that are due."""
        self._go_on([unit.job for unit in units])
        for i, unit in enumerate(units):
            request = unit.job.request
            if not isinstance(request, ImageRequest) or not request.stream or request.painting:
                continue
            total = ids().shape[1]
            side, count = round(total**0.5), int(known[i])
            if not unit.job.given_up and side <= count < total:
                rows = functools.partial(self._rows, ids, i, count // side / side)
                self._preview(unit, count, total, rows)

    def _rows(self, ids: Callable[[], np.ndarray], index: int, share: float) -> np.ndarray:
        (image,) = self.model.images(ids()[index : index + 1])
        return with_rows(image, share)

    def _preview(self, unit: Unit, done: int, total: int, image: Callable[[], np.ndarray]) -> None:
        """Send a preview of an image of which `done` of `total` is done, if one is due."""
        assert isinstance(unit.job.request, ImageRequest)
        sent, passed = unit.job.previews.get(unit.index, (0, 0))
        share = done * (unit.job.request.partials + 1) // total  # in steps from preview to preview
        if share > passed:
            unit.job.previews[unit.index] = sent + 1, share
            unit.job.tell(Preview(unit.index, sent, image()))

    def _answer(self, job: Job, request: ChatRequest) -> None:
        ids: list[int] = []
        said = ""

        def on_token(id: int) -> None:
            nonlocal said
            self._go_on([job])
            ids.append(id)
            if request.stream:
                text = self.model.text(ids)
                if text.startswith(said) and len(text) > len(said) and not text.endswith("\ufffd"):
                    job.tell(Spoken(text[len(said) :]))
                    said = text

        try:
            image = None if request.picture is None else image_from_bytes(request.picture, where="image")
            answer = self.model.answer(
                image, request.question, max_new_tokens=request.tokens, on_token=on_token
            )
        except GivenUp:
            self.metrics.add("star_draws_given_up_total")
            self._over(job)
            return
        except Exception as error:
            self._fail([Unit(job)], error)
            return
        self.metrics.add("star_answers_total")
        self.metrics.add("star_answer_tokens_total", len(answer.ids))
        if not job.ended:
            if request.stream and answer.text.startswith(said) and len(answer.text) > len(said):
                job.tell(Spoken(answer.text[len(said) :]))
            job.tell(Answered(answer.text, answer.ids, answer.prompt_tokens, answer.stopped))
            job.ended = True

    def _go_on(self, jobs: Sequence[Job]) -> None:
        """Raise GivenUp if nobody waits for any of `jobs`."""
        if self._hurry or all(job.given_up for job in jobs):
            raise GivenUp

    def _over(self, job: Job) -> bool:
        """Whether a job has ended, or must end now."""
        if self._hurry:
            job.fail(stopping(begun=job.started is not None))
        elif not job.cancelled and time.monotonic() > job.deadline:
            job.fail_late()
        return job.given_up

    def _fail(self, units: Sequence[Unit], error: BaseException) -> None:
        if isinstance(error, GivenUp):
            for unit in units:
                self._over(unit.job)
            return
        try:
            self.check()  # a file of the bundle that changed explains other errors
        except Refused as reason:
            error = reason
        if not isinstance(error, StarError):
            self.report("".join(traceback.format_exception(error)))
        for unit in units:
            unit.job.fail(refusal(error))
