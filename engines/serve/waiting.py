"""The queue: bounded, and fair between clients, who take turns whatever each of them has waiting."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Sequence

from .jobs import Unit
from .refusals import Refused


class Waiting:
    """Units that wait, by client; for many threads. At most `limit` wait."""

    def __init__(self, limit: int):
        self.limit, self.closed = limit, False
        self._clients: OrderedDict[str, deque[Unit]] = OrderedDict()  # whose turn is next comes first
        self._changed = threading.Condition()

    def __len__(self) -> int:
        with self._changed:
            return self._count()

    def put(self, units: Sequence[Unit], *, retry_after_s: int) -> None:
        """Add the units of one job. Raises Refused, with all of them left out, when they have no room."""
        with self._changed:
            if self.closed:
                raise stopping()
            self._forget()
            if self._count() + len(units) > self.limit:
                raise Refused(
                    429,
                    "The queue is full",
                    where=f"queue: expected room for {len(units)}, got {self.limit - self._count()} of "
                    f"{self.limit}",
                    fix=f"come again in {retry_after_s} s",
                    code="queue_full",
                    retry_after_s=retry_after_s,
                )
            self._clients.setdefault(units[0].job.client, deque()).extend(units)
            self._changed.notify()

    def take(self, most: int) -> list[Unit]:
        """Wait for units, and take those that are next and can be drawn together, at most `most`; none when
        the queue is closed and empty.

        The first one decides the group. Then each client in turn gives one of that group.
        """
        with self._changed:
            while not self._clients:
                if self.closed:
                    return []
                self._changed.wait()
            first = next(iter(self._clients.values())).popleft()
            taken = [first]
            self._to_the_end(first.job.client)
            if first.group is None:
                return taken
            found = True
            while found and len(taken) < most:
                found = False
                for client in list(self._clients):
                    unit = next((u for u in self._clients[client] if u.group == first.group), None)
                    if unit is not None and len(taken) < most:
                        self._clients[client].remove(unit)
                        self._to_the_end(client)
                        taken.append(unit)
                        found = True
            return taken

    def before(self, unit: Unit) -> int:
        """About how many units come before this one."""
        with self._changed:
            own = self._clients.get(unit.job.client, deque())
            place = own.index(unit) if unit in own else 0
            return sum(min(len(units), place + 1) for units in self._clients.values()) - 1

    def close(self) -> list[Unit]:
        """Let nothing in any more. Returns what was waiting, but for the rest of a job that was begun, which
        may still be taken."""
        with self._changed:
            self.closed = True
            left = [unit for units in self._clients.values() for unit in units if unit.job.started is None]
            for client, units in list(self._clients.items()):
                self._clients[client] = deque(unit for unit in units if unit.job.started is not None)
                if not self._clients[client]:
                    del self._clients[client]
            self._changed.notify_all()
            return left

    def _count(self) -> int:
        return sum(map(len, self._clients.values()))

    def _forget(self) -> None:
        """Drop what nobody waits for any more."""
        for client in list(self._clients):
            kept = deque(unit for unit in self._clients[client] if not unit.job.given_up)
            gone = [unit.job for unit in self._clients[client] if unit.job.given_up]
            self._clients[client] = kept
            for job in gone:
                job.fail_late()
            if not kept:
                del self._clients[client]

    def _to_the_end(self, client: str) -> None:
        self._clients.move_to_end(client)
        if not self._clients[client]:
            del self._clients[client]


def stopping(*, begun: bool = False) -> Refused:
    """The refusal of a request that a stopping server has not `begun`, or does not finish."""
    drawn = "it was begun and not finished" if begun else "nothing was drawn for this request"
    return Refused(
        503,
        "The server is stopping",
        where=f"server: expected a running server, got one that ends; {drawn}",
        fix="send it to another server, or repeat it later",
        code="stopping",
        retry_after_s=5,
    )
