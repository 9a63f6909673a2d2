"""What may be bound to a component is refused by name, with expected and got."""

from types import SimpleNamespace

import numpy as np
import pytest

from engines.bundle.manifest import ComponentSpec, TensorSpec
from engines.bundle.tensors import (
    bound_tensors,
    check_array,
    check_binding,
    dtype_name,
    present_name,
    shape_from_symbols,
    symbols_of,
)
from engines.errors import InputError


def spec(inputs, outputs):
    return ComponentSpec(
        graph="x/model.onnx",
        twin=None,
        golden="x/golden.safetensors",
        inputs=tuple(TensorSpec(*t) for t in inputs),
        outputs=tuple(TensorSpec(*t) for t in outputs),
    )


def tensor(dtype, *shape):
    return SimpleNamespace(dtype=dtype, shape=shape)


HEAD = spec(
    [("hidden_states", "float32", ("2N", 1, 8)), ("noise", "float32", ("N",))],
    [("image_ids", "int64", ("N",))],
)
DECODER = spec(
    [("inputs_embeds", "float32", ("B", "S", 8)), ("past_key_values.0.key", "bfloat16", ("B", 2, "C", 4))],
    [("hidden_states", "float32", ("B", "S", 8)), ("present.0.key", "bfloat16", ("B", 2, "C", 4))],
)


def decoder_tensors():
    return {
        "inputs_embeds": tensor("float32", 2, 3, 8),
        "past_key_values.0.key": tensor("bfloat16", 2, 2, 16, 4),
        "hidden_states": tensor(np.dtype("float32"), 2, 3, 8),
    }


def test_what_fits_is_accepted_and_gives_the_axes():
    assert check_binding(DECODER, decoder_tensors()) == {"B": 2, "S": 3, "C": 16}
    fits = {
        "hidden_states": np.zeros((6, 1, 8), "float32"),
        "noise": np.zeros(3, "float32"),
        "image_ids": np.zeros(3, "int64"),
    }
    assert check_binding(HEAD, fits) == {"N": 3}
    vision = spec([("pixel_values", "float32", ("P", 6))], [("image_embeds", "float32", ("P/4", 8))])
    assert check_binding(
        vision, {"pixel_values": tensor("float32", 8, 6), "image_embeds": tensor("float32", 2, 8)}
    ) == {"P": 8}


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("noise", None, "noise: missing, expected float32[N]"),
        ("extra", tensor("float32", 1), "extra: extra"),
        ("noise", tensor("float64", 1), "noise: expected float32[N], got float64[1]"),
        ("noise", tensor(">f4", 1), "got float32 in foreign byte order"),
        ("noise", tensor("float32", 1, 1), "noise: expected float32[N], got float32[1,1]"),
        ("noise", tensor("float32", 2), "noise: expected N=1 as in hidden_states, got N=2"),
        ("hidden_states", tensor("float32", 3, 1, 8), "got size 3 for 2N"),
        ("hidden_states", tensor("float32", 2, 1, 9), "got size 9 for 8"),
        ("noise", tensor("float32", 0), "got size 0 for N"),
    ],
)
def test_each_disagreement_is_named(name, value, words):
    tensors = {
        "hidden_states": tensor("float32", 2, 1, 8),
        "noise": tensor("float32", 1),
        "image_ids": tensor("int64", 1),
    }
    tensors[name] = value
    with pytest.raises(InputError) as error:
        check_binding(HEAD, {k: v for k, v in tensors.items() if v is not None})
    assert words in error.value.where and "x/model.onnx" in error.value.where


def test_all_disagreements_are_listed_at_once():
    with pytest.raises(InputError) as error:
        check_binding(HEAD, {"a": tensor("float32", 1), "noise": tensor("int64", 1)})
    assert all(
        words in error.value.where
        for words in ("hidden_states: missing", "image_ids: missing", "a: extra", "got int64[1]")
    )


def test_many_disagreements_are_counted():
    with pytest.raises(InputError) as error:
        check_binding(HEAD, {f"a{i}": tensor("float32", 1) for i in range(20)})
    assert "and 13 more" in error.value.where


def test_a_cache_is_bound_once_under_its_past_name():
    assert (
        present_name("past_key_values.3.value") == "present.3.value" and present_name("hidden_states") is None
    )
    assert [t.name for t in bound_tensors(DECODER)] == [
        "inputs_embeds",
        "past_key_values.0.key",
        "hidden_states",
    ]
    with pytest.raises(InputError) as error:
        check_binding(DECODER, decoder_tensors() | {"present.0.key": tensor("bfloat16", 2, 2, 16, 4)})
    assert "present.0.key: extra" in error.value.where


def test_axes_are_arithmetic_on_symbols():
    assert shape_from_symbols(("2N", 1, 8), {"N": 3}) == (6, 1, 8) and shape_from_symbols(
        ("P/4",), {"P": 8}
    ) == (2,)
    assert symbols_of(("2N", 1, "P/4")) == {"N", "P"}
    with pytest.raises(InputError):
        shape_from_symbols(("N+1",), {"N": 1})


def test_dtypes_have_one_name():
    assert [dtype_name(d) for d in ("bfloat16", np.float32, np.dtype("int64"), "bool")] == [
        "bfloat16",
        "float32",
        "int64",
        "bool",
    ]


@pytest.mark.parametrize(
    "array, got",
    [
        (np.zeros((2, 3), "float64"), "float64[2,3]"),
        (np.zeros((2, 3), ">f4"), "float32 in foreign byte order[2,3]"),
        (np.zeros((3, 2), "float32"), "float32[3,2]"),
        (np.zeros((1, 2, 3), "float32"), "float32[1,2,3]"),
        (np.float32(1), "float32"),
        (np.zeros((3, 2), "float32").T, "not contiguous"),
        (np.zeros((2, 6), "float32")[:, ::2], "not contiguous"),
        ([[1.0]], "list"),
        (np.zeros((2, 3), object), "object[2,3]"),
    ],
)
def test_an_array_that_would_need_converting_is_refused(array, got):
    check_array(np.zeros((2, 3), "float32"), shape=(2, 3), dtype="float32")
    with pytest.raises(InputError) as error:
        check_array(array, shape=(2, 3), dtype="float32")
    assert "expected a contiguous float32[2,3]" in error.value.where and got in error.value.where
