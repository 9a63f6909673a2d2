"""Requests that are no requests: `python -m tests.fuzz request --runs 10000` sends more of them."""

from __future__ import annotations

import numpy as np
import pytest

from tests.fuzz.requests import ALIVE, mutated_request, seeds, sending


def test_mutated_requests_are_answered_or_dropped_and_the_server_goes_on():
    rng, good = np.random.default_rng(0), seeds()
    with sending() as send:
        for request in good:
            send(request)
        for i in range(150):
            send(mutated_request(good[i % len(good)], rng))


def test_a_bug_would_be_seen(monkeypatch):
    from engines.serve import endpoints

    with sending() as send:
        send(ALIVE)
        monkeypatch.setattr(endpoints, "image_request", lambda *_, **__: 1 / 0)
        with pytest.raises(AssertionError, match="ZeroDivisionError"):
            send(seeds()[0])
