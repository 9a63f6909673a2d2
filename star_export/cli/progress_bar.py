"""Progress on stderr: a bar for people, sparse lines for logs, nothing for short work."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm

SILENT_S = 2.0  # a log mentions nothing that takes less
LINE_EVERY_S = 10.0


class ProgressBar(AbstractContextManager):
    """A `Progress` callback that draws a tqdm bar on a terminal and writes lines elsewhere.

    As a context manager it wipes the bar when it exits.
    """

    def __init__(self, title: str, *, shown: bool = True):
        self.title, self.shown = title, shown
        self.bar: tqdm | None = None
        self.started = self.told = time.monotonic()
        self.what = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        if not self.shown:
            return
        if sys.stderr.isatty():
            self._draw(what, done, total)
        else:
            self._tell(what, done, total)

    def __exit__(self, *exception) -> None:
        if self.bar is not None:
            self.bar.close()

    def _draw(self, what: str, done: int, total: int) -> None:
        from tqdm import tqdm

        if self.bar is None:
            self.bar = tqdm(desc=self.title, total=total, leave=False, file=sys.stderr, dynamic_ncols=True)
        self.bar.total = total
        if what != self.what:
            self.bar.set_description(f"{self.title}: {what}", refresh=False)
            self.what = what
        self.bar.n = done
        if done >= total or time.monotonic() - self.told > 0.1:  # a decode step may take a millisecond
            self.told = time.monotonic()
            self.bar.refresh()

    def _tell(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.started >= SILENT_S and (what != self.what or now - self.told >= LINE_EVERY_S):
            print(
                f"{self.title}: {what} ({done} of {total}, {now - self.started:.0f} s)",
                file=sys.stderr,
                flush=True,
            )
            self.what, self.told = what, now
