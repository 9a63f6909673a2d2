"""A decoder against itself: steps of one token must equal one prefill, and touch no other slots.

The golden tensors anchor the prefill; from there these runs reach every slot of the capacity. Unused slots
hold poison, with another sign in each of the two runs, so leaks differ. This module knows nothing of bundles
or reports.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping

import numpy as np

from engines.bundle.manifest import ComponentSpec
from engines.bundle.tensors import bound_tensors
from engines.runtime.kv_cache import cache_buffers
from engines.sessions import Buffer, Session

from ..golden.cases import POISON, Tensors
from ..golden.compare import Comparison, VacuousError, compare
from ..golden.run_case import array_dtype, compare_caches, placed, read_caches

Tick = Callable[[], None]
LAST_STEPS = 4  # single steps at the end of a full capacity
LONGEST = "longest prompt, full capacity"


class Decoder:
    """A decoder session with its own caches, each [rows,KV,capacity,D] and filled with `poison`."""

    def __init__(self, session: Session, *, rows: int, capacity_tokens: int, poison: float):
        self.session, self.rows = session, rows
        self.steps: dict[int, tuple[dict[str, Buffer], Callable[[], None]]] = {}
        self.buffers = cache_buffers(session, rows=rows, capacity_tokens=capacity_tokens)
        for buffer in self.buffers.values():
            buffer.write(np.full(buffer.shape, poison, array_dtype(buffer.dtype)))

    def run(self, inputs_embeds: np.ndarray, write_indices: np.ndarray) -> np.ndarray:
        """Write and attend at `write_indices` [B]: inputs_embeds [B,S,H] -> hidden_states [B,S,H] float32."""
        tokens = inputs_embeds.shape[1]
        positions = np.broadcast_to(write_indices[:, None] + np.arange(tokens), (3, self.rows, tokens))
        feeds = {"inputs_embeds": inputs_embeds, "position_ids": positions, "write_indices": write_indices}
        if tokens not in self.steps:
            bound = {
                t.name: self.session.buffer(feeds.get(t.name, inputs_embeds).shape, t.dtype)
                for t in bound_tensors(self.session.spec)
                if t.name not in self.buffers
            }
            self.steps[tokens] = bound, self.session.bind(self.buffers | bound)
        bound, step = self.steps[tokens]
        for name, array in feeds.items():
            bound[name].write(np.ascontiguousarray(array))
        step()
        return np.array(bound["hidden_states"].read())

    def caches(self) -> Tensors:
        """Copy all caches, under their `present.` names."""
        return read_caches(self.buffers)


def check_decoder(
    session: Session,
    *,
    tokens: int,
    capacity_tokens: int,
    tolerances: Mapping[str, float],
    seed: int,
    chunk_tokens: int | None = None,
    tick: Tick = lambda: None,
) -> dict[str, list[Comparison]]:
    """Run all checks of this module on one decoder session but `check_longest`; returns check -> results.

    `tokens`, and the `chunk_tokens` that fill the capacity (default: `tokens`), are at most the prefill limit
    and the capacity. `tick` is called after each step, 2 * `tokens` times. A prefill that writes nothing
    proves nothing, which here is the candidate's fault.
    """
    rollout = functools.partial(
        check_rollout,
        session,
        tokens=tokens,
        capacity_tokens=capacity_tokens,
        tolerances=tolerances,
        seed=seed,
        chunk_tokens=chunk_tokens,
        tick=tick,
    )
    rows = functools.partial(
        check_rows, session, tokens=tokens, capacity_tokens=capacity_tokens, tolerances=tolerances, seed=seed
    )
    checks: dict[str, Callable[[], list[Comparison]]] = {
        "two rows against one": rows,
        "steps against prefill, B=1": lambda: rollout(rows=1),
        "steps against prefill, B=2": lambda: rollout(rows=2),
    }
    return {name: _of_the_candidate(check) for name, check in checks.items()}


def _of_the_candidate(check: Callable[[], list[Comparison]]) -> list[Comparison]:
    try:
        return check()
    except VacuousError as error:
        return [Comparison("prefill", math.nan, 0.0, error.where)]


def check_longest(
    session: Session,
    *,
    prompt_tokens: int,
    capacity_tokens: int,
    chunk_tokens: int,
    tolerances: Mapping[str, float],
    seed: int,
) -> list[Comparison]:
    """Compare the longest prompt, and steps of one token to the last slot, with the same tokens in chunks.

    One row. What exceeds `prompt_tokens`, the most that a prefill takes, is a prefill of its own. Every
    hidden state and every slot must agree.
    """
    embeds = _embeds(session.spec, rows=1, tokens=capacity_tokens, seed=seed + 3)
    before_steps = capacity_tokens - min(LAST_STEPS, capacity_tokens - 1)

    def filled(poison: float, chunk: int, until: int) -> Tensors:
        decoder = Decoder(session, rows=1, capacity_tokens=capacity_tokens, poison=poison)
        starts = [*range(0, until, chunk), *range(until, capacity_tokens + 1)]
        hidden = [
            decoder.run(embeds[:, start:end], np.array([start])) for start, end in itertools.pairwise(starts)
        ]
        return {"hidden_states": np.concatenate(hidden, axis=1), **_first(decoder.caches(), capacity_tokens)}

    return _of_the_candidate(
        lambda: compare(
            filled(POISON, prompt_tokens, before_steps),
            filled(-POISON, chunk_tokens, capacity_tokens),
            tolerances=tolerances,
        )
    )


def check_rollout(
    session: Session,
    *,
    rows: int,
    tokens: int,
    capacity_tokens: int,
    tolerances: Mapping[str, float],
    seed: int,
    chunk_tokens: int | None = None,
    tick: Tick = lambda: None,
) -> list[Comparison]:
    """Compare `tokens` steps of one token with one prefill of as many, then a rewind, then the last slot.

    `rows` is 1 or 2; `tokens` is at most the session's prefill limit and `capacity_tokens`. The results'
    `place` is the step.
    """
    embeds = _embeds(session.spec, rows=rows, tokens=tokens, seed=seed)
    whole = Decoder(session, rows=rows, capacity_tokens=capacity_tokens, poison=POISON)
    hidden, caches = whole.run(embeds, np.zeros(rows, np.int64)), whole.caches()
    stepped = Decoder(session, rows=rows, capacity_tokens=capacity_tokens, poison=-POISON)
    results, before = [], stepped.caches()
    for i in range(tokens):
        at = np.full(rows, i)
        results += placed(
            f"step {i}",
            compare(
                {"hidden_states": stepped.run(embeds[:, i : i + 1], at)},
                {"hidden_states": hidden[:, i : i + 1]},
                tolerances=tolerances,
            ),
        )
        after = stepped.caches()
        written = compare_caches(
            after, caches, before=before, write_indices=at, tokens=1, tolerances=tolerances
        )
        results += placed(f"step {i}", written)
        before = after
        tick()
    results += placed("rewind", _rewind(stepped, whole, embeds, seed=seed, tolerances=tolerances))
    last = _last_slot(
        session, capacity_tokens, rows=rows, chunk=chunk_tokens or tokens, seed=seed, tolerances=tolerances
    )
    return results + placed("last slot", last)


def check_rows(
    session: Session, *, tokens: int, capacity_tokens: int, tolerances: Mapping[str, float], seed: int
) -> list[Comparison]:
    """Compare the first of two rows with the same row alone, in a prefill of `tokens`."""
    embeds = _embeds(session.spec, rows=2, tokens=tokens, seed=seed)
    one, two = (
        Decoder(session, rows=rows, capacity_tokens=capacity_tokens, poison=POISON) for rows in (1, 2)
    )
    alone, both = one.run(embeds[:1], np.zeros(1, np.int64)), two.run(embeds, np.zeros(2, np.int64))
    return compare(
        {"hidden_states": both[:1], **{n: c[:1] for n, c in _first(two.caches(), tokens).items()}},
        {"hidden_states": alone, **_first(one.caches(), tokens)},
        tolerances=tolerances,
    )


def _rewind(
    stepped: Decoder, whole: Decoder, embeds: np.ndarray, *, seed: int, tolerances: Mapping[str, float]
) -> list[Comparison]:
    """Write another token at an earlier slot, different in each row: later slots must not be read."""
    rows, tokens = embeds.shape[:2]
    at = np.linspace(tokens // 4, tokens // 2, rows, dtype=np.int64)
    new, row = _embeds(stepped.session.spec, rows=rows, tokens=1, seed=seed + 1), np.arange(rows)
    changed = embeds.copy()
    changed[row, at] = new[:, 0]
    wanted, caches = whole.run(changed, np.zeros(rows, np.int64)), whole.caches()
    before = stepped.caches()
    got = compare(
        {"hidden_states": stepped.run(new, at)},
        {"hidden_states": wanted[row, at][:, None]},
        tolerances=tolerances,
    )
    return got + compare_caches(
        stepped.caches(), caches, before=before, write_indices=at, tokens=1, tolerances=tolerances
    )


def _last_slot(
    session: Session,
    capacity_tokens: int,
    *,
    rows: int,
    chunk: int,
    seed: int,
    tolerances: Mapping[str, float],
) -> list[Comparison]:
    """Fill the capacity in chunks; the last token's result must not depend on how its slot was reached."""
    embeds = _embeds(session.spec, rows=rows, tokens=capacity_tokens, seed=seed + 2)
    whole, stepped = (
        Decoder(session, rows=rows, capacity_tokens=capacity_tokens, poison=p) for p in (POISON, -POISON)
    )
    hidden = _fill(whole, embeds, chunk=chunk)
    _fill(stepped, embeds[:, :-1], chunk=chunk)
    at, before = np.full(rows, capacity_tokens - 1), stepped.caches()
    got = compare(
        {"hidden_states": stepped.run(embeds[:, -1:], at)},
        {"hidden_states": hidden[:, -1:]},
        tolerances=tolerances,
    )
    return got + compare_caches(
        stepped.caches(), whole.caches(), before=before, write_indices=at, tokens=1, tolerances=tolerances
    )


def _fill(decoder: Decoder, embeds: np.ndarray, *, chunk: int) -> np.ndarray:
    for start in range(0, embeds.shape[1], chunk):
        hidden = decoder.run(embeds[:, start : start + chunk], np.full(decoder.rows, start))
    return hidden


def _first(caches: Tensors, tokens: int) -> Tensors:
    return {name: cache[:, :, :tokens].astype(np.float32) for name, cache in caches.items()}


def _embeds(spec: ComponentSpec, *, rows: int, tokens: int, seed: int) -> np.ndarray:
    hidden = int(next(t for t in spec.inputs if t.name == "inputs_embeds").shape[-1])
    rng = np.random.Generator(np.random.Philox(seed))
    return rng.standard_normal((rows, tokens, hidden), dtype=np.float32)
