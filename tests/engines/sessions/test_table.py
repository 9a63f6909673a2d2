"""Rows of a memory-mapped table, dense or as codes with a scale each (docs/bad_inputs.md 57)."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from engines.bundle.manifest import TableSpec, TensorSpec
from engines.bundle.reader import Bundle
from engines.errors import InputError
from engines.sessions import open_session, run
from tests.helpers.tiny_bundle import write_manifest

NAME, PADDING = "token_embedding", 16  # bytes before the rows, as of other weights
RANDOM = np.random.default_rng(0)
ROWS = RANDOM.standard_normal((8, 4)).astype(np.float32)
CODES = RANDOM.integers(-127, 128, (8, 4)).astype(np.int8)
SCALES = RANDOM.uniform(0.01, 0.1, (8, 1)).astype(np.float32)
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def written(root: Path, rows: np.ndarray, scales: np.ndarray | None = None, **changes) -> Path:
    """A bundle with one table; `changes` are made to its entry in the manifest."""
    folder = root / NAME
    folder.mkdir(parents=True)
    data = bytes(PADDING) + rows.tobytes() + (b"" if scales is None else scales.tobytes())
    (folder / "table.data").write_bytes(data)
    (folder / "golden.safetensors").write_bytes(b"golden")
    table = TableSpec(
        file=f"{NAME}/table.data",
        offset=PADDING,
        shape=(8, 4),
        dtype=str(rows.dtype),
        golden=f"{NAME}/golden.safetensors",
        inputs=(TensorSpec("input_ids", "int64", ("B", "S")),),
        outputs=(TensorSpec("inputs_embeds", "float32", ("B", "S", 4)),),
        scales_offset=None if scales is None else PADDING + rows.nbytes,
        scales_dtype=None if scales is None else str(scales.dtype),
    )
    write_manifest(root, {}, tables={NAME: replace(table, **changes)})
    return root


def looked_up(root: Path, ids: list[list[int]]) -> np.ndarray:
    with closing(open_session(Bundle.open(root), NAME)) as session:
        return run(session, {"input_ids": np.array(ids)})["inputs_embeds"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_rows_are_widened(tmp_path: Path, dtype: str) -> None:
    stored = ROWS.astype(DTYPES[dtype])
    got = looked_up(written(tmp_path / "b", stored), [[7, 0, 3], [3, 3, 1]])
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, stored.astype(np.float32)[[[7, 0, 3], [3, 3, 1]]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantised_rows_are_their_codes_times_their_own_scale(tmp_path: Path, dtype: str) -> None:
    scales = SCALES.astype(DTYPES[dtype])
    got = looked_up(written(tmp_path / "b", CODES, scales), [[7, 0, 3], [3, 3, 1]])
    expected = CODES.astype(np.float32) * scales.astype(np.float32)
    np.testing.assert_array_equal(got, expected[[[7, 0, 3], [3, 3, 1]]])


@pytest.mark.parametrize("id", [-1, 8, 2**40])
def test_an_id_that_is_no_row_is_refused(tmp_path: Path, id: int) -> None:
    with pytest.raises(InputError, match="not a row of the table"):
        looked_up(written(tmp_path / "b", CODES, SCALES), [[id]])


@pytest.mark.parametrize(
    "changes",
    [
        {"offset": PADDING + 64},
        {"shape": (1000, 4)},
        {"dtype": "float64"},
        {"dtype": "int4"},
        {"dtype": "int64", "scales_offset": None, "scales_dtype": None},
        {"dtype": "float16"},  # which has no scales
        {"scales_offset": None},
        {"scales_dtype": None},
        {"scales_offset": PADDING + 33},
        {"scales_offset": -1},
        {"scales_dtype": "int8"},
    ],
    ids=str,
)
def test_a_table_that_does_not_lie_within_its_file_is_refused(tmp_path: Path, changes: dict) -> None:
    with pytest.raises(InputError, match="A table does not lie within its file") as caught:
        Bundle.open(written(tmp_path / "b", CODES, SCALES, **changes))
    assert NAME in caught.value.where and len(str(caught.value).splitlines()) == 3
