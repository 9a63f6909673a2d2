"""The queue is bounded and fair."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest

from engines.serve.jobs import Unit
from engines.serve.refusals import Refused
from engines.serve.waiting import Waiting


class Asked(Unit):
    """A unit with a group of its own saying."""

    @property
    def group(self):
        return self.job.group


def units(client: str, group: object = "g", count: int = 1) -> list[Unit]:
    job = SimpleNamespace(client=client, group=group, given_up=False, started=None, fail_late=lambda: None)
    return [Asked(job, i) for i in range(count)]


def put(waiting: Waiting, *args, **kwargs) -> list[Unit]:
    made = units(*args, **kwargs)
    waiting.put(made, retry_after_s=3)
    return made


def test_clients_take_turns_whatever_each_has_waiting():
    waiting = Waiting(100)
    many, few, other = put(waiting, "many", count=6), put(waiting, "few", count=2), put(waiting, "other")
    assert waiting.take(4) == [many[0], few[0], other[0], many[1]] or waiting is None
    assert waiting.take(10) == [few[1], many[2], many[3], many[4], many[5]]


def test_only_the_same_settings_are_taken_together_and_others_keep_their_turn():
    waiting = Waiting(100)
    a, b, c = put(waiting, "a", "x", count=2), put(waiting, "b", "y"), put(waiting, "c", "x")
    assert waiting.take(8) == [a[0], c[0], a[1]]
    assert waiting.take(8) == b


def test_an_answer_is_alone():
    waiting = Waiting(100)
    first, second = put(waiting, "a", None), put(waiting, "b", None)
    assert waiting.take(8) == first and waiting.take(8) == second


def test_what_has_no_room_is_refused_as_a_whole():
    waiting = Waiting(3)
    put(waiting, "a", count=2)
    with pytest.raises(Refused) as caught:
        put(waiting, "b", count=2)
    assert caught.value.status == 429 and caught.value.retry_after_s == 3 and len(waiting) == 2
    put(waiting, "b")


def test_what_nobody_waits_for_makes_room():
    waiting = Waiting(2)
    (gone,), (stays,) = put(waiting, "a"), put(waiting, "b")
    gone.job.given_up = True
    (new,) = put(waiting, "c")
    assert waiting.take(8) == [stays, new]


def test_a_closed_queue_hands_back_what_waits_and_lets_nothing_in():
    waiting = Waiting(10)
    left, taken = put(waiting, "a", count=2), []
    thread = threading.Thread(target=lambda: [taken.append(waiting.take(1)) for _ in range(3)])
    thread.start()
    time.sleep(0.05)
    assert waiting.close() == []
    thread.join(5)
    assert taken == [[left[0]], [left[1]], []]
    with pytest.raises(Refused) as caught:
        put(waiting, "a")
    assert caught.value.status == 503


def test_a_closed_queue_keeps_the_rest_of_what_was_begun():
    waiting = Waiting(10)
    begun, other = put(waiting, "a", count=3), put(waiting, "b")
    assert waiting.take(1) == begun[:1]
    begun[0].job.started = 1.0
    assert waiting.close() == other and len(waiting) == 2
    assert waiting.take(8) == begun[1:] and waiting.take(8) == []


def test_a_place_counts_who_comes_before():
    waiting = Waiting(100)
    first, second = put(waiting, "a", count=5), put(waiting, "b")
    assert waiting.before(first[0]) <= 1 and waiting.before(second[0]) == 1 and waiting.before(first[4]) == 5
