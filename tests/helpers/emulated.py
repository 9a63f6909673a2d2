"""The kernels on emulated GPU blocks, built by the machine's C++ compiler, on numpy arrays."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from ml_dtypes import bfloat16

from engines.runtime.kv_cache import (
    codes_from_rows,
    int8_cache_from_rows,
    kv_cache_attention,
    rows_from_int8_cache,
)

ROOT = Path(__file__).parents[2]
HERE = ROOT / "tests" / "plugins"  # the C++ around the kernels
SOURCES = ROOT / "engines" / "plugins"
ELEMENTS = (np.float16, bfloat16)
UNIT = {np.float16: 2.0**-11, bfloat16: 2.0**-8}  # half a unit in the last place of 1
RANDOM_SHAPES = 2000
GUARD = 64  # elements before and after every array; they must stay as they are


@dataclass(frozen=True)
class Case:
    """One call. `first` are the write indices; `processors` and `seed` are what the emulator pretends."""

    rows: int
    heads: int
    kv_heads: int
    new: int
    capacity: int
    dim: int
    first: tuple[int, ...]
    element: int = 1
    int8: bool = False
    processors: int = 16
    seed: int = 0


def compiler() -> str:
    """The C++ compiler's path; the test is skipped where there is none."""
    found = shutil.which("g++") or shutil.which("c++")
    if not found:
        pytest.skip("no C++ compiler (g++) on this machine")
    return found


FLAGS = (
    "-std=c++17",
    "-U_FORTIFY_SOURCE",
    "-fPIC",
    "-shared",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-DSTAR_EMULATED",
    f"-I{HERE}",
)


def built(sources: Path, *more: str) -> ctypes.CDLL:
    """The driver compiled with the kernels in `sources` and loaded."""
    with tempfile.TemporaryDirectory(prefix="star-emulated-") as folder:
        out = Path(folder) / "libemulated.so"
        subprocess.run(
            [compiler(), *FLAGS, f"-I{sources}", *more, str(HERE / "host_driver.cpp"), "-o", str(out)],
            check=True,
        )
        loaded = ctypes.CDLL(str(out))
    number = ctypes.c_int
    loaded.star_emulate.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        number,
        number,
        ctypes.c_float,
        number,
        ctypes.c_uint,
    ]
    return loaded


@functools.cache
def library() -> ctypes.CDLL:
    """The driver with the kernels as they are, once per process."""
    return built(SOURCES, "-O2")


def guarded(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A copy of `array` with GUARD elements on both sides, and the view without them."""
    whole = np.full(array.size + 2 * GUARD, 77, array.dtype)
    inner = whole[GUARD:-GUARD].reshape(array.shape)
    inner[...] = array
    return whole, inner


def arrays(case: Case, rng: np.random.Generator) -> list[np.ndarray]:
    """query, key, value, past key, past value; cache slots not written before the call are NaN."""
    kind, (b, h, kv, s, c, d) = (
        ELEMENTS[case.element],
        (case.rows, case.heads, case.kv_heads, case.new, case.capacity, case.dim),
    )

    def normal(*shape):
        return rng.standard_normal(shape, np.float32).astype(kind)

    caches = [normal(b, kv, c, d), normal(b, kv, c, d)]
    for cache in caches:
        for row, first in enumerate(case.first):
            cache[row, :, max(first, 0) :] = np.nan
    return [normal(b, h, s, d) * kind(1.5), normal(b, kv, s, d), normal(b, kv, s, d), *caches]


def inputs_of(case: Case, rng: np.random.Generator) -> list[np.ndarray]:
    """`arrays`, with int8 caches where the case has them."""
    query, key, value, *caches = arrays(case, rng)
    return [query, key, value, *(int8_cache(x, case.first) if case.int8 else x for x in caches)]


def int8_cache(rows: np.ndarray, first: tuple[int, ...]) -> np.ndarray:
    """The int8 cache of `rows`; in slots from `first` on codes are -128 and scales NaN."""
    codes, scales = codes_from_rows(np.nan_to_num(rows.astype(np.float32)))
    for row, index in enumerate(first):
        codes[row, :, max(index, 0) :], scales[row, :, max(index, 0) :] = -128, np.nan
    return int8_cache_from_rows(codes, scales)


def emulate(
    case: Case, inputs: list[np.ndarray], *, driver: ctypes.CDLL | None = None
) -> tuple[list[np.ndarray], tuple[int, int], bool]:
    """(output, key cache, value cache), (configuration, splits), whether the flag was raised."""
    query, key, value, *caches = inputs
    whole = [
        guarded(x) for x in (query, key, value, *caches, np.array(case.first, np.int64), np.zeros_like(query))
    ]
    sizes = np.array([case.rows, case.heads, case.kv_heads, case.new, case.capacity, case.dim], np.int32)
    pointers = (ctypes.c_void_p * 7)(*(inner.ctypes.data for _, inner in whole))
    run = (driver or library()).star_emulate
    result = run(
        sizes.ctypes.data,
        ctypes.addressof(pointers),
        case.element,
        case.int8,
        case.dim**-0.5,
        case.processors,
        case.seed,
    )
    assert result != -1, "the shape was refused"
    for outer, _ in whole:
        sides = np.concatenate([outer[:GUARD], outer[-GUARD:]])
        assert (sides.astype(np.float32) == 77).all(), "something outside an array was written"
    for (_, after), before in zip(whole, (query, key, value)):
        assert after.tobytes() == before.tobytes(), "an input was written"
    plan = result & ~(1 << 30)
    return [whole[6][1], whole[3][1], whole[4][1]], (plan % 16, plan // 16), bool(result >> 30 & 1)


def expected(case: Case, inputs: list[np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
    """(output, key cache, value cache) as engines/runtime/kv_cache.py defines them,
    in float64; the error allowed."""
    query, key, value, past_key, past_value = inputs
    kind, first = ELEMENTS[case.element], np.array(case.first)
    if case.int8:
        (key, kept_key), (value, kept_value) = (
            (_meaning(*codes_from_rows(x), kind), codes_from_rows(x)) for x in (key, value)
        )
        pasts = [rows_from_int8_cache(x) for x in (past_key, past_value)]
        past_key, past_value = (_meaning(*x, kind) for x in pasts)
    wide = [x.astype(np.float64) for x in (query, key, value, past_key, past_value)]
    output, present_key, present_value = kv_cache_attention(*wide, first)
    magnitude = kv_cache_attention(*wide[:2], np.abs(wide[2]), wide[3], np.abs(wide[4]), first)[0]
    caches = [present_key.astype(kind), present_value.astype(kind)]
    if case.int8:
        caches = [_written(past, kept, case) for past, kept in zip(pasts, (kept_key, kept_value))]
    # the result and every weight of the sum are rounded once; then float32 sums, and fp16's smallest steps
    return [output, *caches], 1.1 * UNIT[kind] * (np.abs(output) + magnitude) + 2e-6 * magnitude + 2.0**-22


def _meaning(codes: np.ndarray, scales: np.ndarray, kind) -> np.ndarray:
    return (codes.astype(np.float32) * scales[..., None]).astype(kind)


def _written(past, kept, case: Case) -> np.ndarray:
    codes, scales = (x.copy() for x in past)
    for row, first in enumerate(case.first):
        codes[row, :, first : first + case.new], scales[row, :, first : first + case.new] = (
            kept[0][row],
            kept[1][row],
        )
    return int8_cache_from_rows(codes, scales)


def check(case: Case, rng: np.random.Generator, *, driver: ctypes.CDLL | None = None) -> tuple[int, int]:
    """The plan of a call, once its caches are as defined bit by bit and its output is within the bound."""
    inputs = inputs_of(case, rng)
    (output, *caches), plan, raised = emulate(case, inputs, driver=driver)
    (wanted, *wanted_caches), bound = expected(case, inputs)
    assert not raised, case
    assert [x.tobytes() for x in caches] == [x.tobytes() for x in wanted_caches], f"{case}: another cache"
    error = np.abs(output.astype(np.float64) - wanted)
    assert (error <= bound).all(), f"{case}: error {(error / bound).max():.3g} times the bound"
    return plan


def random_case(rng: np.random.Generator) -> Case:
    """A case of few or many query rows, ragged write indices, both edges of the cache, and any capacity."""
    rows, kv_heads, group = (
        int(rng.integers(1, 3 if rng.random() < 0.9 else 9)),
        int(rng.integers(1, 3)),
        int(rng.integers(1, 9)),
    )
    capacity = int(rng.choice([rng.integers(1, 70), rng.integers(60, 140), rng.integers(120, 300)]))
    new = int(
        min(capacity, rng.choice([1, 1, rng.integers(1, 9), rng.integers(1, 160 // (rows * group) + 2)]))
    )
    int8 = bool(rng.random() < 0.3)
    capacity += -capacity % 4 if int8 else 0
    edges = [0, capacity - new, int(rng.integers(0, capacity - new + 1))]
    first = tuple(int(rng.choice(edges)) for _ in range(rows))
    dim, element = int(rng.choice([64, 128])), int(rng.integers(2))
    return Case(
        rows,
        kv_heads * group,
        kv_heads,
        new,
        capacity,
        dim,
        first,
        element=element,
        int8=int8,
        processors=int(rng.choice([1, 4, 16, 132])),
        seed=int(rng.integers(1 << 30)),
    )
