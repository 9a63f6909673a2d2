"""Steps against prefill: a right decoder passes, and each planted fault is caught and named by its step."""

from __future__ import annotations

import numpy as np
import pytest

from star_export.golden.cases import POISON, Case
from star_export.golden.run_case import run_case
from star_export.validator.rollout import check_decoder, check_longest
from tests.helpers.fake_decoder import FAULTS, LONG_FAULT, FakeDecoder, H

TOLERANCES = {"hidden_states": 2e-4, "present": 2e-4}


def all_results(session, *, tokens=12, capacity_tokens=12):
    checks = check_decoder(
        session, tokens=tokens, capacity_tokens=capacity_tokens, tolerances=TOLERANCES, seed=3
    )
    return [result for results in checks.values() for result in results]


@pytest.mark.parametrize("capacity_tokens", [12, 31], ids=["capacity = prefill", "capacity > prefill"])
def test_a_right_decoder_passes(capacity_tokens):
    results = all_results(FakeDecoder(), capacity_tokens=capacity_tokens)
    assert len(results) > 100 and all(r.passed for r in results)


@pytest.mark.parametrize("capacity_tokens", [12, 31], ids=["capacity = prefill", "capacity > prefill"])
@pytest.mark.parametrize("fault", FAULTS)
def test_each_planted_fault_is_caught(fault, capacity_tokens):
    assert not all(r.passed for r in all_results(FakeDecoder(fault), capacity_tokens=capacity_tokens))


def longest(session, *, prompt_tokens=31, capacity_tokens=31):
    return check_longest(
        session,
        prompt_tokens=prompt_tokens,
        capacity_tokens=capacity_tokens,
        chunk_tokens=min(12, prompt_tokens),
        tolerances=TOLERANCES,
        seed=3,
    )


LAST = [(27, 1), (28, 1), (29, 1), (30, 1)]


@pytest.mark.parametrize(
    "prompt_tokens, capacity_tokens, expected",
    [(31, 31, [(0, 27), *LAST]), (16, 31, [(0, 16), (16, 11), *LAST]), (2, 2, [(0, 1), (1, 1)])],
)
def test_the_longest_prompt_runs_at_once_and_steps_go_to_the_last_slot(
    prompt_tokens, capacity_tokens, expected
):
    session, runs = FakeDecoder(), []
    step = session.step

    def counting(t):
        runs.append((int(t["write_indices"][0]), t["inputs_embeds"].shape[1]))
        step(t)

    session.step = counting
    results = longest(session, prompt_tokens=prompt_tokens, capacity_tokens=capacity_tokens)
    assert len(results) == 3 and all(r.passed for r in results)
    assert runs[: len(expected)] == expected and sum(runs[-1]) == capacity_tokens


def test_a_fault_of_long_prompts_and_one_of_the_last_slot_are_caught_at_full_capacity():
    assert all(r.passed for r in all_results(FakeDecoder(LONG_FAULT), capacity_tokens=31))
    assert {r.tensor for r in longest(FakeDecoder(LONG_FAULT)) if not r.passed} == {"hidden_states"}
    failing = longest(FakeDecoder("last slot of the capacity not written"))
    assert {r.tensor for r in failing if not r.passed} >= {"hidden_states"}


def test_a_fault_is_named_by_step_and_layer():
    failing = [
        (r.place, r.tensor) for r in all_results(FakeDecoder("position off at step 5")) if not r.passed
    ]
    assert failing[0] == ("step 5", "hidden_states") and ("step 5", "present.0.key") in failing


def recorded(session, *, capacity_tokens=10):
    """A case as golden.py records one: S=3 at slots 4 and 2, poison from slot 6 on."""
    rng = np.random.default_rng(1)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    caches = {f"past_key_values.0.{part}": normal(2, 1, capacity_tokens, H) for part in ("key", "value")}
    for cache in caches.values():
        cache[:, :, 6:] = POISON
    inputs = {"inputs_embeds": normal(2, 3, H), "position_ids": np.zeros((3, 2, 3), np.int64)}
    inputs |= {"write_indices": np.array([4, 2])} | caches
    state = {name: array.copy() for name, array in inputs.items()} | {
        "hidden_states": np.zeros((2, 3, H), np.float32)
    }
    session.step(state)
    presents = {f"present.0.{part}": state[f"past_key_values.0.{part}"] for part in ("key", "value")}
    return Case(inputs, {"hidden_states": state["hidden_states"]} | presents)


@pytest.mark.parametrize("capacity_tokens", [None, 10, 17])
@pytest.mark.parametrize("cache", ["float32", "float16"])
def test_a_recorded_case_passes_in_a_cache_of_any_capacity_and_type(capacity_tokens, cache):
    tolerances = TOLERANCES if cache == "float32" else dict.fromkeys(TOLERANCES, 5e-3)
    results = run_case(
        FakeDecoder(cache=cache),
        recorded(FakeDecoder()),
        tolerances=tolerances,
        capacity_tokens=capacity_tokens,
    )
    assert [r.tensor for r in results] == ["hidden_states"] + 2 * ["present.0.key", "present.0.value"]
    assert all(r.passed for r in results)


@pytest.mark.parametrize(
    "fault",
    [
        "every row at the first row's index",
        "one slot too many is written",
        "one slot too many is read",
        "second row gets the first row's value",
    ],
)
def test_a_recorded_case_catches_faults(fault):
    results = run_case(FakeDecoder(fault), recorded(FakeDecoder()), tolerances=TOLERANCES)
    assert not all(r.passed for r in results)


def test_a_poisoned_slot_that_changed_is_named():
    results = run_case(
        FakeDecoder("one slot too many is written"), recorded(FakeDecoder()), tolerances=TOLERANCES
    )
    assert any(
        "slots that must not change (first at row 0, slot 7)" in r.place for r in results if not r.passed
    )
