"""Requests that are no requests: `python -m tests.fuzz request --runs 10000` sends more of them."""

from __future__ import annotations

import numpy as np
import pytest

from tests.fuzz.requests import ALIVE, mutated_request, seeds, send_to_a_server


def test_mutated_requests_are_answered_or_dropped_and_the_server_goes_on():
    send, rng, good = send_to_a_server(), np.random.default_rng(0), seeds()
    for request in good:
        send(request)
    for i in range(150):
        send(mutated_request(good[i % len(good)], rng))


def test_a_bug_would_be_seen(monkeypatch):
    from engines.serve import endpoints

    send = send_to_a_server()
    send(ALIVE)
    monkeypatch.setattr(endpoints, "image_request", lambda *_, **__: 1 / 0)
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        send(seeds()[0])
