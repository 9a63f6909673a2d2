"""An axis of an ONNX file is fixed in its bytes exactly as onnx itself would do it."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from engines.errors import InputError
from engines.tensorrt.onnx_axes import onnx_with_axis
from tests.helpers.decoder_bundle import decoder_model


def with_onnx(model, symbol, size):
    """The oracle: the same edit through onnx's own objects."""
    graph = model.graph
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == symbol:
                dim.dim_value = size
    return model


@pytest.mark.parametrize("size", [1, 127, 128, 2048, 2**31])
def test_every_named_axis_of_the_graph_is_set_and_nothing_else_changes(size):
    model = decoder_model()
    model.graph.value_info.append(helper.make_tensor_value_info("mask", TensorProto.BOOL, ["B", 1, "S", "C"]))
    edited = onnx_with_axis(model.SerializeToString(), symbol="C", size=size, where="x")
    assert onnx.ModelProto.FromString(edited) == with_onnx(model, "C", size)
    assert b"\x12\x01C" not in edited  # no dim_param C is left


def test_a_symbol_that_is_not_there_leaves_the_bytes_alone():
    data = decoder_model().SerializeToString()
    assert onnx_with_axis(data, symbol="Q", size=3, where="x") == data


@pytest.mark.parametrize(
    "data", [b"\xff\xd8\xff\xe0JFIF", b"\x3a\xff\xff\xff\xff\x0f", b"\x80"], ids=["jpeg", "length", "varint"]
)
def test_what_is_no_onnx_is_refused(data):
    with pytest.raises(InputError):
        onnx_with_axis(data, symbol="C", size=3, where="x")


def test_no_truncation_is_accepted_as_a_whole_model():
    data = decoder_model().SerializeToString()
    for end in np.random.default_rng(0).integers(1, len(data) - 1, 100):
        try:
            edited = onnx_with_axis(data[:end], symbol="C", size=3, where="x")
        except InputError:
            continue
        assert len(edited) <= end  # cut between two top-level fields: valid bytes, and copied as they are
