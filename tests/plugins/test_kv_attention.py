"""The kernels' own source, run on emulated GPU blocks, computes what engines/runtime/kv_cache.py defines.

It leaves alone unwritten slots, the memory around the arrays, and rows that do not fit. No GPU is needed;
emulator.h says what the emulator promises.
"""

from __future__ import annotations

import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from tests.helpers.emulated import (
    RANDOM_SHAPES,
    SOURCES,
    Case,
    built,
    check,
    emulate,
    inputs_of,
    library,
    random_case,
)


@pytest.mark.slow
def test_two_thousand_random_shapes_are_as_defined() -> None:
    library()

    def one(number: int) -> tuple[int, bool]:
        rng = np.random.default_rng(number)
        configuration, splits = check(random_case(rng), rng)
        return configuration, splits > 1

    with ThreadPoolExecutor(2) as pool:
        plans = Counter(pool.map(one, range(RANDOM_SHAPES)))
    for plan in (
        (0, True),
        (0, False),
        (1, True),
        (1, False),
        (2, False),
    ):  # decode, two prefill kernels; split or whole
        assert plans[plan] >= 40, plans


# heads and key heads are STAR-3B's and STAR-7B's
@pytest.mark.parametrize(
    "case",
    [
        Case(2, 16, 2, 1, 1280, 128, (1279, 640), processors=16),
        Case(2, 28, 4, 1, 640, 128, (639, 0), processors=132),
        Case(1, 16, 2, 1, 4096, 128, (4095,), int8=True, processors=8),
        Case(8, 2, 1, 1, 1100, 64, tuple(range(0, 1100, 140)), element=0),
        Case(2, 8, 1, 64, 640, 128, (0, 570), processors=16),
        Case(1, 7, 1, 1280, 1280, 128, (0,), processors=4),
        Case(1, 2, 1, 1250, 4096, 64, (2846,), element=0, processors=2),
        Case(1, 2, 2, 300, 300, 64, (0,), int8=True, processors=2),
    ],
    ids=str,
)
def test_the_shapes_of_the_models_are_as_defined(case: Case) -> None:
    check(case, np.random.default_rng(1))


def test_steps_and_a_rewind_equal_one_prefill() -> None:
    whole = Case(1, 4, 2, 12, 40, 64, (0,))
    rng = np.random.default_rng(2)
    query, key, value, *caches = inputs_of(whole, rng)
    (expected, *_), _, _ = emulate(whole, [query, key, value, *caches])
    for first, new in (
        (0, 5),
        (5, 1),
        (6, 3),
        (3, 2),
        (5, 7),
    ):  # from 6 back to 3: what lay there is written again
        part = np.s_[:, :, first : first + new]
        step = replace(whole, new=new, first=(first,))
        (output, *caches), _, _ = emulate(
            step, [np.ascontiguousarray(x[part]) for x in (query, key, value)] + caches
        )
        np.testing.assert_allclose(output.astype(np.float32), expected[part].astype(np.float32), atol=2e-2)
    assert np.isnan(caches[0][:, :, 12:].astype(np.float32)).all()


@pytest.mark.parametrize("first", [(3, 38), (-1, 3), (2**62, 3), (40, -(2**62))])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("new", [3, 40])
def test_a_row_that_does_not_fit_writes_nothing_raises_the_flag_and_gives_nan(first, int8, new) -> None:
    case = Case(2, 4, 2, new, 40, 64, first, int8=int8)
    fits = [0 <= index <= 40 - new for index in first]
    inputs = inputs_of(
        replace(case, first=tuple(min(max(index, 0), 40) for index in first)), np.random.default_rng(3)
    )
    (output, *caches), _, raised = emulate(case, inputs)
    assert raised and not all(fits)
    for row, fit in enumerate(fits):
        assert np.isnan(output[row].astype(np.float32)).all() != fit
        for after, before in zip(caches, inputs[3:]):
            assert (after[row].tobytes() == before[row].tobytes()) != fit


MUTANTS = {
    "one key too many": ("kv_attention.cuh", "if (n * 8 + e > last)", "if (n * 8 + e > last + 1)"),
    "a barrier is missing": ("kv_attention.cuh", "meet();  //", "//"),
    "unused slots are read": (
        "kv_tiles.cuh",
        "i * kStep < used ? 16 : 0",
        "i * kStep < call.shape.capacity - t * kKeys ? 16 : 0",
    ),
    "splits are not weighted": ("kv_rows.cuh", "? exp2_of(stat[i].x - highest) : 0", "? 1 : 0"),
    "new slots are read too early": (
        "kv_tiles.cuh",
        "if (has_new && !had_new)",
        "if (has_new && !had_new && t < 0)",
    ),
    "the swizzle differs": ("kv_attention.cuh", "lane / 8 % 2", "lane / 16"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_fault_is_seen(name: str, tmp_path) -> None:
    file, right, wrong = MUTANTS[name]
    sources = tmp_path / "plugins"
    shutil.copytree(SOURCES, sources, ignore=shutil.ignore_patterns("*.py", "build"))
    text = (sources / file).read_text()
    assert text.count(right) == 1
    (sources / file).write_text(text.replace(right, wrong))
    driver = built(sources, "-O0")
    with pytest.raises(AssertionError, match="times the bound|another cache"):
        for seed in range(8):
            for new, first in ((1, 150), (5, 2), (20, 100)):
                case = Case(1, 4, 1, new, 200, 64, (first,), element=0, processors=2, seed=seed)
                check(case, np.random.default_rng(4), driver=driver)
