"""A decoder against itself: steps of one token must give what one prefill gives, and nothing else may be read or written.

The prefill is anchored by the golden tensors; from there these runs reach every slot of the capacity. Unused slots hold poison,
of another sign in each run, so whatever leaks differs. Knows nothing of bundles or reports.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from engines.bundle.manifest import ComponentSpec
from engines.bundle.tensors import bound_tensors
from engines.runtime.kv_cache import cache_buffers

from ..golden.cases import POISON, Tensors
from ..golden.compare import Comparison, VacuousError, compare
from ..golden.run_case import array_dtype, compare_caches, placed, read_caches

Tick = Callable[[], None]


class Decoder:
    """A decoder session with caches of its own: [rows,KV,capacity,D] each, filled with `poison`."""

    def __init__(self, session, *, rows: int, capacity_tokens: int, poison: float):
        self.session, self.rows, self.steps = session, rows, {}
        self.buffers = cache_buffers(session, rows=rows, capacity_tokens=capacity_tokens)
        for buffer in self.buffers.values():
            buffer.write(np.full(buffer.shape, poison, array_dtype(buffer.dtype)))

    def run(self, inputs_embeds: np.ndarray, write_indices: np.ndarray) -> np.ndarray:
        """Write and attend at `write_indices` [B]: inputs_embeds [B,S,H] -> hidden states [B,S,H] float32."""
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
        """Copies of all caches under their `present.` names."""
        return read_caches(self.buffers)


def check_decoder(
    session,
    *,
    tokens: int,
    capacity_tokens: int,
    tolerances: Mapping[str, float],
    seed: int,
    chunk_tokens: int | None = None,
    tick: Tick = lambda: None,
) -> dict[str, list[Comparison]]:
    """All of this module on one decoder session, by check. `tokens` is at most the prefill limit and the capacity, as is
    `chunk_tokens`, in which the capacity is filled (`tokens` by default); `tick` is called after each step (2 * `tokens` in all). A prefill that writes nothing proves nothing: here that is the candidate's fault.
    """
    common = {"tokens": tokens, "capacity_tokens": capacity_tokens, "tolerances": tolerances, "seed": seed}
    checks = {
        "two rows against one": lambda: check_rows(session, **common),
        "steps against prefill, B=1": lambda: check_rollout(
            session, rows=1, chunk_tokens=chunk_tokens, tick=tick, **common
        ),
        "steps against prefill, B=2": lambda: check_rollout(
            session, rows=2, chunk_tokens=chunk_tokens, tick=tick, **common
        ),
    }
    results = {}
    for name, check in checks.items():
        try:
            results[name] = check()
        except VacuousError as error:
            results[name] = [Comparison("prefill", math.nan, 0.0, error.where)]
    return results


def check_rollout(
    session,
    *,
    rows: int,
    tokens: int,
    capacity_tokens: int,
    tolerances: Mapping[str, float],
    seed: int,
    chunk_tokens: int | None = None,
    tick: Tick = lambda: None,
) -> list[Comparison]:
    """`tokens` steps of one token against one prefill of as many, then a rewind, then the last slot of the capacity.

    `rows` 1 or 2, `tokens` at most the session's prefill limit and at most `capacity_tokens`. Results are named by step.
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
    session, *, tokens: int, capacity_tokens: int, tolerances: Mapping[str, float], seed: int
) -> list[Comparison]:
    """The first of two rows against the same row alone: a prefill of `tokens`."""
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
    """Write another token at an earlier slot, a different one in each row: what lies behind it must not be read."""
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
    session, capacity_tokens: int, *, rows: int, chunk: int, seed: int, tolerances: Mapping[str, float]
) -> list[Comparison]:
    """Fill the whole capacity in chunks; the token in the last slot must not depend on how it got there."""
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
    hidden = next(t for t in spec.inputs if t.name == "inputs_embeds").shape[-1]
    return np.random.Generator(np.random.Philox(seed)).standard_normal(
        (rows, tokens, hidden), dtype=np.float32
    )
