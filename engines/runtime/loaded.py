"""The components of a bundle that are loaded, within a budget of memory if there is one.

Components are opened on first use and kept. With a budget, those that were used longest ago are given back
when others need their memory, and are opened again when they are needed again. Where even one of them is too
large for the budget, its parts are loaded in turn, if it is one that may be. What cannot succeed is refused
before anything is opened.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..bundle.reader import Bundle
from ..errors import InputError, MissingError, UsageError
from ..fit.machine import check_memory, sized
from ..fit.memory import PART_BY_PART, Use, loop_bytes, part_bytes, task_memory, weight_bytes
from ..fit.sizes import sizes_from_bundle
from ..fit.window import window_for
from ..sessions import (
    EXACT,
    ON_CPU,
    ONE_PATH,
    Session,
    free_memory,
    open_in_turn,
    open_sessions,
    plan_capacity,
)

FIX = "use a bundle of a smaller precision, fewer images, a smaller window or a shorter prompt"


class Loaded:
    """The open sessions of `bundle` on `backend`.

    `memory_bytes` bounds the weights, caches and buffers that are held at a time; None keeps all that was
    opened. `threads` is that of `engines.sessions.open_session`.
    """

    def __init__(
        self, bundle: Bundle, *, backend: str, memory_bytes: int | None = None, threads: int | None = None
    ):
        if memory_bytes is not None and memory_bytes < 1:
            raise UsageError(
                "memory is out of range",
                where=f"memory: expected at least 1 byte, got {memory_bytes}",
                fix="omit it to keep every component loaded",
            )
        self.bundle, self.backend, self.memory_bytes, self.threads = bundle, backend, memory_bytes, threads
        self.sizes, self.on_cpu = sizes_from_bundle(bundle), backend in ON_CPU
        self.exact = backend == EXACT or bundle.manifest.precision in ONE_PATH
        self.open: dict[str, Session] = {}  # the one used longest ago first
        self.in_turn: set[str] = set()  # components whose parts are loaded in turn
        self.closed = False

    def close(self) -> None:
        """Close all sessions. The object cannot be used again."""
        self.closed = True
        self._give_back(list(self.open))

    def sessions(self, *components: str, use: Use | None = None) -> list[Session]:
        """The sessions of `components`, which are needed at the same time, for a loop that is used as `use`.

        Raises MissingError for those that do not fit, and InputError after `close`.
        """
        if self.closed:
            raise InputError(
                "This runtime is closed",
                where=f"{self.bundle.path}: expected an open runtime, got a closed one",
                fix="open the bundle again: Star(bundle)",
            )
        buffers = loop_bytes(self.sizes, components, use) if use else 0
        self._choose(components, buffers)
        missing = [name for name in components if name not in self.open]
        missing.sort(key=lambda name: self._weights([name]), reverse=True)  # loading takes more for a moment
        if self.memory_bytes is not None:
            self._check_budget(self._weights(components) + buffers, components)
            for name in list(self.open):
                if self._weights({*self.open, *components}) + buffers > self.memory_bytes:
                    self._give_back([name] if name not in components else [])
        if missing:
            self._check_free(self._weights(missing) + buffers, f"load {', '.join(missing)}", FIX)
        at_once = [name for name in missing if name not in self.in_turn]
        opened = open_sessions(self.bundle, at_once, backend=self.backend, threads=self.threads)
        for name in self.in_turn.intersection(missing):
            opened[name] = open_in_turn(self.bundle, name, backend=self.backend, threads=self.threads)
        for name in components:
            self.open[name] = opened.get(name) or self.open.pop(name)
        return list(map(self.open.__getitem__, components))

    def open_at_once(self, *components: str, use: Use) -> None:
        """Open what a task begins with, all at once; with a budget it is opened when it is needed instead."""
        if self.memory_bytes is None:
            self.sessions(*components, use=use)

    def capacity(self, decoder: str) -> int | None:
        """The slots that the decoder's caches have, where a plan or network fixes them."""
        if self.backend.startswith("interpreter"):
            return self.sessions(decoder)[0].capacity_tokens
        return plan_capacity(self.bundle, self.bundle.parts(decoder)[0], backend=self.backend)

    def window(self, *, rows: int) -> int:
        """How many tokens of an image a forward should draw on this backend."""
        if self.backend.startswith("interpreter"):
            return 1  # it takes as long for each
        return min(window_for(self.sizes, rows=rows, on_cpu=self.on_cpu), self.sizes.model.image_tokens)

    def use(self, *, rows: int, tokens: int, prompt_tokens: int, window_tokens: int = 1) -> Use:
        """What a loop of `rows` rows over `tokens` slots after a prompt takes, on this backend."""
        return Use(
            rows=rows,
            capacity_tokens=tokens,
            prefill_tokens=prompt_tokens,
            window_tokens=window_tokens,
            on_cpu=self.on_cpu,
            exact=self.exact,
        )

    def check(self, task: str, use: Use) -> None:
        """Refuse a task that cannot succeed, before anything is loaded for it. Raises MissingError."""
        taken = task_memory(self.sizes, task, use)
        if self.memory_bytes is not None:
            self._check_budget(taken.in_turn_bytes, taken.largest)
            held = self._weights(self.open)  # could be given back
            self._check_free(taken.in_turn_bytes - held, task, FIX)
        else:
            held = self._weights(name for name in self.open if name in taken.components)
            in_turn = f"load components in turn: --memory {taken.in_turn_bytes}, or {FIX}"
            self._check_free(taken.resident_bytes - held, task, in_turn)

    def _choose(self, components: tuple[str, ...], buffers: int) -> None:
        """Choose which of `components` are loaded part by part, and give back those that were not so."""
        before = self.in_turn & set(components)
        self.in_turn -= before
        if self.memory_bytes is not None and self._weights(components) + buffers > self.memory_bytes:
            self.in_turn |= {name for name in components if name in PART_BY_PART}
        changed = before ^ (self.in_turn & set(components))
        self._give_back([name for name in changed if name in self.open])

    def _weights(self, components: Iterable[str]) -> int:
        held = {"on_cpu": self.on_cpu, "exact": self.exact}
        return sum(
            (part_bytes if name in self.in_turn else weight_bytes)(self.sizes, name, **held)
            for name in components
        )

    def _give_back(self, names: list[str]) -> None:
        for name in names:
            self.open.pop(name).close()

    def _check_budget(self, needed_bytes: int, components: Iterable[str]) -> None:
        if self.memory_bytes is not None and needed_bytes > self.memory_bytes:
            raise MissingError(
                "The memory budget is too small",
                where=f"memory: expected at least {sized(needed_bytes)} for {', '.join(components)}, "
                f"got {sized(self.memory_bytes)}",
                fix=f"give a larger budget, or {FIX}",
            )

    def _check_free(self, needed_bytes: int, what: str, fix: str) -> None:
        free = free_memory(self.backend)
        if free is not None:
            check_memory(needed_bytes, what=what, fix=fix, where=self.backend, free_bytes=free)
