"""Progress on stderr: bars for people, sparse lines for logs, nothing for short work.

The steps of the whole are one bar. What is counted within a step is another one: bytes, tokens and the like,
with their rate and the time left (`engines.progress` says how a call names its unit).
"""

from __future__ import annotations

import sys
import threading
import time
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from .outputs import text_from_bytes

if TYPE_CHECKING:
    from tqdm import tqdm

SILENT_S = 2.0  # a log mentions nothing that takes less
LINE_EVERY_S = 10.0
DRAW_EVERY_S = 0.1  # a decode step may take a millisecond
STEPS_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}]"  # unequal steps tell no time left


class ProgressBar(AbstractContextManager):
    """A `Progress` callback that draws tqdm bars on a terminal and writes lines elsewhere, from any thread.

    As a context manager it wipes the bars when it exits.
    """

    def __init__(self, title: str, *, shown: bool = True):
        self.title, self.shown = title, shown
        self.started = self.told = time.monotonic()
        self.steps: Count | None = None
        self.inner: Count | None = None  # what is counted within the current step
        self.lock = threading.Lock()

    def __call__(self, what: str, done: int, total: int) -> None:
        if not self.shown:
            return
        with self.lock:
            fresh = self._count(what, done, total)
            show = self._draw if sys.stderr.isatty() else self._tell
            show(fresh or done >= total)
            if self.inner and self.inner.done >= self.inner.total:
                self._end_inner()

    def __exit__(self, *exception) -> None:
        self._end_inner()
        if self.steps is not None:
            self.steps.close()

    def _count(self, what: str, done: int, total: int) -> bool:
        """Take in a call, and return whether it began something."""
        name, _, unit = what.rpartition(", in ")
        unit, _, remark = unit.partition(", ")
        if not name:
            fresh = self.steps is None or self.steps.what != what
            self._end_inner()
            self.steps = self.steps or Count(what, "", done, total)
            self.steps.what, self.steps.done, self.steps.total = what, done, total
            return fresh
        if self.inner and (self.inner.what, self.inner.total) == (name, total) and done >= self.inner.done:
            self.inner.done, self.inner.remark = done, remark
            return False
        self._end_inner()
        self.inner = Count(name, unit, done, total)
        self.inner.remark = remark
        return True

    def _end_inner(self) -> None:
        if self.inner is not None:
            self.inner.close()
        self.inner = None

    def _draw(self, due: bool) -> None:
        if not due and time.monotonic() - self.told < DRAW_EVERY_S:
            return
        self.told = time.monotonic()
        title = f"{self.title}: "
        for count in filter(None, (self.steps, self.inner)):
            count.draw(title + count.what)
            title = "  "

    def _tell(self, _: bool) -> None:
        """Write a line for each step, for what takes long within it, and from time to time."""
        now, counts = time.monotonic(), [count for count in (self.steps, self.inner) if count]
        begun = [self.steps, *([self.inner] if self.inner and now - self.inner.started >= SILENT_S else [])]
        due = now - self.told >= LINE_EVERY_S or any(count and count.what != count.told for count in begun)
        if now - self.started < SILENT_S or not due:
            return
        texts = [count.text(now) for count in counts]
        seconds = f"{now - self.started:.0f} s"
        print(f"{self.title}: {', '.join(texts)} [{seconds}]", file=sys.stderr, flush=True)
        self.told = now
        for count in counts:
            count.told = count.what


class Count:
    """`done` of `total`, counted in `unit`, or of steps where that is ""; on a terminal, its bar."""

    def __init__(self, what: str, unit: str, done: int, total: int):
        self.what, self.unit, self.done, self.total = what, unit, done, total
        self.first, self.started = done, time.monotonic()
        self.remark = ""  # for example `3.2 a forward`
        self.told = ""  # what the last line said of it
        self.bar: tqdm | None = None

    def text(self, now: float) -> str:
        """For example `hash base_ar: 1.2 GB of 3.4 GB, 120.0 MB/s, 00:18 left`."""
        if not self.unit:
            return f"{self.what} ({self.done} of {self.total})"
        in_bytes = self.unit == "bytes"
        done = text_from_bytes(self.done) if in_bytes else str(self.done)
        total = text_from_bytes(self.total) if in_bytes else f"{self.total} {self.unit}"
        text = f"{self.what}: {done} of {total}" + (f", {self.remark}" if self.remark else "")
        if rate := (self.done - self.first) / max(now - self.started, 1e-3):
            left = duration((self.total - self.done) / rate)
            text += (
                f", {text_from_bytes(round(rate)) if in_bytes else f'{rate:.3g} {self.unit}'}/s, {left} left"
            )
        return text

    def draw(self, title: str) -> None:
        """Draw the bar, below those that are there."""
        from tqdm import tqdm

        if self.bar is None:
            options: dict[str, Any] = {"unit": f" {self.unit}"} if self.unit else {"bar_format": STEPS_FORMAT}
            if self.unit == "bytes":
                options = {"unit": "B", "unit_scale": True}
            options |= {"leave": False, "file": sys.stderr, "dynamic_ncols": True, "mininterval": 0}
            self.bar = tqdm(total=self.total, initial=self.first, **options)
        self.bar.total = self.total
        self.bar.set_description(title, refresh=False)
        self.bar.set_postfix_str(self.remark, refresh=False)
        self.bar.n = self.done
        self.bar.refresh()

    def close(self) -> None:
        """Wipe the bar."""
        if self.bar is not None:
            self.bar.close()


def duration(seconds: float) -> str:
    """`18 s`, `2 min 36 s` or `1 h 5 min`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
