"""The plugin between TensorRT's calls and the kernels: fields, formats, shapes, aliasing and the overflow
flag.

It runs on emulated blocks and our own declaration of TensorRT's interfaces, and is compiled against
TensorRT's own headers where the machine has them.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engines import plugins
from engines.errors import InputError
from tests.helpers.emulated import FLAGS, HERE, SOURCES, Case, compiler, expected, inputs_of

HALF, BFLOAT16 = 1, 7  # nvinfer1::DataType
HEADERS = [
    Path(p)
    for p in (
        os.environ.get("TENSORRT_ROOT", "/usr/local/TensorRT") + "/include",
        "/usr/include",
        "/usr/include/x86_64-linux-gnu",
        "/usr/include/aarch64-linux-gnu",
    )
]


@pytest.fixture(scope="module")
def library_file(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("plugin") / "libstar_plugins.so"
    sources = [str(HERE / "plugin_driver.cpp"), str(SOURCES / "plugin.cpp"), str(SOURCES / "entry.cpp")]
    subprocess.run(
        [compiler(), *FLAGS, f"-I{HERE / 'minimal'}", f"-I{SOURCES}", *sources, "-o", str(out)], check=True
    )
    return out


@pytest.fixture(scope="module")
def native(library_file) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(library_file))
    loaded.star_drive.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_float,
        ctypes.c_int,
        ctypes.c_void_p,
    ]
    return loaded


def drive(
    native, case: Case, inputs, *, type_=None, rank=4, aliased=True, processors=(16, 16), **changes
) -> tuple[int, list[np.ndarray]]:
    """The driver's answer, and (output, key cache, value cache).

    `processors` are the multiprocessors of the device that builds and of the one that runs; `changes` replace
    fields.
    """
    fields = {
        "num_heads": case.heads,
        "num_kv_heads": case.kv_heads,
        "head_dim": case.dim,
        "cache_type": int(case.int8),
    }
    fields |= changes
    scale = np.float32(fields.pop("scale", case.dim**-0.5))
    caches = [x.copy() for x in inputs[3:]]
    present = caches if aliased else [np.full_like(x, 5) for x in caches]
    output, first = np.zeros_like(inputs[0]), np.array(case.first, np.int64)
    mask = np.zeros(1, bool)  # not read
    arrays = [*inputs[:3], *caches, first, mask, output, *present]
    pointers = (ctypes.c_void_p * 10)(*(x.ctypes.data for x in arrays))
    sizes = np.array(
        [case.rows, case.heads, case.kv_heads, case.new, case.capacity, case.dim, rank, *processors], np.int32
    )
    numbers = np.array(list(fields.values()), np.int32)
    type_ = type_ or (HALF, BFLOAT16)[case.element]
    return native.star_drive(
        sizes.ctypes.data, numbers.ctypes.data, scale, type_, ctypes.addressof(pointers)
    ), [output, *present]


@pytest.mark.parametrize("aliased", [True, False], ids=["one address", "two addresses"])
@pytest.mark.parametrize(
    "case",
    [
        Case(2, 8, 2, 1, 200, 64, (150, 3)),
        Case(1, 4, 2, 33, 80, 64, (9,), element=0),
        Case(2, 4, 1, 2, 64, 128, (0, 62), int8=True),
    ],
    ids=str,
)
def test_a_layer_created_serialised_and_enqueued_is_as_defined(native, case: Case, aliased: bool) -> None:
    inputs = inputs_of(case, np.random.default_rng(0))
    status, (output, *caches) = drive(native, case, inputs, aliased=aliased)
    (wanted, *wanted_caches), bound = expected(case, inputs)
    assert status == 0 and (np.abs(output.astype(np.float64) - wanted) <= bound).all()
    assert [x.tobytes() for x in caches] == [x.tobytes() for x in wanted_caches]
    assert native.star_plugin_take_overflow() == 0


CASE = Case(1, 4, 2, 1, 64, 64, (3,))


@pytest.mark.parametrize("processors", [(2, 64), (64, 2)], ids=["more than built for", "fewer"])
def test_a_device_with_other_multiprocessors_keeps_to_the_plans_workspace(native, processors) -> None:
    """Orin modules share an architecture, and a power mode can switch multiprocessors off."""
    case = Case(2, 8, 2, 1, 600, 64, (550, 590))
    inputs = inputs_of(case, np.random.default_rng(0))
    status, (output, *_) = drive(native, case, inputs, processors=processors)
    (wanted, *_), bound = expected(case, inputs)
    assert status == 0 and (np.abs(output.astype(np.float64) - wanted) <= bound).all()


@pytest.mark.parametrize(
    "changes,stage,words",
    [
        ({"head_dim": 96}, 1, "head_dim: expected 64 or 128, got 96"),
        ({"num_kv_heads": 3}, 1, "multiple of num_kv_heads, got 4"),
        ({"num_kv_heads": 0}, 1, "num_kv_heads: expected 1 or more"),
        ({"cache_type": 2}, 1, "cache_type: expected 0 or 1, got 2"),
        ({"scale": 0.0}, 1, "scale: expected a positive number"),
        ({"scale": np.nan}, 1, "scale: expected a positive number"),
        ({"type_": 3}, 2, ""),
        ({"head_dim": 128}, 3, "head_dim"),
        ({"num_heads": 2}, 3, "num_heads, got 4"),
        ({"rank": 3}, 3, "rank of an input: expected 4, got 3"),
    ],
    ids=str,
)
def test_what_it_cannot_compute_is_refused_when_it_is_built(
    native, capfd, changes, stage: int, words: str
) -> None:
    status, _ = drive(native, CASE, inputs_of(CASE, np.random.default_rng(0)), **changes)
    assert status == stage and words in capfd.readouterr().err


@pytest.mark.parametrize(
    "case,words",
    [
        (replace(CASE, rows=9, first=(0,) * 9), "rows: expected 1 to 8"),
        (replace(CASE, capacity=4160), "capacity: expected 1 to 4096"),
        (replace(CASE, capacity=62, int8=True), "multiple of 4"),
    ],
    ids=["rows", "capacity", "int8"],
)
def test_sizes_beyond_its_limits_are_refused_with_the_limit(native, capfd, case: Case, words: str) -> None:
    inputs = (
        inputs_of(replace(case, int8=False), np.random.default_rng(0))[:3] + [np.zeros(1, np.int8)] * 2
    )  # not touched
    status, _ = drive(native, case, inputs)
    assert status == 3 and words in capfd.readouterr().err


def test_the_library_is_loaded_once_and_its_flag_becomes_an_error(native, library_file, monkeypatch) -> None:
    library = plugins.library_from_file(library_file)
    assert (library.abi, library.tensorrt) == (plugins.ABI, (1, 7))
    monkeypatch.setattr(plugins, "_LOADED", [])
    plugins._loaded.cache_clear()
    assert plugins.load(library) is plugins.load(library)
    plugins.check_overflow()
    assert drive(native, replace(CASE, first=(64,)), inputs_of(CASE, np.random.default_rng(0)))[0] == 0
    with pytest.raises(InputError, match="did not fit"):
        plugins.check_overflow()
    plugins.check_overflow()
    plugins._loaded.cache_clear()


def test_it_compiles_against_tensorrts_own_headers(tmp_path) -> None:
    found = next((folder for folder in HEADERS if (folder / "NvInferRuntime.h").is_file()), None)
    if found is None:
        pytest.skip(
            "no TensorRT headers (NvInferRuntime.h) on this machine; set TENSORRT_ROOT to where they are"
        )
    cuda = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
    for source in ("plugin.cpp", "entry.cpp"):
        flags = [
            "-std=c++17",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-fsyntax-only",
            "-isystem",
            str(found),
            "-isystem",
            str(cuda),
        ]
        subprocess.run([compiler(), *flags, str(SOURCES / source)], check=True)
