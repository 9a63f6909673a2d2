"""Mutations of bytes and of JSON values, deterministic for a generator."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np

from engines.bundle.seal import CONTENT, sealed_json

TOKENS = (
    b"\0",
    b"\xff" * 8,
    b"9" * 400,
    b"-1",
    b"1e999",
    b"NaN",
    b"true",
    b"null",
    b"[" * 2000,
    b'"',
    b"{}",
    b"\\",
)
VALUES = (
    0,
    -1,
    1,
    2**31,
    2**63,
    10**30,
    10**400,
    0.5,
    1e308,
    True,
    False,
    None,
    "",
    "x" * 1000,
    "..",
    "/",
    "\0",
    [],
    {},
    [[]],
)


def mutated_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    """A few bits flipped, bytes removed or repeated, or a token put in between."""
    made = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        at = int(rng.integers(0, len(made) + 1))
        kind = int(rng.integers(0, 5))
        if kind == 0 and at < len(made):
            made[at] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1:
            del made[at : at + int(rng.integers(1, 64))]
        elif kind == 2:
            made[at:at] = TOKENS[int(rng.integers(0, len(TOKENS)))]
        elif kind == 3:
            end = at + int(rng.integers(1, 64))
            made[at:at] = made[at:end]
        elif at < len(made):
            made[at] = int(rng.integers(0, 256))
    return bytes(made)


def mutated_json(data: bytes, rng: np.random.Generator) -> bytes:
    """One to three values of a JSON text replaced, removed, renamed or doubled; now and then its bytes."""
    if rng.random() < 0.2:
        return mutated_bytes(data, rng)
    whole = copy.deepcopy(json.loads(data))
    for _ in range(int(rng.integers(1, 4))):
        places = list(_places(whole))
        if not places:
            break
        holder, key = places[int(rng.integers(0, len(places)))]
        kind = int(rng.integers(0, 4))
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[f"{key}x"] = holder.pop(key)
        elif kind == 2 and isinstance(holder[key], str) and holder[key]:
            holder[key] = mutated_bytes(holder[key].encode(), rng).decode(errors="replace")
        else:
            holder[key] = VALUES[int(rng.integers(0, len(VALUES)))]
    return json.dumps(whole, ensure_ascii=bool(rng.integers(0, 2))).encode("utf-8", "surrogatepass")


def mutated_record(data: bytes, rng: np.random.Generator) -> bytes:
    """The same of a record that has a hash of its own, which is right again in most."""
    made = mutated_json(data, rng)
    if rng.random() < 0.2:
        return made
    try:
        contents = json.loads(made)
        return sealed_json({key: value for key, value in contents.items() if key != CONTENT}).encode()
    except (ValueError, AttributeError, RecursionError):
        return made


def _places(value: Any):
    """Every (container, key) below a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield value, key
        yield from _places(item)
